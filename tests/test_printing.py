"""Strings from files, names, options and exceptions never reach a terminal, a card or a JSON document as they are."""

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import test_cli
from conftest import Ran
from example_reports import EVIL as WORSE
from example_reports import hostile_report
from test_cli import World

from csulora_cli import api, card
from csulora_cli.adapter import read_adapter
from csulora_cli.cli import console
from csulora_cli.cli.fix import show
from csulora_cli.engine import behaviour
from csulora_cli.errors import AdapterError
from csulora_cli.locate import Location
from csulora_cli.settings import FixSettings

world = test_cli.world  # the fixture
# An escape sequence, a bell, a bidi mark, a line break that begins a workflow command, a line separator.
EVIL = "evil\x1b[31m\x07\u202e\n::error::x\u2028"
SHOWN = "evil\\x1b[31m\\x07\\u202e\\n::error::x\\u2028"
EVIL_LINE = EVIL.split("\n", maxsplit=1)[0]
# In the name of a file or folder.
EVIL_NAME = EVIL.replace("/", "")

pytestmark = pytest.mark.usefixtures("clean_surroundings")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def assert_harmless(text: str) -> None:
    """One or several lines of printable characters; none of them a workflow command."""
    found = {
        char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"} and char != "\n"
    }
    assert not found, found
    assert not [line for line in text.splitlines() if line.startswith("::")]


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


# What fails

Prepare = Callable[[World], list[object]]


def _args(change: Callable[[World], object] = lambda world: None, *more: object, by: str = "by_weights") -> Prepare:
    def prepare(world: World) -> list[object]:
        change(world)
        return [*getattr(world, by), *more]

    return prepare


def _edited(**entries: Any) -> Prepare:
    return _args(lambda world: world.edit(**entries))


def _tensor(name: str) -> Prepare:
    def add(tensors: dict[str, Any]) -> None:
        tensors[name] = next(iter(tensors.values())).clone()

    return _args(lambda world: world.edit_tensors(add))


def _weights(data: bytes) -> Prepare:
    return _args(lambda world: (world.adapter / "adapter_model.safetensors").write_bytes(data))


def _only_shards(index: Path) -> None:
    """An index of hostile names, and no file that holds all."""
    (index.parent / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": f"{EVIL}.bin"}}))


def _host(name: str, change: Callable[[Path], object]) -> Prepare:
    """The host is a copy in a folder of a hostile name, with one file changed."""

    def prepare(world: World) -> list[object]:
        folder = world.folder / EVIL_NAME
        shutil.copytree(world.host, folder)
        change(folder / name)
        return [world.adapter, "--base", folder, "--out", world.out, "--prompts", world.prompts, "--strength", 1]

    return prepare


def _json(**entries: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _rename_tensor(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    tensors = {name.replace("layers.0.mlp.up_proj", f"layers.0.{EVIL}"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _prompts(text: str) -> Prepare:
    return _args(lambda world: world.prompts.write_text(text), by="by_prompts")


def _settings(text: str) -> Prepare:
    def prepare(world: World) -> list[object]:
        file = world.folder / f"{EVIL_NAME}.toml"
        file.write_text(text)
        return [*world.by_weights, "--config", file]

    return prepare


def _in_place_of(index: int, value: object) -> Prepare:
    def prepare(world: World) -> list[object]:
        args = list(world.by_weights)
        args[index] = value
        return args

    return prepare


QUOTED = json.dumps(EVIL)
FAILURES: dict[str, Prepare] = {
    "adapter that is not there": _in_place_of(0, f"./{EVIL}"),
    "adapter id": _in_place_of(0, EVIL),
    "base that is not there": _in_place_of(2, f"./{EVIL}"),
    "base that the adapter names": lambda w: (w.edit(base_model_name_or_path=EVIL), [w.adapter, "--strength", 1])[1],
    "peft_type": _edited(peft_type=EVIL),
    "unknown field": _edited(**{EVIL: EVIL}),
    "value of a field": _edited(init_lora_weights=EVIL),
    "number": _edited(r=EVIL),
    "key of a pattern": _edited(rank_pattern={f"{EVIL}(": 4}),
    "value of a pattern": _edited(alpha_pattern={EVIL: EVIL}),
    "field twice": _args(lambda w: (w.adapter / "adapter_config.json").write_text(f"{{{QUOTED}: 1, {QUOTED}: 2}}")),
    "tensor that is none of LoRA": _tensor(EVIL),
    "module without a partner": _tensor(f"base_model.model.{EVIL}.lora_A.weight"),
    "LoRA of an unknown kind": _tensor(f"base_model.model.{EVIL}.lora_{EVIL}"),
    "header of the weights": _weights(
        (len(data := json.dumps({EVIL: {"dtype": EVIL}}).encode())).to_bytes(8, "little") + data
    ),
    "dtype in the header": _weights(
        (len(data := json.dumps({"a": {"dtype": EVIL, "shape": [1], "data_offsets": [0, 1]}}).encode())).to_bytes(
            8, "little"
        )
        + data + b"\0"
    ),
    "other safetensors": _args(
        lambda w: (w.adapter / "adapter_model.safetensors").rename(w.adapter / f"{EVIL_NAME}.safetensors")
    ),
    "model type of the host": _host("config.json", _json(model_type=EVIL)),
    "config of the host": _host("config.json", lambda path: path.write_text(f"{{{QUOTED}: 1, {QUOTED}: 2}}")),
    "weights of the host": _host("model.safetensors", _rename_tensor),
    "shards of the host": _host("model.safetensors.index.json", _only_shards),
    "chat template of the host": _host(
        "chat_template.jinja", lambda path: path.write_text("{{ raise_exception(" + QUOTED + ") }}")
    ),
    "label of a prompt": _prompts(json.dumps({"prompt": EVIL, "label": EVIL})),
    "prompts file": _args(lambda w: None, "--prompts", f"./{EVIL}", by="by_prompts"),
    "settings file": _args(lambda w: None, "--config", f"./{EVIL}"),
    "key of the settings": _settings(f"[fix]\n{QUOTED} = 1\n"),
    "table of the settings": _settings(f"[{QUOTED}]\n"),
    "value of the settings": _settings(f"[fix]\ndevice = {QUOTED}\n"),
    "syntax of the settings": _settings(f"[fix]\nstrength = {EVIL}\n"),
    "strength": _args(lambda w: None, "--strength", EVIL),
    "device": _args(lambda w: None, "--device", EVIL),
    "revision": _args(lambda w: None, "--revision", EVIL),
    "geometry": _args(lambda w: None, "--geometry", EVIL),
    "no such option": _args(lambda w: None, f"--{EVIL}"),
    "output below a file": lambda w: [*w.by_weights[:3], "--out", w.prompts / EVIL, *w.by_weights[5:]],
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_shows_hostile_text_escaped(name: str, world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("fix", *FAILURES[name](world), "--json", "--quiet")
    assert ran.code in (2, 4), ran.err
    assert_harmless(ran.err)
    document = json.loads(ran.out)
    for text in strings(document):
        assert_harmless(text)
        assert "\n" not in text
    assert not re.search(r"evil(?!\\(x1b|u001b)\[31m)", ran.error)
    assert document["error"]["message"] == ran.error


def test_hostile_text_is_shown_and_not_left_out(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("fix", *FAILURES["unknown field"](world))
    assert SHOWN in ran.error


@pytest.mark.parametrize(
    "error", [AdapterError(EVIL, EVIL), RuntimeError(EVIL), OSError(5, EVIL, EVIL), MemoryError(EVIL)]
)
def test_an_exception_with_hostile_text_is_escaped(
    error: Exception,
    world: World,
    csulora: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object) -> None:
        raise error

    monkeypatch.setattr(api, "read_adapter", fail)
    ran = csulora("fix", *world.by_weights, "--json", "--quiet")
    assert ran.code
    assert_harmless(ran.err)
    assert "evil\\x1b[31m" in ran.error
    for text in strings(json.loads(ran.out)):
        assert_harmless(text)


def test_whatever_is_printed_is_escaped_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    console.out(f"one {EVIL_LINE}\ntwo λ 中")
    assert capsys.readouterr().out == "one evil\\x1b[31m\\x07\\u202e\ntwo λ 中\n"


# What succeeds


def test_a_report_of_hostile_strings_is_printed_and_written_escaped(
    capsys: pytest.CaptureFixture[str], adapters: Callable[..., Path], hosts: Callable[..., Path]
) -> None:
    report = hostile_report()
    report = replace(report, settings={**report.settings, "protect": 1.0})
    show(report, FixSettings(WORSE, base=WORSE, out=Path(WORSE.replace("/", ""))))
    adapter = read_adapter(adapters("llama"))
    text = card.model_card(report, adapter, Location(WORSE, hosts("llama")))
    for shown in (capsys.readouterr().out, text, json.dumps(report.to_dict(), ensure_ascii=True)):
        assert_harmless(shown.replace("\t", " "))
    assert "<img" not in text.replace("\\<img", "")


def test_hostile_names_that_a_repair_carries_along_are_escaped_in_what_it_writes(
    world: World,
    csulora: Callable[..., Ran],
) -> None:
    folder = world.folder / EVIL_NAME
    world.adapter.rename(folder)
    config = folder / "adapter_config.json"
    entries = {**json.loads(config.read_text()), "base_model_name_or_path": EVIL, "revision": EVIL, "task_type": EVIL}
    config.write_text(json.dumps(entries))
    ran = csulora("fix", folder, *world.by_weights[1:])
    assert ran.code == 0, ran.err
    assert "warning: " in ran.err
    for text in (ran.out, ran.err, (world.out / "README.md").read_text(), (world.out / "csulora.json").read_text()):
        assert_harmless(text)
        assert "evil" in text
