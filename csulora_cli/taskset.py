"""The adapter's own task: prompts with the responses that it was trained to give."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from csulora_cli.errors import PromptsError
from csulora_cli.files import read_bytes
from csulora_cli.jsonl import json_lines, text_of
from csulora_cli.promptset import MAX_BYTES
from csulora_cli.text import printable


@dataclass(frozen=True)
class TaskExample:
    """A prompt and the response wanted."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TaskSet:
    """A task file: its name, the SHA-256 of its bytes, and its examples in order."""

    name: str
    sha256: str
    examples: tuple[TaskExample, ...]


def load_task(path: Path) -> TaskSet:
    """Read a JSONL file of `{"prompt": …, "response": …}`; other fields are ignored.

    Raises:
        PromptsError: unreadable, a malformed line, or no examples.
    """
    data, shown = read_bytes(path, PromptsError, MAX_BYTES), printable(path)
    examples = tuple(
        TaskExample(*(text_of(value, name, f"{shown}, line {number}") for name in ("prompt", "response")))
        for number, value in json_lines(data, shown, _HINT)
    )
    if not examples:
        raise PromptsError(f"{shown} holds no examples", _HINT)
    return TaskSet(path.name, hashlib.sha256(data).hexdigest(), examples)


_HINT = 'Each line: {"prompt": "…", "response": "…"}'
