"""Reading task files."""

import hashlib
import json
from pathlib import Path

import pytest

from csulora_cli.errors import PromptsError
from csulora_cli.taskset import TaskExample, load_task


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_examples_come_in_order_without_white_space_at_their_ends(tmp_path: Path) -> None:
    path = write(
        tmp_path / "task.jsonl",
        {"prompt": " two and two ", "response": "four\n", "more": 1},
        "",
        {"prompt": "b", "response": "c  d"},
    )
    found = load_task(path)
    assert found.examples == (TaskExample("two and two", "four"), TaskExample("b", "c  d"))
    assert (found.name, found.sha256) == ("task.jsonl", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not a JSON object"),
        ("[]", "line 2 is not a JSON object"),
        ("[" * 100_000, "line 2 is not a JSON object"),
        ({"prompt": "a"}, "line 2 has no response text"),
        ({"prompt": " ", "response": "b"}, "line 2 has no prompt text"),
        ({"prompt": "a", "response": 3}, "line 2 has no response text"),
        ({"prompt": "a", "response": "\ud800"}, "line 2: the response holds half of a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "task.jsonl", {"prompt": "a", "response": "b"}, line)
    with pytest.raises(PromptsError, match=message):
        load_task(path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_examples_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PromptsError, match="holds no examples"):
        load_task(write(tmp_path / "task.jsonl", text))


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="is missing"):
        load_task(tmp_path / "task.jsonl")
    (tmp_path / "task.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(PromptsError, match="is not UTF-8"):
        load_task(tmp_path / "task.jsonl")
