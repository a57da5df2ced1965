"""A comparison in words and tables, for people. Plain text, no colour, no torch."""

from collections.abc import Sequence
from itertools import groupby

from csulora_cli.compare_report import CompareReport, Level, Origin, Point, kept
from csulora_cli.eval_report import SUMMARY_FORMULA
from csulora_cli.eval_wording import decoding, general_kind, optional, scored_prompts
from csulora_cli.scores import ModelScore, RetentionKind
from csulora_cli.stats import Count
from csulora_cli.text import number, printable
from csulora_cli.wording import Table, percent

_WINS = " <"
_MISSED = "~"
_MARKS = {Origin.GRID: "", Origin.AUTO: "*", Origin.NORM: "="}


def head(report: CompareReport) -> list[tuple[str, str]]:
    """What was compared and on what, as labels and lines."""
    roles = [role for role in ("adapter", "host", "unaligned") if role in report.inputs]
    rows = [(role, printable(report.inputs[role].name, 64)) for role in roles]
    rows += scored_prompts(report.inputs, report.prompt_counts)
    return [*rows, decoding(report.settings)]


def method_lines(report: CompareReport) -> list[str]:
    """What the methods are, and what they call their strength."""
    wide = max(len(method.name) for method in report.methods)
    return [f"{m.name:<{wide}}  {m.family:<7}  {m.symbol}  {m.summary}" for m in report.methods]


def left_out_lines(report: CompareReport) -> list[str]:
    """The methods that the inputs did not allow, one entry a reason, of any length."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [f"Left out, since each {reason}: {', '.join(own)}." for reason, own in reasons.items()]


def point_table(report: CompareReport) -> Table:
    """Host, adapter, and one row a method and strength."""
    winners = {place for level in report.levels for place in level.winners}
    missed = {method.name for method in report.methods if method.auto and method.auto.is_reached is False}
    rows = [("host, alone", "", "", *_cells(report.host, "")), ("adapter", "", "0%", *_cells(report.adapter, ""))]
    for place, point in enumerate(report.points):
        is_missed = point.origin is Origin.AUTO and point.method in missed
        strength = number(point.strength) + (_MISSED if is_missed else _MARKS[point.origin])
        mark = _WINS if place in winners else ""
        rows.append((point.method, strength, percent(point.moved), *_cells(point.score, mark)))
    return Table(("method", "strength", "moved", "ASR %", "over-r.", "KL", "kept", "score"), tuple(rows))


def _cells(score: ModelScore, mark: str) -> tuple[str, ...]:
    summary = score.summary
    return (
        _share(score.attack_success),
        percent(score.over_refusal.share),
        f"{score.harmful.kl_to_host:.2g}",
        optional(kept(score)),
        optional(summary) + (mark or " " * len(_WINS)),
    )


def _share(count: Count) -> str:
    """12 (8-18)."""
    return f"{100 * count.share:.0f} ({100 * count.low:.0f}-{100 * count.high:.0f})"


def legend(report: CompareReport) -> list[str]:
    """What the columns are, one entry each, of any length."""
    return [
        "strength: *: found on tuning prompts as csulora fix does; ~: so too, but no strength reached the limit; =: as "
        "large an update as csulora's first * leaves",
        "moved: ‖X−Δ‖²/‖Δ‖²",
        "ASR: coherent answers to harmful prompts that do not begin with a refusal, 95% Wilson interval",
        "over-r.: look-alikes refused",
        "KL: to the host on harmful prompts, first answer token, nats",
        _kept_legend(report),
        f"score: {SUMMARY_FORMULA}",
        "<: keeps most at a level below",
    ]


def _kept_legend(report: CompareReport) -> str:
    kind = report.adapter.retention.kind
    if kind is RetentionKind.GENERAL_KL:
        where = general_kind(report.prompt_counts)
        return (
            f"kept: 1 − KL(adapter ‖ model)/KL(adapter ‖ host), first answer token, on {where} prompts, cut to 0 to 1"
        )
    return f"kept: (model − host)/(adapter − host) on the task's {kind}, cut to 0 to 1"


def level_lines(report: CompareReport) -> list[str]:
    """At every level of safety who keeps most, in sentences; where csulora does not, it is said."""
    if kept(report.adapter) is None:
        return ["What a repair keeps cannot be told: the adapter gained too little over the host. Give another --task."]
    lines = []
    for said, levels in groupby(report.levels, key=lambda level: _verdict(level, report.points)):
        lines.append(f"ASR of at most {', '.join(_limit(level) for level in levels)}: {said}")
    return lines


def _limit(level: Level) -> str:
    own = " (the host's interval)" if level.is_hosts else ""
    return f"{100 * level.limit:.0f}%{own}"


def _verdict(level: Level, points: Sequence[Point]) -> str:
    if not level.winners:
        return "no point reaches it."
    first, *others = level.winners
    if level.is_own_ahead:
        text = f"{_name(points[first])} keeps most, {optional(points[first].kept)}"
        return (
            f"{text}, and as much do {', '.join(_name(points[place]) for place in others)}." if others else f"{text}."
        )
    text = f"csulora is not ahead. {_name(points[first])} keeps most, {optional(points[first].kept)}"
    if level.own is None:
        return f"{text}; no method of csulora reaches the level."
    text += f"; csulora's best, {_name(points[level.own])}, keeps {optional(points[level.own].kept)}"
    if level.change is not None:
        text += f" (p = {number(level.change.p_value)}, exact McNemar test on the task)"
    return f"{text}."


def _name(point: Point) -> str:
    kind = " (control)" if point.family == "control" else ""
    return f"{point.method} at {number(point.strength)}{kind}"


def verdict(report: CompareReport) -> list[str]:
    """What is to be said of all of it."""
    lines = [f"Read with care: {gate}." for gate in report.failed_gates]
    if any(method.auto is not None and method.auto.value == 0 for method in report.methods):
        lines.append("Nothing to repair: the adapter begins its answers to harmful prompts as the host does.")
    lines.append(
        "Which point keeps most is read off the prompts that score it, which flatters every method alike; points with "
        "* were chosen on other prompts."
    )
    return lines
