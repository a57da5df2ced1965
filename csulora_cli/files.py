"""Small, careful file access: regular files only, bounded, JSON without surprises, written whole or not at all."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csulora_cli.errors import InputError, UsageError
from csulora_cli.text import printable

MAX_JSON_BYTES = 64 * 2**20
_BLOCK = 2**22
_HEAD_BYTES = 4096


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


def check_new_file(path: Path, option: str, overwrite: bool, mark: str) -> None:
    """Check early that a file can be written to `path` and nothing of value would be lost.

    Args:
        path: the file to be.
        option: what the user knows it by.
        overwrite: whether a file of ours may be replaced.
        mark: what every file of ours has in its first 4096 bytes.

    Raises:
        UsageError: it is no regular file, exists (with `overwrite`: without the mark), or lies below a file.
    """
    shown = f"{option} {printable(path)}"
    if not path.exists():
        if file := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
            raise UsageError(f"{shown} lies below {printable(file)}, which is not a folder")
        return
    if not is_regular(path):
        raise UsageError(f"{shown} exists and is not a regular file", f"Give another name as {option}.")
    if not overwrite:
        raise UsageError(f"{shown} exists", f"Add --overwrite, or give another name as {option}.")
    with path.open("rb") as former:
        if mark.encode() not in former.read(_HEAD_BYTES):
            raise UsageError(
                f"--overwrite would replace {printable(path)}, which csulora did not write",
                f"Give another name as {option}.",
            )


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to: it becomes `path` when the block ends well, and vanishes when it does not."""
    path = path.resolve()  # of a link, what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        yield staging
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
