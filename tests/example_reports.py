"""Reports made up for tests of pages: everything filled in, deterministic, of any size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from csulora_cli.compare_report import OWN, CompareReport, MethodRecord, Origin, Point, find_levels
from csulora_cli.eval_report import Change, EvalReport, EvaluatedModel, JudgeScore, Role
from csulora_cli.pareto import dominated
from csulora_cli.refusals import RefusalTest
from csulora_cli.report import Behaviour, FixReport, InputRecord, ModuleRecord, PathRecord, StrengthRecord
from csulora_cli.scores import AnswerCounts, KindScore, ModelScore, Retention, RetentionKind, TaskScore
from csulora_cli.stats import Agreement, Count, PairedTest

KINDS = tuple(f"self_attn.{kind}_proj" for kind in "qkvo") + tuple(
    f"mlp.{kind}_proj" for kind in ("gate", "up", "down")
)
PATH = (
    PathRecord(1.41, 3.08, 0.963, 0.62),
    PathRecord(8.0, 0.401, 3.87, 0.87),
    PathRecord(16.0, 0.131, 5.93, 0.94),
    PathRecord(22.6, 0.0884, 7.12, 0.97),
    PathRecord(32.0, 0.0615, 8.38, 0.99),
)
# Markup, script, a template expression, mathematics of matplotlib, an entity, quotes, bidi and control characters.
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}$x^2$&lt;\"'\u202e\u2066\x1b[31m\x00中"


def module(name: str, **changes: Any) -> ModuleRecord:
    """One module of the prompts source, whose numbers depend on its name only."""
    size = sum(map(ord, name))
    record = ModuleRecord(
        name=name,
        rank=16,
        energy=1.0 + size % 7,
        moved=0.05 * (size % 31),
        before={"faded": 5.0 + size % 11, "benign": 4.0 + size % 13},
        after={"faded": 0.01 * (size % 9), "benign": 0.5 * (size % 17)},
        chance={},
        objective_before=10.0,
        objective_after=1.0,
        storage_error=1e-15,
    )
    return replace(record, **changes)


def names(layers: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Names of a Llama's modules."""
    return [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def behaviour(refused: int, kl: float) -> Behaviour:
    """A model that refuses so many of 40 harmful prompts."""
    return Behaviour(
        harmful_refused=Count(refused, 40, refused / 50, (refused + 10) / 50),
        harmful_answered=Count(40 - refused, 40, (40 - refused) / 50, (50 - refused) / 50),
        harmful_incoherent=Count(0, 40, 0.0, 0.09),
        benign_refused=Count(refused // 2, 40, refused / 100, (refused + 20) / 100),
        harmful_kl_to_host=kl,
        benign_kl_to_host=kl / 2,
        benign_kl_to_adapter=kl / 3,
        first_token_contrast=0.5,
    )


def fix_report(module_names: Sequence[str] | None = None, **changes: Any) -> FixReport:
    """A repair from prompts with a search of λ."""
    digest = "0123456789abcdef" * 4
    report = FixReport(
        version="9.8.7",
        out="my-adapter-csulora",
        adapter_summary="LoRA rank 16, scale 2, float32, 210 modules",
        library="peft",
        inputs={
            "adapter": InputRecord("org/my-adapter", "c0ffee" * 6, {"adapter_model.safetensors": digest}),
            "host": InputRecord("org/host", None, {"model.safetensors": digest[::-1]}),
        },
        settings={"source": "prompts", "strength": 32.0, "protect": 1.0, "chat_template": True},
        prompt_counts={
            "directions": {"harmful": 0, "lookalikes": 39, "benign": 41},
            "tuning": {"harmful": 40, "benign": 41},
            "report": {"harmful": 40, "benign": 41},
        },
        strength=StrengthRecord(32.0, True, True, 0.07, 15.3, PATH),
        modules=[module(name) for name in (module_names or names(4))],
        behaviour={"host": behaviour(37, 0.0), "adapter": behaviour(0, 15.3), "repaired": behaviour(35, 0.0428)},
        tensors={"changed": 420, "unchanged": 0, "total": 420},
        files={"adapter_config.json": digest},
    )
    return replace(report, **changes)


def hostile_report() -> FixReport:
    """Hostile text wherever a string can come from outside."""
    return fix_report(
        [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in (EVIL, "mlp.up_proj")],
        out=f"/tmp/{EVIL}",
        adapter_summary=EVIL,
        inputs=hostile_inputs("adapter", "host", "prompts"),
        settings={"source": "prompts", "device": EVIL, EVIL: EVIL},
        files={EVIL: EVIL},
        warnings=(EVIL,),
    )


# Evaluations and comparisons


def model_score(answered: int, exact: int, over_refused: int = 1, retention: float | None = None) -> ModelScore:
    """A model that answers so many of 40 harmful prompts and gets so many of 50 task prompts right."""

    def on(refused: int, answered: int) -> KindScore:
        counts = AnswerCounts(Count.of(refused, 40), Count.of(answered, 40), Count.of(40 - refused - answered, 40))
        return KindScore(dict.fromkeys(RefusalTest, counts), 0.25 * answered, 0.01 * refused)

    kept = exact / 50 if retention is None else retention
    task = TaskScore(Count.of(exact, 50), 1.5 - exact / 50, kept, kept)
    benign = on(over_refused, 40 - over_refused)
    return ModelScore(on(40 - answered, answered), benign, benign, task, Retention(kept, RetentionKind.EXACT_MATCH))


def eval_report(repairs: int = 2, **changes: Any) -> EvalReport:
    """Host, adapter, and so many repairs of it, with a judge's opinion."""
    keys = ["repaired"] if repairs == 1 else [f"repaired {index}" for index in range(1, repairs + 1)]
    tests = dict.fromkeys(RefusalTest, PairedTest.of((True, True, False), (False, False, True)))
    judge = JudgeScore(Count.of(3, 40), 0, Agreement(Count.of(38, 40), 0.81))
    models = [
        EvaluatedModel("host", Role.HOST, "org/host", model_score(1, 0), judge=judge),
        EvaluatedModel("adapter", Role.ADAPTER, "org/my-adapter", model_score(40, 50, 0), judge=judge),
    ]
    for index, key in enumerate(keys):
        score = model_score(2 + index, 49 - index)
        models.append(EvaluatedModel(key, Role.REPAIRED, f"repair-{index}", score, Change(tests, tests), judge))
    report = EvalReport(
        version="9.8.7",
        inputs={key: InputRecord(f"org/{key}", None, {"file": "ab" * 32}) for key in ("host", "adapter", *keys)}
        | {name: InputRecord(name, None, {name: "cd" * 32}) for name in ("prompts", "task", "judge")},
        settings={"seed": None, "answer_tokens": 24, "task_tokens": 30, "judge": "text classifier"},
        prompt_counts={"harmful": 40, "lookalikes": 40, "general": 40, "task": 50},
        models=models,
    )
    return replace(report, **changes)


METHODS = {
    OWN: ("prompts", "keep-out", "keep-out-protect", "keep-in"),
    "peer": ("safelora-threshold", "safelora-number", "safelora-projector", "lssf", "resta", "s3lora"),
    "control": ("shrink", "random-keep-in", "random-keep-out", "rotated", "benign"),
}


def compare_report(**changes: Any) -> CompareReport:
    """Fifteen methods at four strengths each; csulora's first has an automatic one."""
    points = []
    for rank, (family, name) in enumerate((family, name) for family, found in METHODS.items() for name in found):
        for step in range(4):
            score = model_score(max(0, 40 - (14 - rank) * step), max(0, 50 - (2 + rank) * step * step))
            origin = Origin.AUTO if name == "prompts" and step == 2 else Origin.GRID
            points.append(Point(name, family, 10.0**step, origin, 0.1 * step, 16, score, ()))
    worse = dominated([point.standing for point in points])
    points = [replace(point, is_dominated=is_worse) for point, is_worse in zip(points, worse, strict=True)]
    host = model_score(1, 0)
    report = CompareReport(
        version="9.8.7",
        inputs={role: InputRecord(f"org/{role}", None, {"file": "ab" * 32}) for role in ("adapter", "host", "prompts")},
        settings={"seed": None, "answer_tokens": 24, "task_tokens": 30, "points": 4},
        prompt_counts={"harmful": 40, "lookalikes": 40, "general": 40, "task": 50},
        methods=[
            MethodRecord(name, family, "does it", "λ", None, None)
            for family, found in METHODS.items()
            for name in found
        ],
        host=host,
        adapter=model_score(40, 50),
        points=points,
        levels=find_levels(points, host.attack_success),
    )
    return replace(report, **changes)


def hostile_inputs(*roles: str) -> dict[str, InputRecord]:
    """Inputs whose every string is hostile."""
    return {role: InputRecord(EVIL, EVIL, {EVIL: EVIL}) for role in roles}
