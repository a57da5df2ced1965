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

from csulora_cli.figures import Curve, Grid, curve, heat_map, log_ticks
from csulora_cli.text import printable

GRID = Grid(("0", "1"), ("q_proj", "up_proj"), ((0.0, 0.254), (None, 1.43)))
CURVE = Curve((1.0, 4.0, 16.0), (3.0, 0.4, 0.05), chosen=16.0, limit=0.07)


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


@pytest.mark.parametrize("svg", [heat_map(GRID, "x"), curve(CURVE, "x")], ids=["heat map", "curve"])
def test_a_picture_can_stand_in_a_page(svg: str) -> None:
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
    wanted = heat_map(GRID, "x"), curve(CURVE, "x")
    for key, value in {"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9, "axes.facecolor": "red"}.items():
        monkeypatch.setitem(mpl.rcParams, key, value)
    assert (heat_map(GRID, "x"), curve(CURVE, "x")) == wanted
    assert mpl.rcParams["font.size"] == 30


def test_letters_that_matplotlib_cannot_draw_are_no_matter() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = heat_map(Grid(("中文 ﷺ",), ("$\\alpha",), ((math.pi / 10,),)), "x")
    assert {"中文 ﷺ", "$\\alpha", "31"} == set(texts(svg))
