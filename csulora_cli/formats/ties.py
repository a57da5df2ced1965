"""`ensure_weight_tying`: one update of a weight that the embedding and the output layer share, as one update of each.

PEFT lets the factors of the output layer share the memory of the embedding's: lora_A is lora_embedding_Bᵀ, lora_B is
lora_embedding_Aᵀ, and each end has its own scale. What must fade on the two inputs differs (token ids, hidden states),
so that no closest update of rank r stays shared: the ends are written apart, and PEFT loads each as it is.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from csulora_cli.errors import UnsupportedError
from csulora_cli.formats.config import UNSUPPORTED_HINT, alpha_of, is_targeted, rank_of, scale_of
from csulora_cli.formats.conversions import Content
from csulora_cli.formats.layouts import EMBEDDING_WEIGHTS, WEIGHTS
from csulora_cli.formats.names import PREFIX
from csulora_cli.formats.structure import Structure
from csulora_cli.patterns import matches_whole
from csulora_cli.text import some

# The last parts of module names by which PEFT tells that the config is about the shared weight.
_SHARED_NAMES = ("embed_tokens", "lm_head")


def without_ties(content: Content, structure: Structure) -> Content:
    """The same updates as PEFT applies them, with both ends of the shared weight in the file and in the config.

    Where the file holds both ends, PEFT copies the output layer's over the embedding's when it loads them; where it
    holds one, the other follows.

    Args:
        content: with `ensure_weight_tying`.
        structure: of the host.

    Raises:
        UnsupportedError: the weight has more ends than an embedding and an output layer, or one of them is excluded.
    """
    shared = _shared_modules(structure)
    if not shared or not _ties_updates(content.config):
        return content
    if [structure.modules[name].layer for name in shared] != ["embedding", "linear"]:
        raise UnsupportedError(
            f"the adapter ties the updates of {some(shared, 4)} (ensure_weight_tying)", UNSUPPORTED_HINT
        )
    embedding, output = shared
    keys = [f"{PREFIX}{embedding}.{suffix}" for suffix in EMBEDDING_WEIGHTS]
    output_keys = [f"{PREFIX}{output}.{suffix}" for suffix in reversed(WEIGHTS)]  # B, A: what A, B become
    tensors = dict(content.tensors)
    sources, followers = (output_keys, keys) if all(key in tensors for key in output_keys) else (keys, output_keys)
    if not all(key in tensors for key in sources):
        return content  # no factors of the shared weight, or not all of them
    were_apart = False
    for source, follower in zip(sources, followers, strict=True):
        wanted = tensors[source].mT
        if follower not in tensors or not torch.equal(tensors[follower], wanted):
            were_apart = were_apart or follower in tensors
            tensors[follower] = wanted.contiguous()
    words = "embedding and output layer no longer tied, each with an update of its own"
    if were_apart:
        words += ", which in the file differed: the output layer's, as PEFT loads them"
    config = _apart(content.config, embedding, output, tensors[output_keys[1]].shape[0])
    return Content(config, tensors, (*content.conversions, words))


def _shared_modules(structure: Structure) -> list[str]:
    """The modules that share an embedding's weight, embeddings first."""
    for name, module in structure.modules.items():
        if module.layer == "embedding" and (others := structure.ties.get(f"{name}.weight")):
            owners = [name, *(other.rpartition(".")[0] for other in others)]
            return sorted(owners, key=lambda owner: structure.modules[owner].layer != "embedding")
    return []


def _ties_updates(config: Mapping[str, Any]) -> bool:
    """Whether PEFT ties low-rank updates: the config targets an end of the shared weight, and saves none in full."""
    if any(_is_shared(name) for name in config.get("modules_to_save") or []):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets != "all-linear" and any(matches_whole(targets, name, "target_modules") for name in _SHARED_NAMES)
    return any(_is_shared(name) for name in targets)


def _is_shared(name: str) -> bool:
    return name.rpartition(".")[2] in _SHARED_NAMES


def _apart(config: Mapping[str, Any], embedding: str, output: str, rank: int) -> dict[str, Any]:
    """The config that targets both ends, the output layer with the embedding's rank and the scale that it had."""
    result = {**config, "ensure_weight_tying": False}
    if missing := [name for name in (embedding, output) if not is_targeted(result, name)]:
        targets = config.get("target_modules") or []
        if isinstance(targets, str):
            result["target_modules"] = "|".join([f"(?:{targets})", *map(re.escape, missing)])
        else:
            result["target_modules"] = [*targets, *missing]
    if excluded := [name for name in missing if not is_targeted(result, name)]:
        raise UnsupportedError(
            f"the adapter ties updates (ensure_weight_tying), but exclude_modules names {some(excluded)}",
            UNSUPPORTED_HINT,
        )
    if (former := rank_of(config, output)) != rank:
        scale = scale_of(config, former, alpha_of(config, output))
        alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        result["rank_pattern"] = {output: rank, **(config.get("rank_pattern") or {})}
        result["alpha_pattern"] = {output: alpha, **(config.get("alpha_pattern") or {})}
    return result
