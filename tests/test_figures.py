"""Pictures: what is drawn, that the page can take it as it is, and that nothing else decides on it."""

import math
import re
import warnings
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from example_reports import EVIL
from hypothesis import given
from hypothesis import strategies as st

from csulora_cli.figures import (
    Curve,
    Grid,
    Interval,
    Look,
    Plane,
    Spot,
    Trace,
    curve,
    heat_map,
    interval_plot,
    log_ticks,
    plane,
    swatch,
)
from csulora_cli.text import printable

GRID = Grid(("0", "1"), ("q_proj", "up_proj"), ((0.0, 0.254), (None, 1.43)))
CURVE = Curve((1.0, 4.0, 16.0), (3.0, 0.4, 0.05), chosen=16.0, limit=0.07)

INTERVALS = [Interval("host", 0.0, 0.0, 0.1), Interval("adapter", 1.0, 0.9, 1.0)]
SPOTS = (Spot(0.0, 1.0), Spot(0.5, 0.5, is_filled=False), Spot(1.0, 0.0, is_large=True))
TRACES = tuple(Trace(look, mark, SPOTS) for look in Look for mark in (0, 1))
PLANE = Plane("attack success", "kept", TRACES, band=0.1)
PICTURES = {
    "heat map": heat_map(GRID, "x"),
    "curve": curve(CURVE, "x"),
    "intervals": interval_plot(INTERVALS, "x"),
    "plane": plane(PLANE, "x"),
    "swatch": swatch(TRACES[0], "x"),
}


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def styles(svg: str, contain: str) -> list[str]:
    found = [element.get("style", "") for element in ElementTree.fromstring(svg).iter("path")]
    return [style for style in found if contain in style]


def test_a_heat_map_shows_every_share_with_its_labels() -> None:
    assert sorted(texts(heat_map(GRID, "x"))) == sorted(["0", "1", "q_proj", "up_proj", "0", "25", "143"])


def test_the_colour_of_a_cell_is_its_share_up_to_full() -> None:
    svg = heat_map(Grid(("0",), ("a", "b", "c", "d", "e"), ((-0.2, -0.001, 0.25, 1.0, 7.0),)), "x")
    cells = styles(svg, "--heat")  # none at all below 0
    opacities = [float(match[1]) if (match := re.search(r"opacity: ([\d.]+)", style)) else 1.0 for style in cells]
    assert opacities == [0.25, 1.0, 1.0]
    assert {"-20", "0", "25", "100", "700"} < set(texts(svg))


def test_a_grid_must_fit_its_labels() -> None:
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        Grid(("0", "1"), ("a",), ((0.0,), (0.0, 1.0)))
    with pytest.raises(ValueError, match="2 rows"):
        Grid(("0", "1"), ("a",), ((0.0,),))
    assert Grid(("0",), ("a", "b"), ((1.0, None),)).transposed() == Grid(("a", "b"), ("0",), ((1.0,), (None,)))


def test_a_curve_marks_every_measurement_and_fills_the_chosen_one() -> None:
    svg = curve(CURVE, "x")
    assert len(styles(svg, "fill: var(--paper)")) == 2
    assert len(styles(svg, "fill: var(--accent)")) == 1
    assert len(styles(svg, "stroke-dasharray")) == 1
    assert not styles(curve(Curve((1.0,), (0.0,), chosen=2.0), "x"), "stroke-dasharray")
    with pytest.raises(ValueError, match="1 strengths and 0 values"):
        Curve((1.0,), (), chosen=1.0)


def test_a_curve_is_logarithmic_where_values_span_decades_and_starts_at_zero_elsewhere() -> None:
    assert {"0.05", "0.1", "0.2", "0.5", "1", "2"} < set(texts(curve(CURVE, "x")))
    assert "0" in texts(curve(Curve((1.0, 2.0), (3.0, 5.0), chosen=2.0), "x"))
    assert {"0%", "40%", "80%"} < set(texts(curve(Curve((1.0, 2.0), (0.3, 0.99), chosen=2.0, is_share=True), "x")))
    assert "0" in texts(curve(Curve((1.0, 2.0), (0.0, 50.0), chosen=2.0), "x"))


@given(st.floats(1e-9, 1e6), st.floats(1.0001, 1e9))
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert low <= ticks[0] <= ticks[-1] <= low * ratio


def test_log_ticks_are_round() -> None:
    assert log_ticks(1.3, 40) == [2, 5, 10, 20]
    assert log_ticks(1, 16400) == [1, 10, 100, 1000, 10000]
    assert log_ticks(1e-9, 1e9) == pytest.approx([10.0**power for power in range(-9, 10, 4)])
    assert log_ticks(3, 4) == [3, 4]


def test_intervals_are_bars_with_a_mark_each() -> None:
    svg = PICTURES["intervals"]
    assert len(styles(svg, "stroke: var(--heat)")) == 2
    assert len(styles(svg, "fill: var(--accent)")) == 2
    assert {"host", "adapter", "0%", "100%"} <= set(texts(svg))


def test_a_plane_draws_every_trace_in_its_look() -> None:
    svg = PICTURES["plane"]
    assert {"attack success", "kept", "0%", "100%"} <= set(texts(svg))
    assert len(styles(svg, "fill: var(--panel)")) == 1
    assert not styles(plane(Plane("x", "y", TRACES), "x"), "--panel")
    for colour in ("accent", "second", "muted"):
        lines = [style for style in styles(svg, f"stroke: var(--{colour})") if style.startswith("fill: none")]
        assert [("dasharray" in style) for style in lines] == [colour == "muted"] * 2
        assert len(styles(svg, f"fill: var(--{colour})")) == 2 * 2  # the filled marks
        assert len(styles(svg, f"fill: var(--paper);stroke: var(--{colour})")) == 2  # the hollow ones
    assert len(styles(PICTURES["swatch"], "var(--accent)")) == 2


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_can_stand_in_a_page(name: str) -> None:
    svg = PICTURES[name]
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert {element.tag for element in root} <= {"path", "text"}
    assert not [element for element in root.iter() if "id" in element.attrib or "clip-path" in element.attrib]
    assert not re.search("#[0-9a-f]{3}|http|font-family|url", svg)
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert (root.get("role"), root.get("aria-label")) == ("img", "x")


def test_hostile_labels_stay_text() -> None:
    svg = heat_map(Grid((EVIL, "0"), (EVIL,), ((0.5,), (None,))), EVIL)
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} == {"svg", "path", "text"}
    assert texts(svg).count(printable(EVIL, 28)) == 2
    assert root.get("aria-label") == printable(EVIL, 500)
    assert "\u202e" not in svg


def test_nothing_but_the_data_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "axes.facecolor": "red"}.items():
        monkeypatch.setitem(mpl.rcParams, key, value)
    again = (heat_map(GRID, "x"), curve(CURVE, "x"), interval_plot(INTERVALS, "x"), plane(PLANE, "x"))
    assert again == tuple(PICTURES.values())[:4]
    assert mpl.rcParams["font.size"] == 30


def test_letters_that_matplotlib_cannot_draw_are_no_matter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = heat_map(Grid(("中文 ﷺ",), ("$\\alpha",), ((math.pi / 10,),)), "x")
    assert {"中文 ﷺ", "$\\alpha", "31"} == set(texts(svg))
