"""Small, careful file access: regular files only, bounded, JSON without surprises, written whole or not at all."""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from csulora_cli.errors import InputError, UsageError
from csulora_cli.text import printable

MAX_JSON_BYTES = 16 * 2**20  # parsed, it takes up to twenty times as much memory
_BLOCK = 2**22
_HEAD_BYTES = 4096


def is_regular(path: Path) -> bool:
    """True for a regular file or a link to one; false for folders, pipes, devices and what is not there."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


@contextmanager
def open_regular(path: Path, error: type[InputError]) -> Iterator[BinaryIO]:
    """A regular file, open for reading; never waits for a pipe and never opens a device.

    Raises:
        error: not there, not a regular file, or unreadable.
    """
    if not os.path.lexists(path):
        raise error(f"{printable(path.name)} is missing in {printable(path.parent)}", "Check the folder's name.")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{printable(path)} is not a regular file", "Put a copy of the file itself there.")
        # Without waiting, and checked again: what lies there may have been exchanged in between.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise error(f"{printable(path)} is not a regular file", "Put a copy of the file itself there.")
            yield file
    except OSError as problem:
        hint = "Its link leads nowhere; put a copy there." if path.is_symlink() else "Check that you may read it."
        raise error(f"cannot read {printable(path)}: {printable(problem.strerror)}", hint) from None


def read_bytes(path: Path, error: type[InputError], limit: int | None = None) -> bytes:
    """All bytes of a regular file.

    Raises:
        error: not there, not a regular file, unreadable, or longer than `limit` bytes.
    """
    with open_regular(path, error) as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise error(f"{printable(path)} is larger than {limit // 2**20} MiB", "No such file has that size; replace it.")
    return data


def read_again(path: Path, error: type[InputError], sha256: str) -> bytes:
    """All bytes of a file that was read before.

    Raises:
        error: `read_bytes` cannot read it, or its bytes have another digest than those that were read.
    """
    data = read_bytes(path, error)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _changed(path, error)
    return data


def _changed(path: Path, error: type[InputError]) -> InputError:
    return error(f"{printable(path)} changed while it was being used", "Run again when it is complete.")


def leaves_folder(path: Path) -> bool:
    """Whether a file is a link to somewhere outside its folder.

    Links of the Hub cache stay in it: models--…/snapshots/<commit>/<file> -> models--…/blobs/<hash>.
    """
    if not path.is_symlink():
        return False
    folder, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))  # a loop stays where it is
    if folder in real.parents:
        return False
    snapshots = real.parent.parent / "snapshots"
    return real.parent.name != "blobs" or snapshots not in folder.parents


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`.

    Raises:
        ValueError: not UTF-8, not JSON (NaN and Infinity included), nested too deeply, or a key stands twice in one
            object, so that readers would differ about its value.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"'{printable(twice, 80)}' stands twice in one object")
    return values


def parse_json_object(data: bytes, path: Path, error: type[InputError]) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        error: `parse_json` cannot read it, or it is no object.
    """
    hint = "Download the file again, or correct it."
    try:
        value = parse_json(data)
    except ValueError as problem:
        raise error(f"{printable(path)} is not valid JSON: {printable(problem)}", hint) from None
    if not isinstance(value, dict):
        raise error(f"{printable(path)} holds a {type(value).__name__}, not an object", hint)
    return value


def read_json_object(path: Path, error: type[InputError]) -> dict[str, Any]:
    """`read_bytes` and `parse_json_object` in one step."""
    return parse_json_object(read_bytes(path, error, MAX_JSON_BYTES), path, error)


@dataclass(frozen=True)
class Stamp:
    """What a file looked like when it was about to be read: another size, time or inode means that it was replaced."""

    path: Path
    size: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file as it is now."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ino)

    def check(self, error: type[InputError]) -> None:
        """Check that the file is still the one that was read.

        Raises:
            error: it was changed, replaced or removed.
        """
        try:
            is_same = Stamp.of(self.path) == self
        except OSError:
            is_same = False
        if not is_same:
            raise _changed(self.path, error)


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


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


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
