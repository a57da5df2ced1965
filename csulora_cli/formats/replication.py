"""`layer_replication`: PEFT builds a deeper host out of repeated layers, which share weights but not low-rank updates.

The ranges [[0, 2], [1, 3]] make the layers 0, 1, 1, 2 of the host the layers 0, 1, 2, 3 of the grown one. An adapter
names the modules of the grown host; a checkpoint has the weights under the names of the former one.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from csulora_cli.errors import AdapterError, HostError
from csulora_cli.formats.config import CONFIG_NAME, CORRECT_HINT
from csulora_cli.text import printable

MAX_LAYERS = 4096
# Where PEFT 0.21 finds the layers, after it has gone down through `model` and `bert`: the first that is there.
_STACKS = ("layers", "encoder.layer", "h")


@dataclass(frozen=True)
class Replication:
    """Which layers of the host make up the grown one: ranges (start, end), end excluded."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def sources(self) -> list[int]:
        """The layer of the host that each layer of the grown host is."""
        return [layer for start, end in self.ranges for layer in range(start, end)]


@dataclass(frozen=True)
class Repeats:
    """A grown host's layers: `{stack}.i` is layer `sources[i]` of the host as it is stored."""

    stack: str
    sources: tuple[int, ...]

    def holds(self, name: str) -> bool:
        """Whether a module or parameter of the grown host lies in one of these layers."""
        return name.startswith(f"{self.stack}.")

    def stored(self, name: str) -> str:
        """The name that a module or parameter of the grown host has in the host as it is stored."""
        if not self.holds(name):
            return name
        prefix = f"{self.stack}."
        layer, dot, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{self.sources[int(layer)]}{dot}{rest}" if layer.isdecimal() else name


def replication_of(config: Mapping[str, Any]) -> Replication | None:
    """What the config says of repeated layers; None if nothing.

    Raises:
        AdapterError: it is no list of ranges, or asks for more than `MAX_LAYERS` layers.
    """
    ranges = config.get("layer_replication")
    if not ranges:
        return None
    if not isinstance(ranges, list) or not all(map(_is_range, ranges)):
        raise AdapterError(f"layer_replication in {CONFIG_NAME} is no list of [start, end] ranges", CORRECT_HINT)
    if not 0 < sum(end - start for start, end in ranges) <= MAX_LAYERS:
        raise AdapterError(f"layer_replication in {CONFIG_NAME} does not give 1 to {MAX_LAYERS} layers", CORRECT_HINT)
    return Replication(tuple((start, end) for start, end in ranges))


def _is_range(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and all(type(number) is int for number in entry)
        and 0 <= entry[0] <= entry[1] <= MAX_LAYERS
    )


def grow(model: nn.Module, replication: Replication | None) -> Repeats | None:
    """Put repeated layers in the place of a model's layers, as PEFT does; they share the weights of the former ones.

    Args:
        model: in memory or on the meta device; changed in place.
        replication: which layers; None changes nothing.

    Raises:
        HostError: PEFT finds no layers in such a model, cannot run it with more of them, or it has too few.
    """
    if replication is None:
        return None
    owner_name, owner = _descend(model)
    stack = next((path for path in _STACKS if _submodule(owner, path) is not None), None)
    layers = _submodule(owner, stack) if stack else None
    if stack is None or not isinstance(layers, nn.ModuleList):
        raise _cannot_grow("PEFT finds no list of layers in this host")
    sources = replication.sources
    if max(sources) >= len(layers):
        raise _cannot_grow(f"the host has {len(layers)} layers")
    config: Any = owner.config
    if getattr(config, "layer_types", None):
        raise _cannot_grow("PEFT cannot run more layers of a host whose config gives each layer a type")
    grown = nn.ModuleList(_copy_of(layers[source], index) for index, source in enumerate(sources))
    owner.set_submodule(stack, grown)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(sources)
    return Repeats(".".join(filter(None, (owner_name, stack))), tuple(sources))


def _descend(model: nn.Module) -> tuple[str, nn.Module]:
    names = []
    while isinstance(inner := getattr(model, "model", None), nn.Module):
        names.append("model")
        model = inner
    if isinstance(inner := getattr(model, "bert", None), nn.Module):
        names.append("bert")
        model = inner
    return ".".join(names), model


def _submodule(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def _copy_of(layer: nn.Module, index: int) -> nn.Module:
    """A copy that shares parameters and settings, knowing its own place (for the cache of keys and values)."""
    settings = [module.config for module in layer.modules() if hasattr(module, "config")]
    copied = copy.deepcopy(layer, {id(shared): shared for shared in (*layer.parameters(), *settings)})
    for module in copied.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010 (torch types every attribute of a module as a module)
    return copied


def _cannot_grow(reason: str) -> HostError:
    return HostError(
        f"the adapter repeats layers (layer_replication), but {printable(reason)}",
        "Give the model that the adapter was trained on.",
    )
