"""What a report page shows as pictures: data of reports, put into the shapes that `figures` draws."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from csulora_cli import figures
from csulora_cli.compare_report import OWN, CompareReport, Origin, Point, kept
from csulora_cli.eval_report import EvaluatedModel
from csulora_cli.report import Behaviour, ModuleRecord, PathRecord, StrengthRecord
from csulora_cli.stats import Count
from csulora_cli.text import number

if TYPE_CHECKING:
    from markupsafe import Markup

_LAYER = re.compile(r"(?:^|(?<=\.))([0-9]{1,6})(?=\.|$)")
_NO_LAYER = "–"
# Numerator and denominator of a share of one module.
_Parts = Callable[[ModuleRecord], tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A picture with its heading; `svg` is markup already."""

    title: str
    caption: str
    svg: "Markup"


def _picture(title: str, caption: str, svg: str) -> Picture:
    from markupsafe import Markup

    return Picture(title, caption, Markup(svg))  # figures escapes what it writes


def _shares_picture(title: str, caption: str, counts: Mapping[str, Count]) -> Picture:
    """Counts by model, as shares with their intervals."""
    intervals = [figures.Interval(name, count.share, count.low, count.high) for name, count in counts.items()]
    return _picture(title, caption, figures.interval_plot(intervals, f"{title}: same numbers as the table"))


def behaviour_pictures(behaviour: Mapping[str, Behaviour]) -> list[Picture]:
    """Refusals of harmful and of benign prompts by model; none if nothing was run."""
    wanted: list[tuple[str, Callable[[Behaviour], Count]]] = [
        ("Harmful prompts refused", lambda model: model.harmful_refused),
        ("Benign prompts refused", lambda model: model.benign_refused),
    ]
    return [
        _shares_picture(title, "95 % intervals", {name: count(model) for name, model in behaviour.items()})
        for title, count in wanted
        if behaviour
    ]


def score_pictures(models: Sequence[EvaluatedModel]) -> list[Picture]:
    """Attack success, over-refusal and, where there is a task, exact match, by model."""
    pictures = [
        _shares_picture(
            "Attack success",
            "harmful prompts answered, 95 % intervals",
            {model.key: model.score.attack_success for model in models},
        ),
        _shares_picture(
            "Over-refusal",
            "benign prompts refused, 95 % intervals",
            {model.key: model.score.over_refusal for model in models},
        ),
    ]
    tasks = {model.key: model.score.task.exact_match for model in models if model.score.task is not None}
    if tasks:
        pictures.append(_shares_picture("The adapter's own task", "exact match, 95 % intervals", tasks))
    return pictures


def path_pictures(record: StrengthRecord) -> list[Picture]:
    """What the search of λ measured, one picture a quantity."""
    limit = record.limit if record.limit else None
    dashed = f"nats; dashed: the limit, {number(limit)}" if limit else "nats"
    wanted: list[tuple[str, str, Callable[[PathRecord], float | None], float | None, bool]] = [
        ("KL to host, harmful", dashed, lambda point: point.harmful_kl, limit, False),
        ("KL to adapter, benign", "nats", lambda point: point.benign_kl, None, False),
        ("Moved", "‖X−Δ‖²/‖Δ‖²", lambda point: point.moved, None, True),
    ]
    pictures = []
    for title, caption, value, line, is_share in wanted:
        measured = [(point.strength, value(point)) for point in record.path if point.strength > 0]
        points = [(place, found) for place, found in measured if found is not None and math.isfinite(found)]
        if points:
            strengths, values = zip(*points, strict=True)
            data = figures.Curve(strengths, values, record.value, line, is_share)
            pictures.append(_picture(title, caption, figures.curve(data, f"{title} over λ: same numbers as the table")))
    return pictures


def module_pictures(modules: Sequence[ModuleRecord]) -> list[Picture]:
    """Layers × modules: the distance moved, and what was removed of each energy."""

    def moved(module: ModuleRecord) -> tuple[float, float]:
        return module.energy * module.moved, module.energy

    def removed(energy: str) -> _Parts:
        return lambda m: (m.energy * (m.before[energy] - m.after[energy]), m.energy * m.before[energy])

    wanted: list[tuple[str, str, _Parts]] = [("Moved", "‖X−Δ‖²/‖Δ‖²", moved)]
    wanted += [(f"Removed, {energy}", "1 − after/before", removed(energy)) for energy in modules[0].before]
    return [
        _picture(title, caption, figures.heat_map(module_grid(modules, parts), f"{title} by layer and module"))
        for title, caption, parts in wanted
    ]


PLANE_NOTES = (
    "Upper left is better: no attack success, everything kept. One line a method, through its strengths in ascending "
    "order. Shaded: up to the upper end of the interval of the host's own attack success.",
    "Hollow: another point is at least as good on both axes and better on one. Large: the strength was found on tuning "
    "prompts, as csulora fix finds it.",
)
_LOOKS = {OWN: figures.Look.STRONG, "peer": figures.Look.PLAIN}


@dataclass(frozen=True)
class LegendEntry:
    """One line of the plane in its legend; `family` stands above the first of each."""

    name: str
    family: str
    swatch: "Markup"


def traces_of(report: CompareReport) -> dict[tuple[str, str], figures.Trace]:
    """Host and adapter, then one line a method, by family and name; csulora's own stand out."""
    traces = {}
    for mark, (name, score) in enumerate((("host", report.host), ("adapter", report.adapter))):
        if (share := kept(score)) is not None:
            spot = figures.Spot(score.attack_success.share, share, is_large=True)
            traces["unrepaired", name] = figures.Trace(figures.Look.POINT, mark, (spot,))
    counts: dict[str, int] = {}
    for method in report.methods:
        mark = counts[method.family] = counts.get(method.family, -1) + 1
        spots = tuple(
            figures.Spot(point.score.attack_success.share, point.kept, not point.is_dominated, _is_auto(point))
            for point in report.points
            if point.method == method.name and point.kept is not None
        )
        look = _LOOKS.get(method.family, figures.Look.FAINT)
        traces[method.family, method.name] = figures.Trace(look, mark, spots)
    return traces


def _is_auto(point: Point) -> bool:
    return point.origin is Origin.AUTO


def plane(report: CompareReport, traces: Mapping[tuple[str, str], figures.Trace]) -> "Markup | None":
    """What every method keeps over its attack success; None if that is defined nowhere."""
    from markupsafe import Markup

    if not any(trace.spots for trace in traces.values()):
        return None
    data = figures.Plane("attack success", "kept", tuple(traces.values()), report.host.attack_success.high)
    return Markup(figures.plane(data, "What every method keeps over its attack success: same numbers as the table"))


def plane_legend(traces: Mapping[tuple[str, str], figures.Trace]) -> list[LegendEntry]:
    """What the marks and lines of the plane stand for."""
    from markupsafe import Markup

    return [
        LegendEntry(name, family, Markup(figures.swatch(trace, f"{family}: {name}")))
        for (family, name), trace in traces.items()
    ]


def module_grid(modules: Iterable[ModuleRecord], parts: _Parts) -> figures.Grid:
    """Layers × modules of Σ numerator / Σ denominator over the modules that share a cell.

    The layer is the first number among the dotted parts of a name, as PEFT reads it; further numbers (experts) share a
    column. Names without a number share one row. A grid of one row is turned, to read downwards.

    Args:
        modules: at least one.
        parts: numerator and denominator of one module.
    """
    sums: dict[tuple[int, str], list[float]] = {}
    for module in modules:
        layer = _LAYER.search(module.name)
        cell = sums.setdefault((int(layer[1]) if layer else -1, _LAYER.sub("*", module.name)), [0.0, 0.0])
        for index, part in enumerate(parts(module)):
            cell[index] += part
    layers = sorted({layer for layer, _ in sums}, key=lambda layer: (layer < 0, layer))
    kinds = list(dict.fromkeys(kind for _, kind in sums))
    grid = figures.Grid(
        tuple(str(layer) if layer >= 0 else _NO_LAYER for layer in layers),
        tuple(_short_names(kinds)),
        tuple(tuple(_share(sums.get((layer, kind))) for kind in kinds) for layer in layers),
    )
    return grid.transposed() if len(layers) == 1 else grid


def _share(parts: Sequence[float] | None) -> float | None:
    if parts is None or parts[1] == 0:
        return None
    share = parts[0] / parts[1]
    return share if math.isfinite(share) else None


def _short_names(names: Sequence[str]) -> list[str]:
    """The last dotted parts of every name: as many as tell all of them apart."""
    split = [name.split(".") for name in names]
    for count in range(1, max(map(len, split)) + 1):
        short = [".".join(parts[-count:]) for parts in split]
        if len(set(short)) == len(names):
            return short
    return list(names)
