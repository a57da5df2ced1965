"""Carried tensors: everything in an adapter file that is no low-rank update. They are written as they were read.

PEFT loads any tensor whose name is that of a parameter of the host over that parameter (and in the place of some rows
of an embedding for trainable tokens), without a word. Such a replacement can hold harm that the repair of a low-rank
update does not touch, so each is named, and compared with what the host has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from csulora_cli.errors import AdapterError, HostError, UnsupportedError
from csulora_cli.formats.config import CONFIG_NAME, UNSUPPORTED_HINT
from csulora_cli.formats.names import Name, Role, parse_name
from csulora_cli.formats.structure import Structure
from csulora_cli.text import printable

_TOKENS = ".token_adapter"
_TOKENS_SUFFIX = "trainable_tokens_delta"


@dataclass(frozen=True)
class Carried:
    """One carried tensor.

    Attributes:
        key: its name in the file.
        weight: the parameter of the host that it replaces, or None for what only training reads.
        rows: the rows that it replaces, or None for all of the parameter.
        tensor: as stored.
    """

    key: str
    weight: str | None
    rows: tuple[int, ...] | None
    tensor: Tensor


def find_carried(config: Mapping[str, Any], tensors: Mapping[str, Tensor], structure: Structure) -> tuple[Carried, ...]:
    """All carried tensors, by name.

    Raises:
        HostError: a tensor names no parameter of the host, or one of another shape.
        AdapterError: trainable tokens that the config does not list.
        UnsupportedError: a name that cannot be read.
    """
    names = (parse_name(key) for key in sorted(tensors))
    return tuple(
        _carried(config, name, tensors[name.key], structure)
        for name in names
        if name is not None and name.role in (Role.CARRIED, Role.UNUSED)
    )


def _carried(config: Mapping[str, Any], name: Name, tensor: Tensor, structure: Structure) -> Carried:
    if name.role is Role.UNUSED:
        return Carried(name.key, None, None, tensor)
    if name.module.endswith(_TOKENS) and name.suffix == _TOKENS_SUFFIX:
        return _trainable_tokens(config, name, tensor, structure)
    weight = f"{name.module}.{name.suffix}"
    _check_shape(name, weight, structure.shape(weight), tuple(tensor.shape))
    return Carried(name.key, weight, None, tensor)


def _trainable_tokens(config: Mapping[str, Any], name: Name, tensor: Tensor, structure: Structure) -> Carried:
    module = name.module.removesuffix(_TOKENS)
    weight = f"{module}.weight"
    shape = structure.shape(weight)
    rows = _token_rows(config.get("trainable_token_indices"), module)
    expected = (len(rows), *shape[1:]) if shape else None
    _check_shape(name, weight, expected, tuple(tensor.shape))
    if shape and not all(0 <= row < shape[0] for row in rows):
        raise AdapterError(f"trainable_token_indices in {CONFIG_NAME} names rows that '{printable(weight)}' lacks")
    return Carried(name.key, weight, rows, tensor)


def _token_rows(indices: Any, module: str) -> tuple[int, ...]:
    if isinstance(indices, dict):
        found = [rows for owner, rows in indices.items() if module == owner or module.endswith(f".{owner}")]
        indices = found[0] if found else None
    if not isinstance(indices, list) or not all(type(row) is int for row in indices):
        raise AdapterError(
            f"trainable_token_indices in {CONFIG_NAME} does not list the trained tokens of '{printable(module)}'",
            "The config and the weights do not belong together; download both again.",
        )
    return tuple(indices)


def _check_shape(name: Name, weight: str, expected: tuple[int, ...] | None, found: tuple[int, ...]) -> None:
    if expected is None:
        if weight.rpartition(".")[2] not in ("weight", "bias"):
            raise UnsupportedError(
                f"tensor '{printable(name.key)}' is neither a LoRA factor nor a parameter of the host",
                UNSUPPORTED_HINT,
            )
        raise HostError(
            f"tensor '{printable(name.key)}' replaces '{printable(weight)}', which the host does not have",
            "Give the model that the adapter was trained on.",
        )
    if expected != found:
        raise HostError(
            f"tensor '{printable(name.key)}' is {found}, but what it replaces in the host is {expected}",
            "Give the model that the adapter was trained on.",
        )
