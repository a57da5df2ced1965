"""Pictures of the report page, drawn by matplotlib and returned as SVG elements to stand inside HTML.

Colours are names of the page's CSS variables, so that one picture serves light and dark. Text stays text in the page's
font: it can be selected and read aloud, and no writing system is missing. Outlines would not be smaller: for a heat map
of 210 modules matplotlib writes 117 kB with text and 111 kB with outlines. The same data gives the same bytes.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from csulora_cli.text import number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# What matplotlib paints with, and the CSS variable that takes its place. No two variables share a colour.
_CSS_COLOURS = {
    "#010101": "ink", "#020202": "muted", "#030303": "rule", "#040404": "accent", "#050505": "heat", "#060606": "paper",
    "#070707": "second", "#080808": "panel",
}  # fmt: skip
_INK, _MUTED, _RULE, _ACCENT, _HEAT, _PAPER, _SECOND, _PANEL = _CSS_COLOURS
_FONT_PX = 11
_CELL_FONT_PX = 9.5
_CHARACTER_PX = 6.6  # of a label, on average, at _FONT_PX in the widest of the common system fonts
_CELL_PX = (42, 18)
_LABEL_CHARACTERS = 28
_CURVE_PX = (330, 200)
_PLANE_PX = (343, 320)
_INTERVAL_PX = (330, 26)  # the second a row
_POINTS = 72  # an inch, and with it a unit of the SVG: what is set in points here is a CSS pixel on the page
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "csulora",
    "text.parse_math": False,  # a dollar sign in a tensor name is a dollar sign
    "font.size": _FONT_PX,
}


@dataclass(frozen=True)
class Grid:
    """Shares by row and column; None where there is nothing to show.

    Attributes:
        rows, columns: labels.
        values: one tuple a row, one share a column.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"the values do not fit {len(self.rows)} rows and {len(self.columns)} columns")

    def transposed(self) -> "Grid":
        """Rows and columns exchanged."""
        return Grid(self.columns, self.rows, tuple(zip(*self.values, strict=True)))


def heat_map(grid: Grid, description: str) -> str:
    """Every share as a cell with its number, in per cent; the colour grows from 0 to 100 % and no further.

    Args:
        grid: at least one row and one column.
        description: what a screen reader says of the picture.
    """
    from matplotlib.patches import Rectangle

    width, height = _CELL_PX
    rows = [printable(label, _LABEL_CHARACTERS) for label in grid.rows]
    columns = [printable(label, _LABEL_CHARACTERS) for label in grid.columns]
    left, top = _label_room(rows), _label_room(columns)
    with _drawing(left + width * len(columns), top + height * len(rows)) as figure:
        axes = _pixel_axes(figure)
        for row, (label, values) in enumerate(zip(rows, grid.values, strict=True)):
            middle = top + height * (row + 0.5)
            axes.text(left - 6, middle, label, color=_MUTED, ha="right", va="center")
            for column, value in enumerate(values):
                if value is None:
                    continue
                corner = (left + width * column + 0.5, top + height * row + 0.5)
                alpha = min(max(value, 0.0), 1.0)
                axes.add_artist(
                    Rectangle(corner, width - 1, height - 1, facecolor=_HEAT, alpha=alpha, linewidth=0, clip_on=False)
                )
                axes.text(
                    left + width * (column + 0.5), middle, f"{round(100 * value)}", color=_INK, fontsize=_CELL_FONT_PX,
                    ha="center", va="center",
                )  # fmt: skip
        for column, label in enumerate(columns):
            axes.text(
                left + width * (column + 0.5), top - 6, label, color=_MUTED, rotation=90, ha="center", va="bottom"
            )
        return _svg(figure, description)


def _label_room(labels: Sequence[str]) -> float:
    return 12 + _CHARACTER_PX * max(len(label) for label in labels)


@dataclass(frozen=True)
class Curve:
    """One quantity over the strength λ.

    Attributes:
        strengths: ascending, above 0.
        values: one a strength, finite; drawn on a logarithmic scale if all are above 0 and span more than tenfold.
        chosen: the strength that was taken, marked.
        limit: a dashed line that the chosen one must not be above, if any; above 0.
        is_share: values are shares, written in per cent.
    """

    strengths: tuple[float, ...]
    values: tuple[float, ...]
    chosen: float
    limit: float | None = None
    is_share: bool = False

    def __post_init__(self) -> None:
        if not self.strengths or len(self.strengths) != len(self.values):
            raise ValueError(f"{len(self.strengths)} strengths and {len(self.values)} values make no curve")

    @property
    def shown(self) -> tuple[float, ...]:
        """All that must fit on the vertical axis."""
        return self.values if self.limit is None else (*self.values, self.limit)


def curve(data: Curve, description: str) -> str:
    """A line over log λ with one marker a measurement; the chosen one is filled, the limit is dashed.

    Args:
        data: what to draw.
        description: what a screen reader says of the picture.
    """
    with _drawing(*_CURVE_PX) as figure:
        axes = figure.add_axes((0.16, 0.21, 0.8, 0.74))
        if data.limit is not None:
            axes.axhline(data.limit, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(data.strengths, data.values, color=_ACCENT, linewidth=1.5)
        for strength, value in zip(data.strengths, data.values, strict=True):
            face = _ACCENT if strength == data.chosen else _PAPER
            axes.plot([strength], [value], "o", markersize=7, color=_ACCENT, markerfacecolor=face, clip_on=False)
        axes.set_xscale("log")
        axes.set_xlim(data.strengths[0] / 1.25, data.strengths[-1] * 1.25)
        _ticks(axes.xaxis, log_ticks(*axes.get_xlim()), number)
        _value_axis(axes, data.shown, data.is_share)
        axes.set_xlabel("λ", color=_MUTED)
        _plain_frame(axes)
        return _svg(figure, description)


@dataclass(frozen=True)
class Interval:
    """A measured share and its interval, under a label; all three in [0, 1]."""

    label: str
    share: float
    low: float
    high: float


def interval_plot(intervals: Sequence[Interval], description: str) -> str:
    """One line an interval from 0 to 100 %, with a mark at what was measured.

    Args:
        intervals: at least one, from top to bottom.
        description: what a screen reader says of the picture.
    """
    width, height = _INTERVAL_PX
    labels = [printable(interval.label, _LABEL_CHARACTERS) for interval in intervals]
    left, below = _label_room(labels), 24.0
    total = below + height * len(intervals)
    with _drawing(width, total) as figure:
        axes = figure.add_axes((left / width, below / total, 1 - (left + 18) / width, 1 - below / total))
        for row, interval in enumerate(intervals):
            axes.plot([interval.low, interval.high], [row, row], color=_HEAT, linewidth=6, solid_capstyle="butt")
            axes.plot([interval.share], [row], "o", markersize=8, color=_ACCENT, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(len(intervals) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        _ticks(axes.xaxis, (0.0, 0.25, 0.5, 0.75, 1.0), _percent)
        _plain_frame(axes, "x")
        return _svg(figure, description)


@dataclass(frozen=True)
class Spot:
    """One point of a trace, both axes in [0, 1].

    Attributes:
        x, y: where it stands.
        is_filled: else it is hollow.
        is_large: a larger mark.
    """

    x: float
    y: float
    is_filled: bool = True
    is_large: bool = False


class Look(StrEnum):
    """How a trace stands out."""

    STRONG = "strong"
    PLAIN = "plain"
    FAINT = "faint"
    POINT = "point"  # no line


@dataclass(frozen=True)
class Trace:
    """A line through points; traces of one look are told apart by their marks, which come again after the last."""

    look: Look
    mark: int
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Plane:
    """Traces over two shares.

    Attributes:
        x_label, y_label: what the axes are.
        traces: the first is drawn on top.
        band: the part of the x axis from 0 that is shaded, if any.
    """

    x_label: str
    y_label: str
    traces: tuple[Trace, ...]
    band: float | None = None


# Colour, width and dashes of a line, and the marks on it.
_LOOKS = {
    Look.STRONG: (_ACCENT, 2.5, "-", "os^DvPX*<>"),
    Look.PLAIN: (_SECOND, 1.2, "-", "os^DvPX*<>"),
    Look.FAINT: (_MUTED, 1.0, (0, (3, 2)), "os^DvPX*<>"),
    Look.POINT: (_INK, 0.0, "none", "+x"),
}


def plane(data: Plane, description: str) -> str:
    """Two shares against each other, one line a trace.

    Args:
        data: what to draw.
        description: what a screen reader says of the picture.
    """
    width, height = _PLANE_PX
    with _drawing(width, height) as figure:
        axes = figure.add_axes((62 / width, 44 / height, 1 - 76 / width, 1 - 56 / height))
        if data.band:
            axes.axvspan(0, min(1.0, data.band), color=_PANEL, linewidth=0)
        for trace in reversed(data.traces):
            _draw_trace(axes, trace, [spot.x for spot in trace.spots], [spot.y for spot in trace.spots])
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        for axis in (axes.xaxis, axes.yaxis):
            _ticks(axis, (0.0, 0.25, 0.5, 0.75, 1.0), _percent)
        axes.set_xlabel(data.x_label, color=_MUTED)
        axes.set_ylabel(data.y_label, color=_MUTED)
        _plain_frame(axes, "both")
        return _svg(figure, description)


def swatch(trace: Trace, description: str) -> str:
    """A line with its mark, for the legend of a plane."""
    with _drawing(34, 16) as figure:
        axes = _pixel_axes(figure)
        middle = Spot(17, 8, is_large=trace.look is Look.POINT)
        _draw_trace(axes, replace(trace, spots=(middle,)), [3, 17, 31], [8, 8, 8])
        return _svg(figure, description)


def _draw_trace(axes: "Axes", trace: Trace, xs: Sequence[float], ys: Sequence[float]) -> None:
    colour, width, dashes, marks = _LOOKS[trace.look]
    axes.plot(xs, ys, color=colour, linewidth=width, linestyle=dashes)
    for spot in trace.spots:
        axes.plot(
            [spot.x], [spot.y], marks[trace.mark % len(marks)], color=colour, clip_on=False,
            markerfacecolor=colour if spot.is_filled else _PAPER, markersize=10 if spot.is_large else 6,
        )  # fmt: skip


def log_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from `low` to `high` (both above 0): 1, 2, 5 a decade, or every n-th decade."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [[step * 10.0**decade for decade in decades for step in (1, 2, 5)]]
    candidates += [[10.0**decade for decade in decades[::stride]] for stride in range(1, len(decades))]
    for ticks in candidates:
        inside = [tick for tick in ticks if low <= tick <= high]
        if 2 <= len(inside) <= 6:
            return inside
    return [low, high]


def _value_axis(axes: "Axes", values: Sequence[float], is_share: bool) -> None:
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, high * 1.4)
        ticks = log_ticks(*axes.get_ylim())
    else:
        axes.set_ylim(min(0.0, low), 1.1 * high if high > 0 else 1.0)
        ticks = [float(tick) for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    _ticks(axes.yaxis, ticks, _percent if is_share else number)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _ticks(axis: "Axis", ticks: Sequence[float], text: Callable[[float], str]) -> None:
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.minorticks_off()


def _plain_frame(axes: "Axes", grid: Literal["x", "y", "both"] = "y") -> None:
    """Thin rules left and below, grid lines from the ticks of one axis or of both, muted labels."""
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_RULE)
    axes.tick_params(colors=_MUTED, left=False, bottom=False, pad=5)
    axes.grid(axis=grid, color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)


@contextmanager
def _drawing(width: float, height: float) -> Iterator["Figure"]:
    """A transparent figure of so many CSS pixels, in our settings; matplotlib's global state stays as it is."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _SETTINGS]):
        # matplotlib's own font, which it measures with, lacks many scripts; the reader's browser does not
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(width / _POINTS, height / _POINTS), dpi=_POINTS)
        figure.patch.set_visible(False)
        yield figure


def _pixel_axes(figure: "Figure") -> "Axes":
    """Invisible axes over the whole figure: one unit is one pixel, from the top left corner."""
    axes = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches() * _POINTS
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


def _svg(figure: "Figure", description: str) -> str:
    """The figure as one flat SVG element without what a page must not get from it.

    Removed: document type, metadata, comments, the style sheet, which would apply to the whole page, groups, and ids,
    since several pictures share a page: markers stand where they are used. Nothing is drawn outside of its axes, so
    clip paths go too.
    """
    data = BytesIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    source = ElementTree.fromstring(data.getvalue())
    markers = {f"#{path.get('id')}": path for path in source.iter(f"{_SVG}path") if path.get("id")}
    width, height = (f"{size * _POINTS:g}" for size in figure.get_size_inches())
    picture = ElementTree.Element("svg", {
        "viewBox": f"0 0 {width} {height}", "width": width, "height": height, "stroke-linejoin": "round",
        "role": "img", "aria-label": printable(description, 500),
    })  # fmt: skip
    picture.extend(list(_flat(source, markers)))
    return ElementTree.tostring(picture, encoding="unicode")


def _flat(source: ElementTree.Element, markers: Mapping[str, ElementTree.Element]) -> Iterator[ElementTree.Element]:
    """What is drawn, in order: paths and texts with short numbers and the page's colours."""
    for element in source:
        kind = element.tag.removeprefix(_SVG)
        style = _page_style(element.get("style", ""))
        if kind == "g":
            yield from _flat(element, markers)
        elif kind == "use":
            marker = markers[element.get(_HREF, "")]
            place = f"translate({_short(element.get('x', '0'))} {_short(element.get('y', '0'))})"
            style = f"{_page_style(marker.get('style', ''))};{style}"
            yield ElementTree.Element("path", {"d": _short(marker.get("d", "")), "transform": place, "style": style})
        elif kind == "path":
            yield ElementTree.Element("path", {"d": _short(element.get("d", "")), "style": style})
        elif kind == "text":
            kept = {name: _short(value) for name in ("x", "y", "transform") if (value := element.get(name))}
            if kept.get("transform", "").startswith("rotate(-0 "):
                del kept["transform"]
            text = ElementTree.Element("text", {**kept, "style": style})
            text.text = element.text
            yield text


def _short(numbers: str) -> str:
    """Path data, a coordinate, a rotation or a style, without needless digits and white space."""
    rounded = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match.group()):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(rounded.split())


def _page_style(style: str) -> str:
    """A style attribute with the page's colours, and its font in the place of matplotlib's."""
    kept = [rule for rule in style.split("; ") if not rule.startswith("font-family")]
    return re.sub(r"#[0-9a-f]{6}", lambda match: f"var(--{_CSS_COLOURS[match.group()]})", _short(";".join(kept)))
