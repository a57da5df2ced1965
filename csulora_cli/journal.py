"""What a long run has measured so far, in a file, so that one that was interrupted can go on where it stopped."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class Journal:
    """Frozen dataclasses by key, a line of JSON each: [key, value]. Without a file it keeps them in memory alone.

    A line that was not finished, because its writer was stopped, is overwritten by the next one.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            whole = path.read_bytes()
            whole = whole[: whole.rfind(b"\n") + 1]
            self._known = {_name(key): value for key, value in map(json.loads, whole.splitlines())}
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def get(self, kind: type[Record], *key: str | float) -> Record | None:
        """What was put under this key, or None."""
        value = self._known.get(_name(key))
        found: Record | None = None if value is None else from_plain(kind, value)
        return found

    def put(self, record: Any, *key: str | float) -> None:
        """Keep a frozen dataclass of plain values; it is on disk when this returns."""
        value = asdict(record)
        self._known[_name(key)] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")


def _name(key: Sequence[str | float]) -> str:
    return json.dumps(list(key))


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `dataclasses.asdict` through JSON.

    Args:
        kind: a dataclass, or what its fields are annotated with: None, a plain type, an enumeration, an optional, a
            sequence or a mapping of such.
        value: what JSON gave for it.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        others = [part for part in parts if part is not type(None)]
        return None if value is None else from_plain(others[0], value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {from_plain(parts[0], key): from_plain(parts[1], entry) for key, entry in value.items()}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return tuple(from_plain(parts[0], entry) for entry in value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: from_plain(hints[field.name], value[field.name]) for field in fields(kind)})  # type: ignore[operator]
    return kind(value) if isinstance(kind, type) and issubclass(kind, (Enum, float)) else value
