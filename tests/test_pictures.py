"""From reports to pictures: layers and modules, and the plane of a comparison."""

import pytest
from example_reports import compare_report, module

from csulora_cli import pictures
from csulora_cli.compare_report import Origin
from csulora_cli.figures import Grid
from csulora_cli.report import ModuleRecord

# Layers and modules


def shares(*modules: ModuleRecord) -> Grid:
    return pictures.module_grid(modules, lambda m: (m.energy * m.moved, m.energy))


def test_layers_are_rows_in_their_order_and_kinds_are_columns() -> None:
    found = [
        module("model.layers.10.mlp.up_proj", moved=0.1),
        module("model.layers.2.mlp.up_proj", moved=0.2),
        module("model.layers.2.mlp.down_proj", moved=0.3),
        module("lm_head", moved=0.4),
    ]
    grid = shares(*found)
    assert grid.rows == ("2", "10", "–")
    assert grid.columns == ("up_proj", "down_proj", "lm_head")
    assert grid.values == (
        (pytest.approx(0.2), pytest.approx(0.3), None),
        (pytest.approx(0.1), None, None),
        (None, None, pytest.approx(0.4)),
    )


def test_columns_are_told_apart_and_experts_share_one() -> None:
    found = [
        module("vision.layers.0.mlp.up", energy=1.0, moved=0.1),
        module("text.layers.0.mlp.up", energy=1.0, moved=0.2),
        module("text.layers.0.experts.0.up", energy=1.0, moved=0.0),
        module("text.layers.0.experts.31.up", energy=3.0, moved=1.0),
        module("text.layers.1.mlp.up", energy=1.0, moved=0.6),
    ]
    grid = shares(*found)
    assert grid.columns == ("vision.layers.*.mlp.up", "text.layers.*.mlp.up", "layers.*.experts.*.up")
    assert grid.values[0] == pytest.approx((0.1, 0.2, 0.75))


def test_a_module_without_energy_has_no_share_and_one_row_is_turned() -> None:
    grid = shares(module("a.up", energy=0.0), module("a.down", moved=0.5))
    assert (grid.rows, grid.columns) == (("up", "down"), ("–",))
    assert grid.values == ((None,), (pytest.approx(0.5),))
    assert shares(module("layers." + "9" * 5000 + ".up"), module("up")).columns == ("–",)


def test_the_plane_shows_every_point_as_what_it_is() -> None:
    report = compare_report()
    spots = {key: trace.spots for key, trace in pictures.traces_of(report).items()}
    assert len(spots) == len(report.methods) + 2
    found = [spot for (family, _), trace in spots.items() if family != "unrepaired" for spot in trace]
    assert [(spot.x, spot.y) for spot in found] == [(p.score.attack_success.share, p.kept) for p in report.points]
    assert [spot.is_filled for spot in found] == [not point.is_dominated for point in report.points]
    assert [spot.is_large for spot in found] == [point.origin is Origin.AUTO for point in report.points]
    assert {True, False} == {spot.is_filled for spot in found} == {spot.is_large for spot in found}
    assert (spots["unrepaired", "host"][0].x, spots["unrepaired", "adapter"][0].y) == (0.025, 1.0)
