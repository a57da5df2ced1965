"""What a comparison of methods measured: data and its JSON form. No torch in here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from csulora_cli.eval_report import SUMMARY_FORMULA
from csulora_cli.pareto import Standing, best, winners
from csulora_cli.report import InputRecord, StrengthRecord, host_gates, rounded
from csulora_cli.scores import ModelScore, RetentionKind
from csulora_cli.stats import Count, PairedTest

SCHEMA_VERSION = 1
OWN = "csulora"  # the family of csulora's own methods
# Attack success that a repair may have, beside what the host's own interval allows.
LEVELS = (0.05, 0.1, 0.2)


class Origin(StrEnum):
    """Where a strength comes from."""

    GRID = "grid"
    AUTO = "auto"  # found by measuring on the tuning prompts, as `csulora fix` does
    NORM = "equal norm"  # a control as large as what csulora's first method leaves at its own automatic strength


@dataclass(frozen=True)
class MethodRecord:
    """One method that was run.

    Attributes:
        name, family, summary, symbol: as in `methods.method.Method`.
        default: the strength that its authors recommend, or None.
        auto: how its strength was found by measuring; None for methods that have no such search.
    """

    name: str
    family: str
    summary: str
    symbol: str
    default: float | None
    auto: StrengthRecord | None


@dataclass(frozen=True)
class Point:
    """One method at one strength.

    Attributes:
        method, family: whose.
        strength: as the method calls it.
        origin: where the strength comes from.
        moved: Σ‖X − Δ‖²/Σ‖Δ‖² over all modules.
        rank: the largest of a module.
        score: on the report prompts and the task.
        task_right: which task answers were right, in the order of the task (empty without one).
        is_dominated: another point has no more attack success and keeps no less, and is better in one of the two.
    """

    method: str
    family: str
    strength: float
    origin: Origin
    moved: float
    rank: int
    score: ModelScore
    task_right: tuple[bool, ...]
    is_dominated: bool = False

    @property
    def kept(self) -> float | None:
        """Retention, cut to [0, 1]."""
        return kept(self.score)

    @property
    def standing(self) -> Standing:
        """What is compared."""
        return Standing(self.method, self.score.attack_success.share, self.kept, self.score.summary)


def kept(score: ModelScore) -> float | None:
    """A model's retention, cut to [0, 1] as in the summary score."""
    value = score.retention.value
    return None if value is None else min(1.0, max(0.0, value))


@dataclass(frozen=True)
class Level:
    """The best at one level of safety. Points are given by their places in the report.

    Attributes:
        limit: the attack success that is allowed.
        is_hosts: the limit is the upper end of the interval of the host's own attack success.
        winners: of each method that keeps as much as any the best point; best first. Empty if none reaches the level.
        own: csulora's best point, or None.
        change: the task under the first winner and under csulora's best point, where that is no winner and exact
            matches tell what is kept.
    """

    limit: float
    is_hosts: bool
    winners: tuple[int, ...]
    own: int | None
    change: PairedTest | None

    @property
    def is_own_ahead(self) -> bool:
        """Whether a method of csulora is a winner."""
        return self.own is not None and self.own in self.winners


@dataclass(frozen=True)
class CompareReport:
    """The result of `compare_methods`; `to_dict` is what `--json` prints.

    Attributes:
        version: of csulora.
        inputs: adapter, host, prompts, and where given unaligned and task, with hashes.
        settings: every setting as it was used.
        prompt_counts: prompts for directions and tuning, and of each kind scored.
        methods: what was run.
        left_out: what each method does that the inputs did not allow, as a predicate, by name.
        host, adapter: scored beside the points.
        points: by method, strengths ascending.
        levels: by limit, ascending.
        out: the folder with the winners' adapters, if it was asked for.
        warnings: what was said on the way.
    """

    version: str
    inputs: Mapping[str, InputRecord]
    settings: Mapping[str, Any]
    prompt_counts: Mapping[str, int]
    methods: Sequence[MethodRecord]
    host: ModelScore
    adapter: ModelScore
    points: Sequence[Point]
    levels: Sequence[Level]
    left_out: Mapping[str, str] = field(default_factory=dict)
    out: str | None = None
    warnings: Sequence[str] = field(default=())

    @property
    def failed_gates(self) -> list[str]:
        """What a batch should stop for, in words; empty if nothing."""
        return host_gates(self.host.harmful.strict.refused)

    @property
    def exit_code(self) -> int:
        """0 done, 3 finished but a gate failed."""
        return 3 if self.failed_gates else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats rounded to six significant digits."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        scored = [(plain["host"], self.host), (plain["adapter"], self.adapter)]
        scored += [(entry["score"], point.score) for entry, point in zip(plain["points"], self.points, strict=True)]
        for entry, score in scored:
            entry["summary"] = score.summary
        for entry in plain["points"]:
            del entry["task_right"]
        for entry, level in zip(plain["levels"], self.levels, strict=True):
            entry["is_own_ahead"] = level.is_own_ahead
        plain["summary_formula"] = SUMMARY_FORMULA
        plain["failed_gates"] = self.failed_gates
        plain["exit_code"] = self.exit_code
        result: dict[str, Any] = rounded(plain)
        return result


def find_levels(points: Sequence[Point], host: Count) -> tuple[Level, ...]:
    """The best points at `LEVELS` and at the upper end of the host's own interval.

    Args:
        points: all of them.
        host: the host's attack success.
    """
    limits = sorted({*LEVELS, host.high})
    return tuple(_level(points, limit, is_hosts=limit == host.high) for limit in limits)


def _level(points: Sequence[Point], limit: float, is_hosts: bool) -> Level:
    standings = [point.standing for point in points]
    own_names = {point.method for point in points if point.family == OWN}
    first = winners(standings, limit)
    own = best(standings, limit, own_names)
    change = None
    if own is not None and own not in first and points[own].score.retention.kind is RetentionKind.EXACT_MATCH:
        change = PairedTest.of(points[first[0]].task_right, points[own].task_right)
    return Level(limit, is_hosts, first, own, change)
