"""Evaluating adapters on tiny models: what is scored, what never is, and what comes out."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Watcher, make_adapter, make_classifier, make_guard
from scipy.stats import binomtest

from csulora_cli.api import fix_adapter
from csulora_cli.engine.host import Host
from csulora_cli.errors import AdapterError, CsuloraError, HostError, PromptsError, UsageError
from csulora_cli.eval_report import EvalReport, Role
from csulora_cli.evaluation import Provenance, evaluate_adapters, judge_score, provenance_of
from csulora_cli.files import sha256_of
from csulora_cli.formats.dialect import PEFT
from csulora_cli.promptset import PromptSet, load_prompts
from csulora_cli.refusals import RefusalTest
from csulora_cli.scores import RetentionKind
from csulora_cli.settings import EvalSettings, FixSettings
from csulora_cli.stats import Agreement, Count, PairedTest, mcnemar
from csulora_cli.taskset import load_task
from csulora_cli.text import words_of

ANSWER_TOKENS = 6


@dataclass(frozen=True)
class World:
    """A host, an adapter, a repair of it with a prompts file, and a task."""

    settings: EvalSettings
    repaired: Path
    repair: Any
    folder: Path

    def run(self, progress: Watcher | None = None, **changes: Any) -> EvalReport:
        return evaluate_adapters(replace(self.settings, **changes), progress)


def write_task(path: Path) -> Path:
    lines = [{"prompt": f"give me w{index}", "response": f"w{index + 1} w{index + 2}"} for index in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def world(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    folder = tmp_path_factory.mktemp("evaluation")
    adapter, host = str(adapters("llama")), str(hosts("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("csulora_cli.engine.behaviour.ANSWER_TOKENS", ANSWER_TOKENS)
        repair = fix_adapter(
            FixSettings(adapter, host, prompts=prompts, strength=30.0, out=folder / "repaired", device="cpu")
        )
    settings = EvalSettings(
        (adapter, str(folder / "repaired")),
        host,
        prompts=prompts,
        task=write_task(folder / "task.jsonl"),
        answer_tokens=ANSWER_TOKENS,
        device="cpu",
    )
    return World(settings, folder / "repaired", repair, folder)


@pytest.fixture(scope="module")
def report(world: World) -> EvalReport:
    return world.run()


def encoded_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that any host encodes from now on: nothing is run that was not encoded."""
    seen: list[str] = []
    encode = Host.encode

    def watched(self: Host, prompt: str) -> list[int]:
        seen.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(Host, "encode", watched)
    return seen


def used_by_repairs(prompts: PromptSet) -> set[str]:
    splits = (prompts.directions, prompts.tuning)
    return {prompt for split in splits for prompt in (*split.harmful, *split.benign)}


def test_models_come_in_order_with_their_roles(report: EvalReport) -> None:
    assert [(model.key, model.role) for model in report.models] == [
        ("host", Role.HOST), ("adapter", Role.ADAPTER), ("repaired", Role.REPAIRED),
    ]  # fmt: skip
    assert [model.change is None for model in report.models] == [True, True, False]


def test_fix_and_eval_measure_the_same(world: World, report: EvalReport) -> None:
    for model in report.models:
        found = world.repair.behaviour[model.key]
        assert found.harmful_refused == model.score.harmful.strict.refused
        assert found.harmful_answered == model.score.attack_success
        assert found.harmful_incoherent == model.score.harmful.strict.incoherent
        assert found.benign_refused == model.score.over_refusal
        assert found.harmful_kl_to_host == model.score.harmful.kl_to_host
        assert found.benign_kl_to_adapter == model.score.general.kl_to_adapter


def test_the_ends_of_the_scale(report: EvalReport) -> None:
    host, adapter, repaired = (model.score for model in report.models)
    assert host.harmful.kl_to_host == host.general.kl_to_host == adapter.general.kl_to_adapter == 0
    assert 0 < repaired.harmful.kl_to_host < adapter.harmful.kl_to_host
    assert host.task is not None
    assert adapter.task is not None
    assert host.task.exact_match == Count.of(0, 5)
    assert adapter.task.nll > 0


def test_only_the_report_split_is_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = encoded_prompts(monkeypatch)
    world.run(task=None)
    prompts = load_prompts(world.settings.prompts)
    assert set(seen) == {*prompts.report.harmful, *prompts.report.benign}
    assert not set(seen) & used_by_repairs(prompts)


def test_what_gave_directions_or_chose_the_strength_is_not_run_in_any_disguise(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair from built-in prompts, scored on a file whose report split holds some of them, as does the task."""
    built_in = load_prompts()
    repaired = repaired_with(world, "built-in-repair", "built-in", built_in.sha256)
    lines = [
        {"prompt": text, "label": label, "split": split}
        for split in ("directions", "tuning", "report")
        for label in ("harmful", "benign")
        for text in [f"how do i w{index} the {label} in my {split}" for index in range(4)]
    ]
    stolen = [
        *built_in.directions.harmful[:2],
        built_in.tuning.harmful[0].upper(),
        " how do i w2 the Harmful in my tuning?",
    ]
    lines += [{"prompt": text, "label": "harmful", "split": "report"} for text in stolen]
    lines += [{"prompt": built_in.tuning.benign[0], "label": "benign", "split": "report"}]
    prompts = world.folder / "stolen.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = world.folder / "stolen-task.jsonl"
    task.write_text(
        "".join(
            json.dumps({"prompt": text, "response": "w1"}) + "\n"
            for text in (built_in.directions.benign[0], "How do I w1 the harmful in my tuning??", "a new one")
        )
    )
    seen, progress = encoded_prompts(monkeypatch), Watcher()
    report = world.run(progress, adapters=(world.settings.adapters[0], str(repaired)), prompts=prompts, task=task)
    used = used_by_repairs(built_in) | used_by_repairs(load_prompts(prompts))
    assert not set(map(words_of, seen)) & set(map(words_of, used))
    assert report.prompt_counts == {"harmful": 4, "lookalikes": 4, "general": 0, "task": 1}
    assert len([line for line in progress.warnings if "are not scored: they gave directions" in line]) == 1


def test_changes_of_the_task_are_paired(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [example.response for example in load_task(world.settings.task or Path()).examples]
    wrong = "w9"
    script = iter(
        [[wrong] * 5, [*right[:3], wrong, wrong], [right[0], wrong, wrong, right[3], wrong]]
    )  # of host, adapter and repaired
    monkeypatch.setattr(Host, "answers", lambda *_: next(script))
    change = world.run().models[2].change
    assert change is not None
    assert change.task == PairedTest(2, 1, mcnemar(2, 1))


def test_nothing_left_to_score_is_an_error(world: World) -> None:
    task = world.folder / "used-task.jsonl"
    task.write_text(json.dumps({"prompt": load_prompts(world.settings.prompts).tuning.benign[0], "response": "w1"}))
    with pytest.raises(PromptsError, match="no prompts are left"):
        world.run(task=task)


def repaired_with(world: World, name: str, prompts: str, sha256: str) -> Path:
    """A copy of the repair whose record says that it was made with other prompts."""
    folder = world.folder / name
    folder.mkdir(exist_ok=True)
    for file in world.repaired.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    record = json.loads((folder / "csulora.json").read_text())
    record["inputs"]["prompts"] = {"name": prompts, "commit": None, "sha256": {prompts: sha256}}
    (folder / "csulora.json").write_text(json.dumps(record))
    return folder


def warnings_of(world: World, **changes: Any) -> list[str]:
    progress = Watcher()
    report = world.run(progress, limit=1, **changes)
    assert list(report.warnings) == progress.warnings
    return progress.warnings


def test_a_repair_with_the_same_prompts_is_no_reason_to_warn(world: World) -> None:
    assert warnings_of(world) == []


def test_a_repair_with_unknown_prompts_is_warned_of(world: World) -> None:
    repaired = repaired_with(world, "unknown-repair", "my\x1bprompts.jsonl", "0" * 64)
    (warning,) = warnings_of(world, adapters=(world.settings.adapters[0], str(repaired)))
    assert "unknown-repair was repaired with other prompts (my\\x1bprompts.jsonl)" in warning


@pytest.mark.parametrize(
    ("record", "want"),
    [
        (None, Provenance()),
        ("{}", Provenance()),
        ('{"inputs": {"adapter": {}}}', Provenance()),
        ('{"inputs": {"prompts": {"name": "p", "sha256": {"p": "abc"}}}}', Provenance("p", "abc")),
        ('{"inputs": {"prompts": null}}', Provenance()),
        ('{"inputs": {"prompts": {"name": "p", "sha256": {"p": ["x"]}}}}', Provenance("p", "['x']")),
        (
            '{"method": "lssf", "inputs": {"prompts": {"name": "p", "sha256": {"p": "abc"}}, '
            '"task": {"name": "t", "sha256": {"t": "def"}}}}',
            Provenance("p", "abc", "def", is_winner=True),
        ),
        ('{"inputs": {"prompts": {"name": "p", "sha256": {}}}}', Provenance("unknown")),
        ('{"inputs": {"prompts": 3}}', Provenance("unknown")),
        ('{"inputs": []}', Provenance("unknown")),
        ("[]", Provenance("unknown")),
        ("{", Provenance("unknown")),
    ],
)
def test_where_an_adapter_comes_from(tmp_path: Path, record: str | None, want: Provenance) -> None:
    if record is not None:
        (tmp_path / "csulora.json").write_text(record)
    assert provenance_of(tmp_path) == want


def test_a_limit_and_its_counts(world: World) -> None:
    report = world.run(limit=2)
    assert report.prompt_counts == {"harmful": 2, "lookalikes": 2, "general": 0, "task": 2}
    assert report.models[0].score.attack_success.total == 2


def test_built_in_prompts_tell_general_ones_from_lookalikes(world: World) -> None:
    report = world.run(prompts=None, limit=3, task=None)
    assert report.prompt_counts == {"harmful": 3, "lookalikes": 3, "general": 3, "task": 0}
    assert report.models[2].score.retention.kind is RetentionKind.GENERAL_KL


def test_one_adapter_alone_and_many(world: World) -> None:
    alone = world.run(adapters=world.settings.adapters[:1], limit=1)
    assert [model.key for model in alone.models] == ["host", "adapter"]
    copies = [str(repaired_with(world, name, "x", "1" * 64)) for name in ("one", "two")]
    many = world.run(adapters=(*world.settings.adapters, *copies), limit=1)
    assert [(model.key, model.name) for model in many.models[2:]] == [
        ("repaired 1", "repaired"), ("repaired 2", "one"), ("repaired 3", "two"),
    ]  # fmt: skip
    assert many.models[2].score == many.models[4].score
    assert set(many.inputs) == {"host", "adapter", "repaired 1", "repaired 2", "repaired 3", "prompts", "task"}


def test_inputs_and_settings_are_recorded(world: World, report: EvalReport) -> None:
    assert report.inputs["repaired"].sha256[PEFT.weights_name] == sha256_of(world.repaired / PEFT.weights_name)
    assert report.inputs["host"].sha256["model.safetensors"]
    for key, path in (("prompts", world.settings.prompts), ("task", world.settings.task)):
        assert path is not None
        assert report.inputs[key].sha256 == {path.name: sha256_of(path)}
    assert report.settings == {
        "decoding": "greedy", "seed": None, "answer_tokens": ANSWER_TOKENS, "task_tokens": 3 + 8, "limit": None,
        "judge": None, "device": "cpu", "dtype": "float32", "chat_template": True,
    }  # fmt: skip


def test_two_runs_give_the_same_report(world: World, report: EvalReport) -> None:
    assert world.run().to_dict() == report.to_dict()


def test_the_report_is_plain_json(report: EvalReport) -> None:
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema_version"] == 1
    assert list(document["models"][0]["score"]["harmful"]["answers"]) == ["strict", "qi", "jailbreakbench"]
    assert [entry["score"]["summary"] is None for entry in document["models"]] == [
        model.score.summary is None for model in report.models
    ]
    assert document["exit_code"] == report.exit_code == 3  # a random host refuses nothing
    assert "the host itself refuses only 0 of" in document["failed_gates"][0]


def test_progress_is_as_announced(world: World) -> None:
    progress = Watcher()
    world.run(progress, limit=2)
    assert [name for name, _ in progress.stages] == "adapter models host measure report".split()
    assert progress.steps == dict(progress.stages)["measure"] == 3 * (2 + 2 + 2)


# Changes


def script_answers(
    monkeypatch: pytest.MonkeyPatch, harmful: Sequence[Sequence[str]], benign: Sequence[Sequence[str]]
) -> None:
    """Let host, adapter and repaired, which run in this order, give these answers."""
    script = iter([[*first, *second] for first, second in zip(harmful, benign, strict=True)])
    run = Host.first_and_answers
    monkeypatch.setattr(Host, "first_and_answers", lambda *args: (run(*args)[0], next(script)))


def test_changes_are_paired_prompt_by_prompt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    no, yes = "I can't help with that.", "Take a ladder."
    script_answers(
        monkeypatch,
        harmful=([no, no, no, no], [yes, yes, yes, no], [no, no, yes, yes]),
        benign=([yes, yes, yes, yes], [yes, yes, yes, yes], [no, yes, yes, ""]),
    )
    report = world.run(task=None)
    _, adapter, repaired = report.models
    assert adapter.score.attack_success == Count.of(3, 4)
    assert repaired.score.attack_success == Count.of(2, 4)
    assert repaired.score.over_refusal == Count.of(1, 4)
    assert repaired.change is not None
    attack = repaired.change.attack_success[RefusalTest.STRICT]
    assert (attack.only_first, attack.only_second, attack.p_value) == (2, 1, binomtest(2, 3, 0.5).pvalue)
    refusal = repaired.change.over_refusal[RefusalTest.STRICT]
    assert (refusal.only_first, refusal.only_second, refusal.p_value) == (0, 1, 1.0)
    assert report.exit_code == 0


# The judge


def test_judge_scores_by_hand() -> None:
    answers = ["Take a ladder.", "Take two.", "I can't help.", "I won't, but take w9.", "Take three.", "..."]
    score = judge_score(answers, [True, False, False, True, None, None])
    assert score.harmful == Count.of(2, 6)
    assert score.unread == 1
    assert score.agreement == Agreement.of([True, True, False, False], [True, False, False, True])
    assert score.agreement.same == Count.of(2, 4)
    assert score.agreement.kappa == 0.0


@pytest.mark.parametrize("make", [make_classifier, make_guard])
def test_a_judge_reads_the_coherent_answers_of_every_model(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    judge = make(tmp_path / "judge")
    harmful = (["w1 w9", "w2 w3", "", "w9 w8"], ["w9", "w9", "w9", "w9"], ["w9", "w8", "w7", "..."])
    script_answers(monkeypatch, harmful, benign=[["w1"] * 4] * 3)
    progress, saved = Watcher(), tmp_path / "answers.jsonl"
    report = world.run(progress, task=None, judge=str(judge), save_answers=saved)
    found = [model.judge for model in report.models]
    assert [each and each.harmful for each in found] == [Count.of(1, 4), Count.of(4, 4), Count.of(1, 4)]
    assert [each and each.unread for each in found] == [0, 0, 0]
    assert found[2]
    assert found[2].agreement == Agreement.of([True] * 3, [True, False, False])
    assert report.inputs["judge"].name == "judge"
    assert dict(progress.stages)["judging"] == 3 + 4 + 3
    verdicts = [line["is_harmful_to_judge"] for line in lines_of(saved) if line["kind"] == "harmful"]
    assert verdicts == [True, False, None, False, *[True] * 4, True, False, False, None]


def test_a_wrong_judge_is_noticed_before_anything_is_run(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = encoded_prompts(monkeypatch)
    with pytest.raises(UsageError, match="no label nice"):
        world.run(judge=str(make_classifier(tmp_path)), judge_label="nice")
    assert seen == []


# Saved answers


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_every_answer_is_saved_with_its_verdicts(world: World, report: EvalReport, tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    assert world.run(save_answers=path).answers_file == str(path)
    lines = lines_of(path)
    assert len(lines) == 3 * (4 + 4 + 5)
    for model in report.models:
        harmful = [line for line in lines if line["model"] == model.key and line["kind"] == "harmful"]
        assert [line["prompt"] for line in harmful] == list(load_prompts(world.settings.prompts).report.harmful)
        for test, counts in model.score.harmful.answers.items():
            assert sum(line["verdicts"][test] == "answer" for line in harmful) == counts.answered.count
        task = [line for line in lines if line["model"] == model.key and line["kind"] == "task"]
        assert model.score.task is not None
        assert sum(line["is_right"] for line in task) == model.score.task.exact_match.count
    assert [entry.name for entry in path.parent.iterdir()] == ["answers.jsonl"]


def test_an_earlier_file_of_answers_is_replaced_only_when_told(world: World, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    world.run(save_answers=path, limit=1)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        world.run(save_answers=path)
    assert path.read_bytes() == before
    world.run(save_answers=path, limit=2, overwrite=True)
    assert len(lines_of(path)) == 2 * before.count(b"\n")


def test_a_file_that_is_no_file_of_answers_is_never_replaced(world: World, tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    with pytest.raises(UsageError, match="which csulora did not write"):
        world.run(save_answers=path, overwrite=True)
    with pytest.raises(UsageError, match="--save-answers and --task are the same file"):
        world.run(save_answers=world.settings.task, overwrite=True)
    assert path.read_text() == "years of work"


def test_a_run_that_fails_leaves_no_answers(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def one_line(*_: object) -> Iterator[dict[str, Any]]:
        yield {"model": "host"}
        raise ZeroDivisionError

    monkeypatch.setattr("csulora_cli.evaluation._Evaluation._lines", one_line)
    with pytest.raises(ZeroDivisionError):
        world.run(save_answers=tmp_path / "answers.jsonl", limit=1)
    assert list(tmp_path.iterdir()) == []


# What cannot be evaluated


def test_an_adapter_of_another_host_is_refused(world: World, hosts: Callable[..., Path], tmp_path: Path) -> None:
    other = make_adapter(hosts("gpt2"), tmp_path / "other")
    with pytest.raises(HostError, match="adapted modules are not in the host"):
        world.run(adapters=(*world.settings.adapters, str(other)))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"task": Path("nowhere.jsonl")}, PromptsError),
        ({"prompts": Path("nowhere.jsonl")}, PromptsError),
        ({"judge": "./nowhere"}, CsuloraError),
    ],
)
def test_files_that_are_not_there(world: World, changes: dict[str, Any], error: type[CsuloraError]) -> None:
    with pytest.raises(error, match="nowhere"):
        world.run(**changes)


def test_a_broken_adapter_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is missing"):
        world.run(adapters=(world.settings.adapters[0], str(tmp_path)))


def test_a_task_that_is_too_long_to_generate_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csulora_cli.engine.scoring.MAX_TASK_TOKENS", 2)
    monkeypatch.setattr("csulora_cli.evaluation.MAX_TASK_TOKENS", 2)
    (warning,) = warnings_of(world)
    assert "the longest response has 3 tokens; only 2 are generated" in warning
