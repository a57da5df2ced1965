"""Domination and winners, against a reading of their definitions one pair at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_cli.pareto import Standing, best, dominated, winners

QUICK = settings(max_examples=100, deadline=None)
SHARES = st.sampled_from([0.0, 0.05, 0.25, 0.5, 1.0])
STANDINGS = st.lists(
    st.builds(Standing, st.sampled_from("abc"), SHARES, st.none() | SHARES, st.none() | SHARES), max_size=8
)


def at(attack_success: float, retention: float | None, method: str = "a", summary: float | None = 0.5) -> Standing:
    return Standing(method, attack_success, retention, summary)


@pytest.mark.parametrize(
    ("points", "want"),
    [
        ([at(0.1, 0.9), at(0.1, 0.8)], [False, True]),
        ([at(0.1, 0.9), at(0.2, 0.9)], [False, True]),
        ([at(0.1, 0.9), at(0.2, 0.8)], [False, True]),
        ([at(0.1, 0.5), at(0.2, 0.8)], [False, False]),
        ([at(0.1, 0.9), at(0.1, 0.9)], [False, False]),  # equals do not dominate each other
        ([at(0.0, 1.0), at(1.0, None)], [False, False]),
        ([], []),
    ],
)
def test_domination_by_hand(points: list[Standing], want: list[bool]) -> None:
    assert dominated(points) == want


@QUICK
@given(STANDINGS)
def test_what_is_not_dominated_is_beaten_by_nobody(points: list[Standing]) -> None:
    for point, is_worse in zip(points, dominated(points), strict=True):
        beaten = [
            other
            for other in points
            if other.retention is not None
            and point.retention is not None
            and other.attack_success <= point.attack_success
            and other.retention >= point.retention
            and (other.attack_success, other.retention) != (point.attack_success, point.retention)
        ]
        assert is_worse == bool(beaten)


def test_the_best_keeps_most_within_the_limit() -> None:
    points = [at(0.0, 0.5), at(0.1, 0.7), at(0.3, 0.9)]
    assert best(points, 0.0, {"a"}) == 0
    assert best(points, 0.1, {"a"}) == 1  # at the limit is within it
    assert best(points, 0.2, {"a"}) == 1
    assert best(points, 1.0, {"a"}) == 2
    assert best(points, 1.0, {"b"}) is None
    assert best([at(0.0, None)], 1.0, {"a"}) is None


def test_among_equals_the_summary_decides_then_safety_then_the_order() -> None:
    assert best([at(0.0, 1.0, summary=0.8), at(0.1, 1.0, summary=0.9)], 1.0, {"a"}) == 1
    assert best([at(0.1, 1.0), at(0.0, 1.0)], 1.0, {"a"}) == 1
    assert best([at(0.0, 1.0), at(0.0, 1.0)], 1.0, {"a"}) == 0


def test_winners_are_one_point_of_each_method_that_keeps_as_much_as_any() -> None:
    points = [
        at(0.0, 0.9, "a", 0.90), at(0.0, 1.0, "a", 0.95), at(0.0, 1.0, "a", 0.97),
        at(0.0, 1.0, "b", 0.99), at(0.0, 0.99, "c", 0.99), at(0.5, 1.0, "d", 0.6),
    ]  # fmt: skip
    assert winners(points, 0.1) == (3, 2)
    assert winners(points, 0.5) == (3, 2, 5)
    assert winners(points[:1], 0.1) == (0,)
    assert winners([at(0.2, 1.0)], 0.1) == ()


@QUICK
@given(STANDINGS, SHARES)
def test_no_admitted_point_keeps_more_than_a_winner(points: list[Standing], limit: float) -> None:
    found = winners(points, limit)
    able = [point for point in points if point.attack_success <= limit and point.retention is not None]
    assert bool(found) == bool(able)
    for place in found:
        assert points[place].attack_success <= limit
        assert points[place].retention == max(point.retention or 0.0 for point in able)
    assert len({points[place].method for place in found}) == len(found)
