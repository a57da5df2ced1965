"""Read a safetensors file from an untrusted place: its header first, and its values only if the header is sound.

The safetensors library decides what a valid file is. Checked before it gets to see the bytes is what would take long or
much memory (a huge header, a file far longer than its tensors) and what it lets pass (a name that stands twice).
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from csulora_cli.errors import InputError
from csulora_cli.files import open_regular, parse_json
from csulora_cli.text import printable

# 36,000 adapted modules (every expert of a large mixture) take 11 MiB.
MAX_HEADER_BYTES = 32 * 2**20
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# What comes under the name of a safetensors file: how it begins, what it is, and what to do about it.
_AGAIN = "Download or save the adapter again; the file may be cut off."
_PICKLE_HINT = "A pickle can run code when it is opened; ask for the adapter in safetensors format."
_OTHER_KINDS = (
    (b"version ", "it is a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull"),
    (b"<", "it is a web page or XML", "Download the file itself, not the page that shows it."),
    (b"PK\x03\x04", "it is a zip archive, as torch.save writes", _PICKLE_HINT),
    (b"\x80\x02", "it is a pickle", _PICKLE_HINT),
    (b"\x80\x03", "it is a pickle", _PICKLE_HINT),
    (b"\x80\x04", "it is a pickle", _PICKLE_HINT),
    (b"\x80\x05", "it is a pickle", _PICKLE_HINT),
    (b"GGUF", "it is a GGUF file", "Give the adapter in PEFT's safetensors format."),
)


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds.

    Attributes:
        tensors: by name.
        sha256: of the bytes that the tensors came from, in hexadecimal.
    """

    tensors: Mapping[str, Tensor]
    sha256: str


class _BadFileError(Exception):
    """Why a file is no safetensors file, and what to do about it."""

    verdict = " is not a safetensors file: "

    def __init__(self, reason: str, hint: str = _AGAIN) -> None:
        super().__init__(reason)
        self.hint = hint


class _BadTensorError(_BadFileError):
    """Why a tensor of a sound file cannot be used."""

    verdict = ": "


def read_tensor_file(path: Path, error: type[InputError]) -> TensorFile:
    """Read a whole safetensors file. Takes about twice its size in memory, and little if its header is bad.

    Args:
        path: the file.
        error: the class of the errors.

    Raises:
        error: not a regular file, unreadable, or not a sound safetensors file.
    """
    with open_regular(path, error) as file:
        try:
            _check_head(file)
            file.seek(0)
            data = file.read()
            return TensorFile(_load(data), hashlib.sha256(data).hexdigest())
        except _BadFileError as problem:
            raise error(f"{printable(path)}{problem.verdict}{problem}", problem.hint) from None


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as problem:
        raise _BadFileError(printable(problem)) from None
    except KeyError as dtype:  # the format knows more dtypes than torch
        header = parse_json(data[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")])
        name = next(name for name, entry in header.items() if entry.get("dtype") == dtype.args[0])
        raise _BadTensorError(
            f"torch cannot read tensor '{printable(name, 120)}' of dtype {printable(dtype.args[0])}",
            "Save the adapter in float32, float16 or bfloat16.",
        ) from None
    return tensors


def _check_head(file: BinaryIO) -> None:
    """Check that the header is sound and accounts for all of the file."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    # Only where the length is none: that of a sound header may begin as a pickle does (896 is 80 03 00 …).
    if length > size - _LENGTH_BYTES:
        for magic, kind, hint in _OTHER_KINDS:
            if start.startswith(magic):
                raise _BadFileError(kind, hint)
    if len(start) < _LENGTH_BYTES:
        raise _BadFileError(f"it has {size} bytes")
    if length > size - _LENGTH_BYTES:
        raise _BadFileError(f"its header should have {length} bytes, but the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise _BadFileError(f"its header has {length} bytes, more than the {MAX_HEADER_BYTES} that are read")
    header = file.read(length)
    try:
        entries = parse_json(header.rstrip(b" "))
    except ValueError as problem:
        raise _BadFileError(f"in its header {printable(problem)}") from None
    if not isinstance(entries, dict):
        raise _BadFileError("its header is not an object")
    end = 0
    for name, entry in entries.items():
        if name != _METADATA:
            end = max(end, _end(name, entry))
    if _LENGTH_BYTES + length + end != size:
        raise _BadFileError(f"its tensors end at byte {_LENGTH_BYTES + length + end}, but the file has {size}")


def _end(name: str, entry: Any) -> int:
    """Where a tensor ends, by its header's entry."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise _BadFileError(f"tensor '{printable(name, 120)}' has no proper data_offsets in its header")
    shape = entry.get("shape")
    if isinstance(shape, list) and 0 in shape:  # told here: a million of them fit a small file, and take long to make
        raise _BadTensorError(
            f"tensor '{printable(name, 120)}' has shape {printable(shape, 60)}, which holds no values",
            "A sharded training run may have saved an unfinished adapter; save it again.",
        )
    return int(offsets[1])
