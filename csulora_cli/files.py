"""Small, careful file reading: regular files only, bounded, JSON without surprises."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from csulora_cli.errors import InputError
from csulora_cli.text import printable

MAX_JSON_BYTES = 64 * 2**20
_BLOCK = 2**22


def is_regular(path: Path) -> bool:
    """True for a regular file or a link to one; false for folders, pipes, devices and what is not there."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def read_bytes(path: Path, error: type[InputError], limit: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises:
        error: not there, not a regular file, unreadable, or longer than `limit` bytes.
    """
    if not path.exists():
        raise error(f"{printable(path.name)} is missing in {printable(path.parent)}")
    if not is_regular(path):
        raise error(f"{printable(path)} is not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read() if limit is None else file.read(limit + 1)
    except OSError as problem:
        raise error(f"cannot read {printable(path)}: {printable(problem.strerror)}") from None
    if limit is not None and len(data) > limit:
        raise error(f"{printable(path)} is larger than {limit // 2**20} MiB")
    return data


def parse_json_object(data: bytes, path: Path, error: type[InputError]) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        error: not UTF-8, not JSON (NaN and Infinity included), nested too deeply, or not an object.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise error(f"{printable(path)} is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{printable(path)} is not valid JSON: {printable(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{printable(path)} holds a {type(value).__name__}, not an object")
    return value


def read_json_object(path: Path, error: type[InputError]) -> dict[str, Any]:
    """`read_bytes` and `parse_json_object` in one step."""
    return parse_json_object(read_bytes(path, error, MAX_JSON_BYTES), path, error)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. Reads in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
