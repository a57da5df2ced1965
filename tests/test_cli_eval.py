"""`csulora eval` on the real command line."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_TEMPLATE, Ran, make_classifier, make_guard, make_tokenizer

from csulora_cli import evaluation
from csulora_cli.eval_report import SUMMARY_FORMULA, EvalReport
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.scores import Retention, RetentionKind
from csulora_cli.settings import EvalSettings

EVIL = "\x1b[31mevil\x07\u202e\u2028|`<img src=x>`"


@dataclass(frozen=True)
class World:
    """An adapter and another one in the place of its repair, with arguments of an evaluation that takes no time."""

    folder: Path
    adapter: Path
    repaired: Path
    host: Path
    prompts: Path
    task: Path

    @property
    def args(self) -> list[object]:
        return [
            self.adapter, self.repaired, "--base", self.host, "--prompts", self.prompts, "--limit", 2,
            "--answer-tokens", 2, "--device", "cpu",
        ]  # fmt: skip

    def report(self, **changes: Any) -> EvalReport:
        settings = EvalSettings(
            (str(self.adapter), str(self.repaired)),
            str(self.host),
            prompts=self.prompts,
            limit=2,
            answer_tokens=2,
            device="cpu",
        )
        return evaluate_adapters(replace(settings, **changes))


@pytest.fixture
def world(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "give me w1", "response": "w2"}\n' * 3)
    return World(tmp_path, adapters("llama"), adapters("llama", seed=5), hosts("llama"), prompts, task)


def test_tables_for_people(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("eval", *world.args, "--task", world.task)
    assert ran.code == 3  # a random host refuses nothing
    for words in (
        "repaired", "2 harmful, 2 benign ones of no kind", "task.jsonl, 2 examples", "greedy, so without a seed",
        "2 new tokens, 10 for the task", "attack success", "by Qi's list", "by JailbreakBench's", "benign refused",
        "KL to adapter, benign", "task, exact match", "kept, NLL", "summary score", "exact McNemar test",
        "Read with care: the host itself refuses only 0 of 2", "2 of 2 with the adapter",
    ):  # fmt: skip
        assert words in " ".join(ran.out.split()), words
    assert SUMMARY_FORMULA.split(",", maxsplit=1)[0] in ran.out
    assert ran.err.splitlines()[-1] == "hashing the inputs ..."


def test_without_a_task_and_a_repair_the_tables_are_shorter(world: World, csulora: Callable[..., Ran]) -> None:
    out = csulora("eval", world.adapter, *world.args[2:]).out
    assert "kept, by KL" in out
    assert "McNemar" not in out
    assert "task" not in out


def test_general_prompts_have_rows_of_their_own(world: World, csulora: Callable[..., Ran]) -> None:
    out = csulora("eval", world.adapter, "--base", world.host, "--limit", 1, "--answer-tokens", 1).out
    assert "1 harmful, 1 look-alike and 1 general benign ones" in out
    for row in ("look-alikes refused", "general refused", "KL to host, general", "KL to adapter, general"):
        assert f"\n{row} " in out


def test_a_judge_has_its_rows(world: World, csulora: Callable[..., Ran]) -> None:
    judge = make_classifier(world.folder / "guard")
    out = csulora("eval", *world.args, "--judge", judge).out
    assert "text classifier: harmful by the label harmful" in out
    for row in ("  by the judge ", "  judge agrees ", "  Cohen's kappa "):
        assert f"\n{row}" in out
    assert "judge unreadable" not in out


def test_answers_that_a_judge_says_nothing_readable_of_are_counted(world: World, csulora: Callable[..., Ran]) -> None:
    guard = make_guard(world.folder / "guard")
    make_tokenizer(GUARD_TEMPLATE, more_words="fine dreadful").save_pretrained(guard)  # the same ids, other words
    out = csulora("eval", *world.args, "--judge", guard).out
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()}
    assert rows["judge unreadable"] == ["2", "2", "2"]
    assert rows["Cohen's kappa"] == ["n/a"] * 3


@pytest.mark.parametrize("repairs", [1, 2, 3, 6])
def test_every_line_fits_80_columns(
    repairs: int, world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = make_classifier(world.folder / "guard", ("harmless", "harmful" * 20))
    report = world.report(task=world.task, judge=str(judge), judge_label="harmful" * 20)
    *models, repaired = report.models
    keys = [f"repaired {index + 1}" for index in range(repairs)]
    models += [replace(repaired, key=key, name="a-long-name-" * 20) for key in keys]
    inputs = dict(report.inputs) | {key: replace(report.inputs["repaired"], name="a-long-name-" * 20) for key in keys}
    monkeypatch.setattr(evaluation, "evaluate_adapters", lambda *_: replace(report, models=models, inputs=inputs))
    out = csulora("eval", *world.args).out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert all(out.count(key) >= 3 for key in keys)


def test_a_score_that_cannot_be_told_is_not_available(
    world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = world.report()
    unknown = Retention(None, RetentionKind.GENERAL_KL)
    models = [replace(each, score=replace(each.score, retention=unknown)) for each in report.models]
    monkeypatch.setattr(evaluation, "evaluate_adapters", lambda *_: replace(report, models=models))
    out = csulora("eval", *world.args).out
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()}
    assert rows["kept, by KL"] == rows["summary score"] == ["n/a"] * 3


def test_json_is_one_document_and_the_report(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("eval", *world.args, "--json")
    assert json.loads(ran.out) == json.loads(json.dumps(world.report().to_dict()))
    failed = csulora("eval", "./nowhere", "--base", "x", "--json")
    assert json.loads(failed.out)["exit_code"] == failed.code == 4


def test_quiet_prints_nothing_and_saves_all_the_same(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("eval", *world.args, "--quiet", "--save-answers", "answers.jsonl")
    assert (ran.out, ran.err) == ("", "")
    assert len((world.folder / "answers.jsonl").read_text().splitlines()) == 3 * 4
    again = csulora("eval", *world.args, "--quiet", "--save-answers", "answers.jsonl")
    assert (again.code, again.error) == (2, "--save-answers answers.jsonl exists")
    assert csulora("eval", *world.args, "--save-answers", "answers.jsonl", "--overwrite").code == 3


def test_a_report_is_written_too(world: World, csulora: Callable[..., Ran]) -> None:
    args = [*world.args, "--save-answers", "answers.jsonl", "--report", "pages/page.html"]
    ran = csulora("eval", *args)
    assert ran.code == 3, ran.err
    assert ran.out.endswith("\n\nwrote       answers.jsonl\n            pages/page.html\n")
    page = world.folder / "pages" / "page.html"
    first = page.read_bytes()
    assert b"Measured; read with care" in first
    assert [path.name for path in page.parent.iterdir()] == [page.name]
    again = csulora("eval", *world.args, "--report", page)
    assert (again.code, again.error) == (2, f"--report {page} exists")
    assert "measuring" not in again.err
    assert csulora("eval", *world.args, "--report", page, "--overwrite", "-q").code == 3
    assert page.read_bytes() == first


def test_settings_come_from_a_file_and_the_command_line_wins(world: World, csulora: Callable[..., Ran]) -> None:
    config = world.folder / "eval.toml"
    config.write_text(f'[fix]\nstrength = 3\n[eval]\nbase = "{world.host}"\nlimit = 1\ntask = "{world.task}"\n')
    args = [world.adapter, "--prompts", world.prompts, "--config", config, "--json"]
    counts = json.loads(csulora("eval", *args).out)["prompt_counts"]
    assert counts == {"harmful": 1, "lookalikes": 1, "general": 0, "task": 1}
    assert json.loads(csulora("eval", *args, "--limit", 2).out)["prompt_counts"]["harmful"] == 2


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--limit", "0"], 2, "--limit is 0"),
        (["--limit", "some"], 2, "Invalid value for '--limit'"),
        (["--judge-label", "x"], 2, "--judge-label applies with --judge only"),
        (["--task", "nowhere.jsonl"], 4, "nowhere.jsonl is missing"),
        (["--judge", "./nowhere"], 4, "./nowhere is neither a folder nor a Hub id"),
        (["--save-answers", "task.jsonl", "--task", "task.jsonl"], 2, "are the same file"),
        (["--save-answers", "a.html", "--report", "a.html"], 2, "--save-answers and --report are the same file"),
        (["--report", "answers.jsonl"], 2, "--report answers.jsonl does not end in .html"),
        (["--overwrite"], 2, "--overwrite applies with --save-answers or --report only"),
        (["--save-answers", "task.jsonl/answers"], 2, "which is not a folder"),
        (["--device", "gpu"], 2, "--device is gpu"),
        (["--strength", "1"], 2, "No such option"),
    ],
)
def test_failures_say_what_is_wrong_and_leave_nothing(
    args: list[str], code: int, message: str, world: World, csulora: Callable[..., Ran]
) -> None:
    before = sorted(world.folder.rglob("*"))
    ran = csulora("eval", *world.args, *args)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.error
    assert sorted(world.folder.rglob("*")) == before


def test_hostile_names_never_reach_the_terminal_raw(world: World, csulora: Callable[..., Ran]) -> None:
    evil = world.folder / EVIL
    evil.mkdir()
    (evil / "csulora.json").write_text(json.dumps({"inputs": {"prompts": {"name": EVIL, "sha256": {EVIL: EVIL}}}}))
    for file in world.repaired.iterdir():
        (evil / file.name).write_bytes(file.read_bytes())
    task = world.folder / f"{EVIL}.jsonl"
    task.write_text(json.dumps({"prompt": EVIL, "response": EVIL}) + "\n")
    answers = world.folder / f"{EVIL}-answers.jsonl"
    ran = csulora("eval", world.adapter, evil, *world.args[2:], "--task", task, "--save-answers", answers)
    assert ran.code == 3
    assert "evil" in ran.out
    assert "evil" in ran.err
    bad = {char for char in ran.out + ran.err if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"}} - {"\n"}
    assert not bad
    assert "\x1b" not in answers.read_text()
