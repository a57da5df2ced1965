"""Files of one JSON object a line, written by users: every error says which line."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from csulora_cli.errors import PromptsError


def json_lines(data: bytes, shown: str, hint: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers, from 1; empty lines are skipped.

    Args:
        data: the file's bytes.
        shown: what the file is called in errors.
        hint: what a line looks like.

    Raises:
        PromptsError: not UTF-8, or a line that is no JSON object.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PromptsError(f"{shown} is not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise PromptsError(f"{shown}, line {number} is not a JSON object", hint)
        yield number, value


def text_of(value: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must hold text, without white space at its ends.

    Raises:
        PromptsError: it is missing, no text or empty, or cannot be encoded.
    """
    text = value.get(name)
    if not isinstance(text, str) or not text.strip():
        raise PromptsError(f"{where} has no {name} text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptsError(f"{where}: the {name} holds half of a surrogate pair") from None
    return text.strip()
