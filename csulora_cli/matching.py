"""The weights of the adapted modules in a model's checkpoint, found by name and settled in orientation."""

from contextlib import ExitStack
from dataclasses import replace

import torch

from csulora_cli.adapter import Adapter
from csulora_cli.checkpoint import Checkpoint, WeightMatch, match_weights
from csulora_cli.errors import HostError
from csulora_cli.locate import Location
from csulora_cli.opening import check_model_config
from csulora_cli.text import printable

# An open checkpoint and where it has the weight of every adapted module, by module name.
Matched = tuple[Checkpoint, dict[str, WeightMatch]]


def open_matched(stack: ExitStack, location: Location, role: str, adapter: Adapter) -> Matched:
    """Open a checkpoint (headers only) and find every adapted module in it, before anything is loaded.

    Args:
        stack: closes the checkpoint.
        location: of the model.
        role: of the model, for messages: `host` or `unaligned model`.
        adapter: whose modules are looked for.

    Raises:
        HostError: it is quantised, unreadable, or has not all modules in the adapter's sizes.
    """
    check_model_config(location, role)
    checkpoint = stack.enter_context(Checkpoint(location.folder, role))
    return checkpoint, match_weights(adapter.modules, checkpoint, bool(adapter.config.get("fan_in_fan_out")))


def oriented(matched: Matched, host_at: Location, trust_remote_code: bool) -> Matched:
    """Settle square weights by the class of their modules, from a skeleton of the host without weights."""
    checkpoint, matches = matched
    if all(match.is_transposed is not None for match in matches.values()):
        return matched
    kinds = _module_kinds(host_at, trust_remote_code)
    return checkpoint, {
        name: match if match.is_transposed is not None else replace(match, is_transposed=kinds.get(name) == "Conv1D")
        for name, match in matches.items()
    }


def _module_kinds(location: Location, trust_remote_code: bool) -> dict[str, str]:
    """Class names of all modules, from a model built on the meta device: no weights, no memory."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(location.folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as problem:
        raise HostError(
            f"cannot tell whether the square weights of {printable(location.given)} are stored transposed: "
            f"{printable(problem)}"
        ) from None
    return {name: type(module).__name__ for name, module in model.named_modules()}
