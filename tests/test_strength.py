"""The search for the smallest strength, against a linear scan."""

import bisect
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_cli.engine.strength import PATH, PathPoint, Search, smallest_strength

QUICK = settings(max_examples=50, deadline=None)
ADAPTER_KL = 10.0


def search(curve: list[float], limit: float) -> tuple[Search, list[float]]:
    """Search with a KL for every λ of the path; also the λ that were tried, in order."""
    tried: list[float] = []

    def try_strength(strength: float) -> PathPoint:
        tried.append(strength)
        return PathPoint(strength, curve[PATH.index(strength)], 0.0, 0.0)

    return smallest_strength(try_strength, limit, ADAPTER_KL), tried


def plateau(level: float) -> float:
    """The KL to which a λ must come down where the limit is out of reach: 98 % of the way, or a thousandth from it."""
    return max(ADAPTER_KL - 0.98 * (ADAPTER_KL - level), level + ADAPTER_KL / 1000)


CURVES = st.lists(st.floats(0, 10), min_size=len(PATH), max_size=len(PATH)).map(lambda kl: sorted(kl, reverse=True))


@QUICK
@given(CURVES, st.floats(0, 10))
def test_bisection_finds_what_a_linear_scan_finds(curve: list[float], limit: float) -> None:
    found, _ = search(curve, limit)
    good = [strength for strength, kl in zip(PATH, curve, strict=True) if kl <= limit]
    assert found.is_reached == bool(good)
    level = [strength for strength, kl in zip(PATH, curve, strict=True) if kl <= plateau(curve[-1]) + 1e-9]
    assert found.chosen.strength == (good or level)[0]
    assert found.chosen.harmful_kl == curve[PATH.index(found.chosen.strength)]
    assert found.limit == limit


@QUICK
@given(CURVES, st.floats(0, 10))
def test_what_is_found_is_what_plain_bisection_finds(curve: list[float], limit: float) -> None:
    found, _ = search(curve, limit)

    def first_within(bound: float) -> int:
        return bisect.bisect_left(curve, True, key=lambda kl: kl <= bound)

    place = first_within(limit)
    assert found.chosen.strength == PATH[first_within(plateau(curve[-1]) + 1e-9) if place == len(PATH) else place]


@pytest.mark.parametrize("power", [0.85, 1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("limit", [0.06, 0.5])
def test_on_a_curve_that_falls_as_a_power_four_tries_are_enough(power: float, limit: float) -> None:
    found, tried = search([16 / (1 + strength**power) for strength in PATH], limit)
    assert found.is_reached
    assert len(tried) <= 4  # plain bisection takes five or six


@pytest.mark.parametrize(("floor", "height"), [(3.43, 0.68), (8.56, 0.82), (1.14, 0.2)])
def test_on_a_curve_that_levels_off_above_the_limit_five_tries_are_enough(floor: float, height: float) -> None:
    found, tried = search([floor + height * 32 / strength for strength in PATH], 0.06)
    assert not found.is_reached
    assert len(tried) <= 5  # plain bisection takes eight or nine


@QUICK
@given(st.lists(st.floats(0, 10) | st.just(math.inf), min_size=len(PATH), max_size=len(PATH)), st.floats(0, 10))
def test_on_a_noisy_curve_the_chosen_point_still_meets_the_limit(curve: list[float], limit: float) -> None:
    found, _ = search(curve, limit)
    assert found.is_reached == (found.chosen.harmful_kl <= limit)


@QUICK
@given(CURVES, st.floats(0, 10))
def test_each_strength_is_tried_once_and_few_are(curve: list[float], limit: float) -> None:
    found, tried = search(curve, limit)
    assert len(set(tried)) == len(tried) <= 2 * (math.ceil(math.log2(len(PATH) + 1)) + 1)
    if found.is_reached:
        assert len(tried) <= math.ceil(math.log2(len(PATH) + 1)) + 1
    assert [point.strength for point in found.points] == sorted(tried)
    assert found.chosen in found.points


@pytest.mark.parametrize("place", range(len(PATH)))
def test_every_point_of_the_path_can_be_the_answer(place: int) -> None:
    found, _ = search([1.0] * place + [0.0] * (len(PATH) - place), 0.5)
    assert found.is_reached
    assert found.chosen.strength == PATH[place]


def test_a_limit_that_no_strength_meets_gives_the_strongest_that_still_helps() -> None:
    falling = [float(len(PATH) - place) for place in range(len(PATH))]
    found, _ = search(falling, 0.5)
    assert not found.is_reached
    assert found.chosen.strength == PATH[-1]


@pytest.mark.parametrize("place", [0, 1, 17, len(PATH) - 1])
def test_where_kl_levels_off_above_the_limit_the_plateau_begins_the_answer(place: int) -> None:
    found, _ = search([3.0] * place + [1.04] * (len(PATH) - 1 - place) + [1.0], 0.5)
    assert not found.is_reached
    assert found.chosen.strength == PATH[place]


def test_where_nearly_nothing_can_be_gained_the_weakest_is_taken() -> None:
    found, _ = search([ADAPTER_KL * (1 - 1e-4 * place / len(PATH)) for place in range(len(PATH))], 0.5)
    assert found.chosen.strength == PATH[0]


def test_a_limit_that_all_meet_gives_the_weakest() -> None:
    found, _ = search([0.1] * len(PATH), 0.5)
    assert found.is_reached
    assert found.chosen.strength == PATH[0]


def test_exactly_at_the_limit_is_met() -> None:
    assert search([0.5] * len(PATH), 0.5)[0].is_reached


def test_a_kl_that_is_not_a_number_never_meets_the_limit() -> None:
    found, _ = search([math.nan] * len(PATH), 1e9)
    assert not found.is_reached
    assert found.chosen.strength == PATH[-1]


def test_the_path_rises_by_half_octaves() -> None:
    assert all(after / before == pytest.approx(2**0.5, rel=0.01) for before, after in pairwise(PATH))
    assert PATH[0] < 0.1
    assert PATH[-1] > 10_000
