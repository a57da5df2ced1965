"""`csulora compare` on the real command line."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from conftest import Ran

from csulora_cli import comparison, methods
from csulora_cli.cli.app import app
from csulora_cli.comparison import compare_methods
from csulora_cli.settings import CompareSettings

EVIL = "\x1b[31mevil\x07\u202e\u2028|`<img src=x>`"


@dataclass(frozen=True)
class World:
    """A folder to work in, and the arguments of a comparison that takes no time."""

    folder: Path
    settings: CompareSettings

    @property
    def args(self) -> list[object]:
        used = self.settings
        return [
            used.adapter, "--base", used.base, "--prompts", used.prompts, "--methods", used.methods, "--points", 1,
            "--limit", 2, "--answer-tokens", 2, "--device", "cpu",
        ]  # fmt: skip


@pytest.fixture
def world(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    settings = CompareSettings(
        str(adapters("llama")),
        str(hosts("llama")),
        methods="prompts,shrink",
        points=1,
        prompts=prompts,
        limit=2,
        answer_tokens=2,
        device="cpu",
    )
    return World(tmp_path, settings)


def test_tables_for_people(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("compare", *world.args)
    assert ran.code == 3  # a random host refuses nothing
    text = " ".join(ran.out.split())
    for words in (
        "2 harmful, 2 benign ones of no kind", "greedy, so without a seed; 2 new tokens",
        "shrink control λ the whole update divided by 1+λ", "method strength moved ASR % over-r. KL kept score",
        "host, alone 100 (34-100)", "on benign prompts, cut to 0 to 1", "ASR of at most",
        "Read with care: the host itself refuses only 0 of 2", "flatters every method alike",
    ):  # fmt: skip
        assert words in text, words
    assert re.search(r"^prompts +[\d.]+[*~] ", ran.out, re.MULTILINE)
    assert re.search(r"^shrink +[\d.e-]+= ", ran.out, re.MULTILINE)
    assert max(map(len, ran.out.splitlines())) <= 80
    assert ran.err.splitlines()[-1] == "measuring every method on held-out prompts ..."


def test_json_is_one_document_and_the_report(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("compare", *world.args, "--json", "--quiet")
    assert ran.err == ""
    assert json.loads(ran.out) == json.loads(json.dumps(compare_methods(world.settings).to_dict()))


def test_quiet_prints_nothing(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("compare", *world.args, "--quiet")
    assert (ran.code, ran.out, ran.err) == (3, "", "")


def test_settings_from_a_file_and_winners_in_a_folder(world: World, csulora: Callable[..., Ran]) -> None:
    config = world.folder / "settings.toml"
    config.write_text('[fix]\nstrength = 3\n[compare]\nmethods = "shrink"\nout = "winners"\npoints = 2\n')
    args = [arg for arg in world.args if arg not in ("--methods", world.settings.methods, "--points", 1)]
    ran = csulora("compare", *args, "--config", config)
    assert "wrote       winners" in ran.out
    record = json.loads((world.folder / "winners" / "csulora.json").read_text())
    assert {point["method"] for point in record["points"]} == {"shrink"}
    assert record["settings"]["points"] == 2
    again = csulora("compare", *args, "--config", config)
    assert (again.code, again.out) == (2, "")
    assert "exists and is not empty" in again.error
    assert csulora("compare", *args, "--config", config, "--overwrite").code == 3


def test_a_report_is_written_beside_the_winners_or_in_their_folder(world: World, csulora: Callable[..., Ran]) -> None:
    args = [*world.args, "--out", "winners", "--report"]
    ran = csulora("compare", *args, "winners/page.html")
    assert ran.code == 3, ran.err
    assert "\nwrote       winners\n            winners/page.html\n" in ran.out
    first = (world.folder / "winners" / "page.html").read_bytes()
    assert b"Safety against what is kept" in first
    assert csulora("compare", *args, "page.html").error == "the output folder winners exists and is not empty"
    assert csulora("compare", *args, "page.html", "--overwrite", "-q").code == 3
    assert (world.folder / "page.html").read_bytes() == first
    assert not (world.folder / "winners" / "page.html").exists()
    again = csulora("compare", *world.args, "--report", "page.html")
    assert (again.code, again.error) == (2, "--report page.html exists")
    assert "measuring" not in again.err


@pytest.mark.parametrize(
    ("more", "code", "error"),
    [
        (["--methods", "nonsense"], 2, "--methods names nonsense"),
        (["--methods", "lssf"], 2, "the method lssf needs the unaligned checkpoint"),
        (["--methods", EVIL], 2, "--methods names"),
        (["--points", "0"], 2, "--points is 0"),
        (["--points", "many"], 2, "valid integer"),
        (["--task", "missing.jsonl"], 4, "missing.jsonl is missing"),
        (["--unaligned", "missing/model/here"], 4, "missing/model/here"),
        (["--overwrite"], 2, "--overwrite applies with --out or --report only"),
        (["--report", "page.txt"], 2, "--report page.txt does not end in .html"),
        (["--report", "a.html", "--out", "a.html/b"], 2, "--report a.html is where --out a.html/b is to be"),
    ],
    ids=str,
)
def test_what_is_refused(world: World, csulora: Callable[..., Ran], more: list[str], code: int, error: str) -> None:
    ran = csulora("compare", *world.args, *more)
    assert (ran.code, ran.out) == (code, "")
    assert error in ran.error
    assert ran.error.isprintable()
    document = json.loads(csulora("compare", *world.args, *more, "--json").out)
    assert document["exit_code"] == code
    assert error in document["error"]["message"]


def test_names_from_files_are_escaped(
    world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compare_methods(world.settings)
    inputs = {role: replace(record, name=EVIL) for role, record in report.inputs.items()}
    monkeypatch.setattr(comparison, "compare_methods", lambda *_: replace(report, inputs=inputs, out=EVIL))
    out = csulora("compare", *world.args).out
    assert all(line.isprintable() for line in out.splitlines())


def test_the_help_names_every_method() -> None:
    command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
    (option,) = [parameter for parameter in command.params if parameter.name == "methods"]
    names, _, _ = option.help.partition(" Default: ")
    assert re.findall(r"[a-z0-9]+(?:-[a-z]+)*(?=[,.])", names) == list(methods.REGISTRY)
