"""The adapter's own task: prompts with the responses that it was trained to give."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from csulora_cli.errors import PromptsError
from csulora_cli.files import read_bytes
from csulora_cli.text import printable

MAX_BYTES = 64 * 2**20


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
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PromptsError(f"{shown} is not UTF-8 text") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise PromptsError(f"{shown} holds no examples", _HINT)
    examples = tuple(_example(line, f"{shown}, line {number}") for number, line in lines)
    return TaskSet(path.name, hashlib.sha256(data).hexdigest(), examples)


_HINT = 'Each line: {"prompt": "…", "response": "…"}'


def _example(line: str, where: str) -> TaskExample:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PromptsError(f"{where} is not a JSON object", _HINT)
    texts = []
    for name in ("prompt", "response"):
        text = value.get(name)
        if not isinstance(text, str) or not text.strip():
            raise PromptsError(f"{where} has no {name} text", _HINT)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PromptsError(f"{where}: the {name} holds half of a surrogate pair") from None
        texts.append(text.strip())
    return TaskExample(*texts)
