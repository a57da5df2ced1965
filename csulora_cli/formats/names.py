"""The names of an adapter's tensors, taken apart: `base_model.model.<module>.<what it is>`.

PEFT wraps the layers that it adapts, so that `base_layer` can stand between a module's name and what follows; the
number of them tells apart the parameters of one module that are adapted each on its own.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from csulora_cli.errors import AdapterError
from csulora_cli.text import printable

PREFIX = "base_model.model."
_WRAPPED = ".base_layer"


class Role(StrEnum):
    """What a tensor is to its module."""

    FACTOR_A = "A"
    FACTOR_B = "B"
    BIAS = "bias"  # of lora_bias
    MAGNITUDE = "magnitude"  # of DoRA
    UNUSED = "unused"  # read in training only
    OTHER = "other"  # LoRA of a kind that is not known
    CARRIED = "carried"  # no low-rank update at all


# The ends of names; the first that fits says what a tensor is.
_SUFFIXES: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"lora_A\.weight|lora_embedding_A"), Role.FACTOR_A),
    (re.compile(r"lora_B\.weight|lora_embedding_B"), Role.FACTOR_B),
    (re.compile(r"lora_B\.bias"), Role.BIAS),
    (re.compile(r"lora_magnitude_vector(\.weight)?"), Role.MAGNITUDE),
    (re.compile(r"lora_velora_embed|lora_monteclora_sampler\..+", re.DOTALL), Role.UNUSED),
    (re.compile(r"lora_.*", re.DOTALL), Role.OTHER),
)
_SPLIT = re.compile(r"(?P<owner>.+?)\.(?P<suffix>lora_.+)", re.DOTALL)


@dataclass(frozen=True)
class Name:
    """One tensor's name.

    Attributes:
        key: the whole of it.
        module: the module in the host, without `base_layer`.
        depth: how many wrappers lie around what this tensor adapts (or replaces).
        suffix: what follows.
        role: what it is.
    """

    key: str
    module: str
    depth: int
    suffix: str
    role: Role


@dataclass
class Group:
    """The tensors of one wrapper: names by role."""

    module: str
    depth: int
    names: dict[Role, Name] = field(default_factory=dict)


def parse_name(key: str) -> Name | None:
    """Take a canonical name apart; None if it does not begin as PEFT's do."""
    if not key.startswith(PREFIX):
        return None
    rest = key.removeprefix(PREFIX)
    match = _SPLIT.fullmatch(rest)
    if match is None:
        owner, _, suffix = rest.rpartition(".")
        return Name(key, *_unwrapped(owner), suffix, Role.CARRIED) if owner and suffix else None
    suffix = match["suffix"]
    role = next(role for pattern, role in _SUFFIXES if pattern.fullmatch(suffix))
    return Name(key, *_unwrapped(match["owner"]), suffix, role)


def _unwrapped(owner: str) -> tuple[str, int]:
    depth = 0
    while owner.endswith(_WRAPPED):
        owner, depth = owner.removesuffix(_WRAPPED), depth + 1
    return owner, depth


def group_names(names: Iterable[Name]) -> list[Group]:
    """The names of low-rank updates, one group a wrapper, sorted by module and from the innermost outwards.

    Raises:
        AdapterError: two tensors are the same to one wrapper.
    """
    groups: dict[tuple[str, int], Group] = {}
    for name in names:
        if name.role is not Role.CARRIED and name.role is not Role.UNUSED:
            group = groups.setdefault((name.module, name.depth), Group(name.module, name.depth))
            if (other := group.names.setdefault(name.role, name)) is not name:
                raise AdapterError(
                    f"'{printable(other.key)}' and '{printable(name.key)}' both hold lora_{name.role} of one module",
                    "Save or download the adapter again.",
                )
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))]
