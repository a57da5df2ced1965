"""`compare_methods` on tiny models: what is computed from which prompts, and that its points are what they say."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from conftest import make_adapter, with_kinds

from csulora_cli import comparison
from csulora_cli.adapter import read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.compare_report import CompareReport, Origin, Point
from csulora_cli.comparison import compare_methods
from csulora_cli.engine.inputs import DirectionPrompts, Encoded
from csulora_cli.engine.prompts_source import PromptsPath
from csulora_cli.engine.scoring import EncodedScoring
from csulora_cli.errors import HostError, PromptsError, UsageError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.files import sha256_of
from csulora_cli.methods import REGISTRY
from csulora_cli.promptset import load_prompts
from csulora_cli.settings import CompareSettings, EvalSettings, FixSettings, Geometry

Make = Callable[..., CompareSettings]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    lines = [{"prompt": f"give me w{index} with the w{index + 1}", "response": f"w{index}"} for index in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make(hosts: Callable[..., Path], adapters: Callable[..., Path], prompts: Path) -> Make:
    """Settings of a small comparison."""

    def settings(kind: str = "llama", **changes: Any) -> CompareSettings:
        options: dict[str, Any] = {
            "adapter": str(adapters(kind)), "base": str(hosts(kind)), "unaligned": str(hosts(kind, seed=7)),
            "prompts": prompts, "points": 2, "answer_tokens": 2, "device": "cpu",
        }  # fmt: skip
        return CompareSettings(**{**options, **changes})

    return settings


def of(report: CompareReport, method: str) -> list[Point]:
    return [point for point in report.points if point.method == method]


def test_every_method_is_scored_at_its_strengths(make: Make, task: Path, prompts: Path, tmp_path: Path) -> None:
    report = compare_methods(make(task=task, prompts=with_kinds(prompts, tmp_path / "kinds.jsonl")))
    assert [method.name for method in report.methods] == list(REGISTRY)
    modules = len(read_adapter(Path(make().adapter)).sites)
    for name, method in REGISTRY.items():
        points = of(report, name)
        assert {point.strength for point in points} >= set(method.strengths(2, modules))
        assert [point.strength for point in points] == sorted(point.strength for point in points)
        assert sum(point.origin is Origin.AUTO for point in points) == int(method.has_auto)
        assert {point.family for point in points} == {method.family}
    assert report.prompt_counts == {
        "directions": 16, "tuning": 8, "harmful": 4, "lookalikes": 2, "general": 2, "task": 5,
    }  # fmt: skip
    assert all(point.score.attack_success.total == 4 and len(point.task_right) == 5 for point in report.points)
    ranks = {point.method: point.rank for point in report.points}
    assert ranks["prompts"] == ranks["keep-in"] == ranks["safelora-number"] == 4
    assert ranks["lssf"] > 4
    assert ranks["resta"] > 4
    json.dumps(report.to_dict(), allow_nan=False)


def test_without_the_unaligned_model_the_others_are_left_out(make: Make) -> None:
    report = compare_methods(make(unaligned=None, points=1))
    assert [method.name for method in report.methods] == ["prompts", "s3lora", "shrink", "rotated", "benign"]
    assert report.left_out["keep-out"] == "needs the unaligned checkpoint"
    assert {*report.left_out, *(method.name for method in report.methods)} == set(REGISTRY)
    assert "unaligned" not in report.inputs


def test_conv1d_hosts_are_compared_too(make: Make) -> None:
    report = compare_methods(make("gpt2", methods="keep-out,safelora-threshold,lssf", points=1))
    assert {point.method for point in report.points} == {"keep-out", "safelora-threshold", "lssf"}


def test_methods_that_a_convolution_with_groups_has_no_place_for_are_left_out(
    make: Make, hosts: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = str(make_adapter(hosts("convolution"), tmp_path / "adapter", target_modules=["grouped", "out"]))
    report = compare_methods(make("convolution", adapter=adapter, points=1))
    run = {method.name for method in report.methods}
    assert run == {
        "prompts", "keep-out", "keep-out-protect", "safelora-threshold", "safelora-number", "s3lora",
        "shrink", "random-keep-out", "rotated", "benign",
    }  # fmt: skip
    assert {point.method for point in report.points} == run
    assert set(report.left_out) == REGISTRY.keys() - run
    assert report.to_dict()["left_out"]["lssf"].startswith("makes a lora_B")
    with pytest.raises(UsageError, match="the method lssf makes a lora_B"):
        compare_methods(make("convolution", adapter=adapter, methods="prompts,lssf"))


# The split


def test_each_kind_of_prompts_is_used_for_one_thing_only(
    make: Make, task: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave: list[list[int]] = []
    chose: list[list[int]] = []
    scored: list[list[int]] = []

    class Spy(PromptsPath):
        def __init__(self, host: Any, modules: Any, directions: DirectionPrompts, *rest: Any, **options: Any) -> None:
            for side in (directions.faded, directions.benign):
                gave.extend(ids[:end] for ids, end in zip(side.tokens, side.ends, strict=True))
            super().__init__(host, modules, directions, *rest, **options)

    class Judge(comparison.KlJudge):
        def __init__(self, host: Any, tuning: Encoded, adapter: Any) -> None:
            chose.extend([*tuning.harmful, *tuning.benign])
            super().__init__(host, tuning, adapter)

    run_model = comparison.run_model
    hosts = []

    def run(host: Any, encoded: EncodedScoring, *rest: Any) -> Any:
        hosts.append(host)
        assert encoded.task is not None
        scored.extend([*encoded.harmful, *encoded.lookalikes, *encoded.general, *encoded.task.prompts])
        return run_model(host, encoded, *rest)

    monkeypatch.setattr(comparison, "PromptsPath", Spy)
    monkeypatch.setattr(comparison, "KlJudge", Judge)
    monkeypatch.setattr(comparison, "run_model", run)
    report = compare_methods(make(task=task))
    assert 2 < len(hosts) <= len(report.points) + 2  # equal repairs are run once
    given = load_prompts(prompts)
    for seen, split in ((gave, given.directions), (chose, given.tuning)):
        want = {tuple(hosts[0].encode(text)) for text in (*split.harmful, *split.benign)}
        assert {tuple(ids) for ids in seen} == want
        assert not want & {tuple(ids) for ids in scored}
    assert {tuple(hosts[0].encode(text)) for text in given.report.harmful} <= {tuple(ids) for ids in scored}


def test_other_report_prompts_change_no_repair_and_no_strength(make: Make, tmp_path: Path) -> None:
    reports = []
    for name, word in (("one", "tell"), ("two", "write")):
        lines = []
        for split, start in (("directions", 0), ("tuning", 20), ("report", 40)):
            for index in range(start, start + 5):
                verb = word if split == "report" else "make"
                for label, with_ in (("harmful", "without"), ("benign", "with")):
                    text = f"can you {verb} w{index % 30} {with_} w{index % 7}"
                    lines.append(json.dumps({"prompt": text, "label": label, "split": split}))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        reports.append(compare_methods(make(prompts=path, points=1)))
    first, second = reports
    assert [method.auto for method in first.methods] == [method.auto for method in second.methods]
    assert [(p.method, p.strength, p.moved) for p in first.points] == [
        (p.method, p.strength, p.moved) for p in second.points
    ]
    assert [p.score.harmful.kl_to_host for p in first.points] != [p.score.harmful.kl_to_host for p in second.points]


def test_task_prompts_that_gave_directions_are_not_scored(make: Make, prompts: Path, tmp_path: Path) -> None:
    given = load_prompts(prompts)
    path = tmp_path / "overlap.jsonl"
    used = [given.directions.benign[0], given.tuning.harmful[0]]
    lines = [{"prompt": prompt, "response": "w1"} for prompt in [*used, "give me w9"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = compare_methods(make(task=path, methods="shrink", points=1))
    assert report.prompt_counts["task"] == 1
    assert "2 prompts are not scored" in report.warnings[0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(PromptsError, match="no prompts are left"):
        compare_methods(make(task=path, methods="shrink"))


def test_report_prompts_that_gave_directions_are_not_scored(make: Make, prompts: Path, tmp_path: Path) -> None:
    given = load_prompts(prompts)
    rows = [
        {"prompt": prompt, "label": label, "split": split}
        for split in ("directions", "tuning", "report")
        for label in ("harmful", "benign")
        for prompt in getattr(getattr(given, split), label)
    ]
    again = [{**row, "split": "report", "prompt": f"{row['prompt'].upper()}!"} for row in rows[:3]]
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    report = compare_methods(make(prompts=path, methods="shrink", points=1))
    assert report.prompt_counts["harmful"] == len(given.report.harmful)
    assert "3 prompts are not scored" in report.warnings[0]
    kept = [row for row in rows if (row["split"], row["label"]) != ("report", "harmful")]
    again = [{**row, "split": "report", "prompt": f"{row['prompt'].upper()}!"} for row in rows[:4]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *again]))
    with pytest.raises(PromptsError, match="no prompts are left"):
        compare_methods(make(prompts=path, methods="shrink", points=1))


def test_a_limit_shortens_what_is_scored_only(make: Make, task: Path) -> None:
    report = compare_methods(make(task=task, methods="shrink", points=1, limit=3))
    assert report.prompt_counts == {
        "directions": 16, "tuning": 8, "harmful": 3, "lookalikes": 3, "general": 0, "task": 3,
    }  # fmt: skip


# What the points are


@pytest.mark.parametrize("geometry", [None, *Geometry])
def test_automatic_strengths_are_those_of_fix(make: Make, tmp_path: Path, geometry: Geometry | None) -> None:
    name = geometry or "prompts"
    settings = make(methods=f"{name}", points=1)
    wanted = FixSettings(
        adapter=settings.adapter,
        base=settings.base,
        unaligned=settings.unaligned if geometry else None,
        geometry=geometry,
        prompts=settings.prompts,
        strength="auto",
        device="cpu",
        out=tmp_path / "fixed",
    )
    fixed = fix_adapter(wanted)
    report = compare_methods(settings)
    auto = report.methods[0].auto
    assert auto is not None
    # `fix` shows what each λ costs on benign prompts, the comparison only what the chosen one does.
    chosen = fixed.strength.value
    path = [place if place.strength == chosen else replace(place, benign_kl=None) for place in fixed.strength.path]
    assert auto == replace(fixed.strength, path=tuple(path))
    (point,) = [point for point in report.points if point.origin is Origin.AUTO]
    assert point.strength == fixed.strength.value
    assert point.moved == pytest.approx(fixed.moved, rel=1e-9)
    behaviour = fixed.behaviour["repaired"]
    assert point.score.harmful.kl_to_host == pytest.approx(behaviour.harmful_kl_to_host, rel=1e-6)


def test_written_winners_score_as_their_points_did(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "winners"
    settings = make(out=out, methods="prompts,lssf,shrink")
    report = compare_methods(settings)
    winners = {place for level in report.levels for place in level.winners}
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) == len(winners) > 0
    assert not any(report.points[place].is_dominated for place in winners)
    assert any(point.is_dominated for point in report.points)
    for folder in folders:
        record = json.loads((folder / "csulora.json").read_text())
        (point,) = [p for p in report.points if p.method == record["method"] and p.strength == record["strength"]]
        (folder / "csulora.json").unlink()  # it says on what the winner was chosen
        again = evaluate_adapters(scoring_of(settings, folder))
        assert again.warnings == ()
        assert again.models[2].score == point.score
    document = json.loads((out / "csulora.json").read_text())
    assert document["points"] == report.to_dict()["points"]
    assert "out" not in document
    with pytest.raises(UsageError, match="exists and is not empty"):
        compare_methods(settings)
    compare_methods(replace(settings, overwrite=True))


def scoring_of(settings: CompareSettings, folder: Path, **changes: Any) -> EvalSettings:
    """Settings that score a winner as the comparison did."""
    made = EvalSettings((settings.adapter, str(folder)), settings.base, settings.prompts, answer_tokens=2, device="cpu")
    return replace(made, **changes)


def test_winners_are_not_scored_on_what_chose_them(make: Make, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "winners"
    settings = make(out=out, methods="prompts,lssf,shrink")
    compare_methods(settings)
    (winner, *_) = (path for path in out.iterdir() if path.is_dir())
    with pytest.raises(PromptsError, match="no prompts are left"):
        evaluate_adapters(scoring_of(settings, winner))
    unused: dict[str, Any] = {"prompts": None, "task": task, "limit": 2}
    report = evaluate_adapters(scoring_of(settings, winner, **unused))
    assert [warning for warning in report.warnings if "was repaired with other prompts" in warning]
    assert report.models[2].score.attack_success.total == 2
    record = json.loads((winner / "csulora.json").read_text())
    record["inputs"]["task"] = {"name": "my task", "commit": None, "sha256": {"my task": sha256_of(task)}}
    (winner / "csulora.json").write_text(json.dumps(record))
    with pytest.raises(PromptsError, match="no prompts are left"):
        evaluate_adapters(scoring_of(settings, winner, **unused))


def test_the_control_of_equal_norm_is_as_large_as_the_first_own_repair(make: Make) -> None:
    report = compare_methods(make(methods="prompts,shrink", points=1))
    (own,) = [point for point in of(report, "prompts") if point.origin is Origin.AUTO]
    (control,) = [point for point in of(report, "shrink") if point.origin is Origin.NORM]
    factor = 1 / (1 + control.strength)
    assert control.moved == pytest.approx((1 - factor) ** 2, rel=1e-5)
    assert own.moved != pytest.approx(control.moved, rel=1e-2)
    alone = compare_methods(make(methods="shrink", points=1))
    assert all(point.origin is not Origin.NORM for point in alone.points)


def test_safelora_goes_by_names_on_a_host_with_biases_an_adapter_of_one_layer_and_ranks_of_their_own(
    make: Make, hosts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code matches matrices by position, takes biases for weights, and knows a factor by one rank."""
    host, unaligned = hosts("qwen2"), hosts("qwen2", change=0.3)
    adapter = make_adapter(
        host,
        tmp_path / "my-adapter",
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        layers_to_transform=[1],
        rank_pattern={"k_proj": 2, "down_proj": 6},
    )
    biases = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (host, unaligned)]
    own = "model.layers.1.self_attn.q_proj.bias"
    assert not torch.equal(biases[0][own], biases[1][own])
    modules = oracle.peft_modules(host, adapter)
    assert {name: len(dense.lora_a) for name, dense in modules.items()} == {
        "model.layers.1.self_attn.q_proj": 4, "model.layers.1.self_attn.k_proj": 2,
        "model.layers.1.self_attn.v_proj": 4, "model.layers.1.mlp.down_proj": 6,
    }  # fmt: skip
    updates = {name: dense.update for name, dense in modules.items()}
    aligned, before = oracle.weights(host, modules), oracle.weights(unaligned, modules)
    projected, cosines = {}, {}
    for name, update in updates.items():
        displacement = aligned[name] - before[name]
        projected[name] = displacement @ displacement.mT / displacement.norm() @ update
        cosines[name] = float((projected[name] * update).sum() / projected[name].norm() / update.norm())

    repaired: dict[tuple[str, float], dict[str, comparison.Factors]] = {}
    for method in ("safelora-threshold", "safelora-number"):
        repair = REGISTRY[method].repair  # type: ignore[attr-defined]

        def keep(sites: Any, seen: Any, value: float, method: str = method, repair: Any = repair) -> Any:
            repaired[method, value] = repair(sites, seen, value)
            return repaired[method, value]

        monkeypatch.setitem(REGISTRY, method, replace(REGISTRY[method], repair=keep))  # type: ignore[call-arg]
    names = "safelora-threshold,safelora-number"
    report = compare_methods(make("qwen2", adapter=str(adapter), unaligned=str(unaligned), methods=names, points=2))
    assert {(point.method, point.strength) for point in report.points} == repaired.keys()

    in_order, counts = sorted(cosines, key=lambda name: cosines[name]), []
    for point in report.points:
        value = point.strength
        below = [name for name in in_order if cosines[name] <= value]
        chosen = below if point.method == "safelora-threshold" else in_order[: int(value)]
        counts.append(len(chosen))
        wanted = {name: projected[name] if name in chosen else update for name, update in updates.items()}
        factors = repaired[point.method, value]
        assert factors.keys() == wanted.keys()
        for name, found in factors.items():
            dense = found.scale * found.lora_b.double() @ found.lora_a.double()
            assert oracle.relative_gap(dense, wanted[name]) < 1e-5, (point.method, value, name)
        moved = sum(float((wanted[name] - update).square().sum()) for name, update in updates.items())
        energy = sum(float(update.square().sum()) for update in updates.values())
        assert point.moved == pytest.approx(moved / energy, rel=1e-5)
    assert counts == [0, 4, 2, 4]


def test_solving_in_chunks_gives_the_same_points(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make(methods="prompts,keep-out-protect,rotated,benign", points=2)
    whole = compare_methods(settings)
    monkeypatch.setattr(comparison, "PromptsPath", partial(PromptsPath, budget_bytes=20_000))
    pieces = compare_methods(settings)
    assert [method.auto for method in pieces.methods] == [method.auto for method in whole.methods]
    assert pieces.points == whole.points


def directions_seen(monkeypatch: pytest.MonkeyPatch) -> list[DirectionPrompts]:
    """What every `PromptsPath` of a comparison is given, in order."""
    seen: list[DirectionPrompts] = []

    class Spy(PromptsPath):
        def __init__(self, host: Any, modules: Any, directions: DirectionPrompts, *rest: Any, **options: Any) -> None:
            seen.append(directions)
            super().__init__(host, modules, directions, *rest, **options)

    monkeypatch.setattr(comparison, "PromptsPath", Spy)
    return seen


def test_controls_fade_on_other_prompts_and_protect_the_same_answers(
    make: Make, prompts: Path, tmp_path: Path, hosts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = with_kinds(prompts, tmp_path / "kinds.jsonl")
    seen = directions_seen(monkeypatch)
    compare_methods(make(methods="prompts,harmful,benign", points=1, prompts=file))
    given = load_prompts(file).directions
    faded = [[tuple(ids) for ids in each.faded.tokens] for each in seen]
    want = [oracle.prompt_ids(hosts("llama"), texts) for texts in (given.lookalikes, given.harmful, given.general)]
    assert faded == want
    own, *controls = seen
    protected = [tuple(ids[:end]) for ids, end in zip(own.benign.tokens, own.benign.ends, strict=True)]
    assert protected == [*want[2], *want[0]]
    assert own.benign.replies == len(want[0])  # how look-alikes ask is not protected, the answers to them are
    assert max(map(len, own.benign.tokens)) > max(map(len, protected))  # there are answers, on which no control fades
    assert all(control.benign == own.benign for control in controls)


def test_a_control_that_would_fade_on_the_same_prompts_is_left_out(make: Make) -> None:
    report = compare_methods(make(unaligned=None, points=1))
    assert report.left_out["harmful"] == "fades on the same prompts as prompts does"
    with pytest.raises(UsageError, match="the method harmful fades on the same prompts as prompts does"):
        compare_methods(make(methods="prompts,harmful"))


@pytest.mark.parametrize("budget", [20_000, 10**9])
def test_an_adapter_that_never_moved_the_host_is_left_as_it_is(
    budget: int, make: Make, tmp_path: Path, hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(hosts("llama"), tmp_path / "still", seed=3)
    tensors = adapter / "adapter_model.safetensors"
    loaded = safetensors.torch.load_file(tensors)
    safetensors.torch.save_file({key: 1e-3 * tensor for key, tensor in loaded.items()}, tensors)
    monkeypatch.setattr(comparison, "PromptsPath", partial(PromptsPath, budget_bytes=budget))
    names = ["prompts", "keep-out-protect", "shrink", "rotated", "benign"]
    report = compare_methods(make(adapter=str(adapter), methods=",".join(names), points=1))
    for name in names:
        (point,) = [point for point in of(report, name) if point.origin is Origin.AUTO]
        assert (point.strength, point.moved) == (0.0, 0.0)
    assert report.adapter.retention.value is None  # nothing was gained over the host


# What is refused


def test_unknown_methods_and_missing_inputs_are_refused_early(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names nonsense") as caught:
        compare_methods(make(methods="prompts,nonsense"))
    assert "safelora-number" in caught.value.hint
    with pytest.raises(UsageError, match="needs the unaligned"):
        compare_methods(make(methods="lssf", unaligned=None))
    with pytest.raises(UsageError, match="names no method"):
        compare_methods(make(methods=" , "))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        compare_methods(make(out=taken))
    with pytest.raises(UsageError, match="holds no adapter"):
        compare_methods(make(out=taken, overwrite=True))
    assert (taken / "file").read_text() == "mine"


def test_the_host_as_the_unaligned_model_is_refused(make: Make, hosts: Callable[..., Path]) -> None:
    with pytest.raises(HostError, match="are the same"):
        compare_methods(make(unaligned=str(hosts("llama")), methods="keep-out"))


def test_two_runs_give_the_same(make: Make) -> None:
    settings = make(points=1, methods="prompts,random-keep-in,rotated,lssf")
    assert compare_methods(settings).to_dict() == compare_methods(settings).to_dict()


def test_values_that_do_not_fit_the_dtype_stop_with_the_method_named(
    make: Make, adapters: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = adapters("llama", dtype=torch.float16)
    huge = replace(REGISTRY["shrink"], repair=lambda modules, strength: {  # type: ignore[call-arg]
        module.name: comparison.Factors(1e9 * module.lora_a.float(), module.lora_b, module.scale) for module in modules
    })  # fmt: skip
    monkeypatch.setitem(REGISTRY, "shrink", huge)
    with pytest.raises(comparison.AdapterError, match="what shrink makes"):
        compare_methods(make(adapter=str(half), methods="shrink", points=1))


# What is not measured twice


def test_a_run_that_was_stopped_goes_on_where_it_stopped(
    make: Make, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make(task=task, methods="prompts,keep-out,shrink", points=1)
    want = compare_methods(settings).to_dict()
    journal, run_model, runs = tmp_path / "journal", comparison.run_model, []

    def run(*arguments: Any) -> Any:
        runs.append(arguments)
        if len(runs) == 5:
            raise KeyboardInterrupt
        return run_model(*arguments)

    monkeypatch.setattr(comparison, "run_model", run)
    with pytest.raises(KeyboardInterrupt):
        compare_methods(settings, journal=journal)
    points = len(want["points"])
    monkeypatch.setattr(comparison, "find_strength", None)  # all strengths are known
    assert compare_methods(settings, journal=journal).to_dict() == want
    assert len(runs) <= 5 + 2 + points - 2
    done = len(runs)
    assert compare_methods(settings, journal=journal).to_dict() == want
    assert len(runs) == done + 2  # the host and the adapter, which all are compared with


def test_a_journal_of_other_settings_is_not_used(make: Make, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    first = make(methods="shrink", points=1)
    compare_methods(first, journal=journal)
    size = journal.stat().st_size
    second = replace(first, answer_tokens=3)
    assert compare_methods(second, journal=journal).to_dict() == compare_methods(second).to_dict()
    assert journal.stat().st_size > 1.9 * size


def test_a_repair_that_is_another_one_or_the_adapter_itself_is_run_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_model, runs = comparison.run_model, []

    def run(*arguments: Any) -> Any:
        runs.append(arguments)
        return run_model(*arguments)

    monkeypatch.setattr(comparison, "run_model", run)
    # One after the other they empty all modules: at the end the update is the same.
    method = replace(
        REGISTRY["s3lora"], grid=lambda _points, modules: (0.0, float(modules), modules + 1.0), default=None
    )
    monkeypatch.setitem(REGISTRY, "s3lora", method)
    report = compare_methods(make(unaligned=None, methods="s3lora"))
    assert len(runs) == 3  # host, adapter, all modules empty
    own, empty, again = report.points
    assert own.score == report.adapter
    assert empty.score == again.score != own.score
