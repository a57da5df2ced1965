"""Adapters of mlx-lm: `adapters.safetensors` with `lora_a` (in, r) and `lora_b` (r, out), repaired in that layout.

Its config has no peft_type; the scale stands in `lora_parameters`, and Δ = scale · (lora_a @ lora_b)ᵀ. Everything else
in the config is what the training was given, which does not touch the update.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from csulora_cli.errors import AdapterError, HostError, UnsupportedError
from csulora_cli.formats.config import CONFIG_NAME, UNSUPPORTED_HINT
from csulora_cli.formats.layouts import Layout, Pair
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.formats.structure import Structure
from csulora_cli.formats.targets import Target, check_modules, check_values
from csulora_cli.text import printable

WEIGHTS_NAME = "adapters.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[ab])", re.DOTALL)
_LARGEST_SCALE = 1e9


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config is one of mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def check_fields(config: Mapping[str, Any]) -> None:
    """Check what the update depends on.

    Raises:
        UnsupportedError: another way of training than LoRA.
        AdapterError: no scale.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedError(
            f"{CONFIG_NAME} says fine_tune_type {printable(json.dumps(kind), 40)}, not lora", UNSUPPORTED_HINT
        )
    scale_of(config)


def scale_of(config: Mapping[str, Any]) -> float:
    """The scale of every update.

    Raises:
        AdapterError: there is none.
    """
    parameters = config.get("lora_parameters")
    scale: Any = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) <= _LARGEST_SCALE:
        raise AdapterError(
            f"lora_parameters in {CONFIG_NAME} gives no scale", "Correct the config, or download the adapter again."
        )
    return float(scale)


def _fits(lora_a: Tensor, lora_b: Tensor, rank: int) -> bool:
    return lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[1] == rank == lora_b.shape[0]


def _unpack(lora_a: Tensor, lora_b: Tensor, _rank: int) -> list[Pair]:
    return [(lora_a.mT, lora_b.mT)]


def _pack(pairs: Sequence[Pair], _shape_a: torch.Size, _shape_b: torch.Size) -> Pair:
    ((lora_a, lora_b),) = pairs
    return lora_a.mT, lora_b.mT


_SUFFIXES = ("lora_a", "lora_b")
_LAYOUTS = {
    "linear": Layout("mlx matrix", Kind.LINEAR, _SUFFIXES, _fits, _unpack, _pack),
    "embedding": Layout("mlx embedding", Kind.EMBEDDING, _SUFFIXES, _fits, _unpack, _pack),
}


def find_targets(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], structure: Structure | None = None
) -> tuple[Target, ...]:
    """Pair the factors; the host tells a linear layer from an embedding, so that there are no sites without it.

    Raises:
        AdapterError: unpaired or ill-shaped factors, NaN or Inf.
        UnsupportedError: a tensor that is no factor.
        HostError: the host has no such module, or one of another kind or size.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise UnsupportedError(
                f"tensor '{printable(key)}' is not named as mlx-lm names LoRA factors", UNSUPPORTED_HINT
            )
        pairs.setdefault(match["module"], {})[match["letter"]] = tensor
    if structure is not None:
        check_modules(sorted(pairs), structure)
    return tuple(_target(config, module, pairs[module], structure) for module in sorted(pairs))


def _target(config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor], structure: Structure | None) -> Target:
    for letter in "ab":
        if letter not in pair:
            raise AdapterError(
                f"module '{printable(module)}' has no lora_{letter}", "Save or download the adapter again."
            )
        check_values(module, letter, pair[letter])
    lora_a, lora_b = pair["a"], pair["b"]
    rank = lora_a.shape[-1]
    if not _fits(lora_a, lora_b, rank):
        raise UnsupportedError(
            f"'{printable(module)}' has lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}: no update of "
            "one matrix",
            UNSUPPORTED_HINT,
        )
    layer = structure.modules[module].layer if structure is not None else None
    keys = (f"{module}.lora_a", f"{module}.lora_b")
    target = Target(module, *keys, lora_a, lora_b, _LAYOUTS.get(layer or "", _LAYOUTS["linear"]), ())
    if structure is None:
        return target
    found = structure.modules[module]
    is_swapped = layer == "embedding" or found.is_conv1d
    size = (lora_a.shape[0], lora_b.shape[1]) if is_swapped else (lora_b.shape[1], lora_a.shape[0])
    if layer not in _LAYOUTS or found.shapes.get("weight") != size:
        raise HostError(
            f"'{printable(module)}' of the host is a {printable(found.kind)} of {found.shapes.get('weight')}, but the "
            f"adapter changes a weight of {size}",
            "Give the model that the adapter was trained on.",
        )
    scale = scale_of(config)
    ((a, b),) = target.layout.unpack(lora_a, lora_b, rank)
    site = Site(module, a, b, scale * rank, scale, Place(module, target.layout.kind))
    site.check_size()
    return Target(module, *keys, lora_a, lora_b, target.layout, (site,))


def uniform(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The config of factors of one rank with their scale in them."""
    return {**config, "lora_parameters": {**config["lora_parameters"], "rank": rank, "scale": 1.0}}
