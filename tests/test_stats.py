"""Intervals, paired tests, agreement, retention and the summary against scipy and by hand."""

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from csulora_cli.stats import Agreement, Count, PairedTest, cohen_kappa, mcnemar, retention, summary_score, wilson

QUICK = settings(max_examples=50, deadline=None)


@QUICK
@given(st.integers(1, 500), st.data())
def test_wilson_is_what_scipy_computes(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    want = binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(count, total) == pytest.approx((want.low, want.high), abs=1e-12)
    found = Count.of(count, total)
    assert (found.low, found.high) == wilson(count, total)


@QUICK
@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_stays_within_bounds(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = wilson(count, total)
    assert 0 <= low <= count / total <= high <= 1


@pytest.mark.parametrize(("lost", "gained"), list(product((0, 1, 2, 3, 7, 20), repeat=2)))
def test_mcnemar_is_the_binomial_test_on_discordant_pairs(lost: int, gained: int) -> None:
    want = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(want, rel=1e-12)


def test_mcnemar_of_many_pairs_is_exact() -> None:
    assert mcnemar(2000, 0) == pytest.approx(0.0, abs=1e-300)
    assert mcnemar(1040, 960) == pytest.approx(binomtest(1040, 2000, 0.5).pvalue, rel=1e-9)


def test_pairs_are_counted_by_which_side_alone_has_the_event() -> None:
    first = [True, True, True, False, False, True]
    second = [True, False, False, True, False, False]
    assert PairedTest.of(first, second) == PairedTest(3, 1, binomtest(3, 4, 0.5).pvalue)
    assert PairedTest.of([], []) == PairedTest(0, 0, 1.0)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        PairedTest.of([True, False], [True])


def test_kappa_by_hand() -> None:
    # J. Cohen's two-by-two: 20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5
    first = [True] * 20 + [True] * 5 + [False] * 10 + [False] * 15
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert Agreement.of(first, second) == Agreement(Count.of(35, 50), cohen_kappa(first, second))


def test_kappa_is_one_minus_one_or_undefined_at_its_ends() -> None:
    assert cohen_kappa([True, False], [True, False]) == 1.0
    assert cohen_kappa([True, False], [False, True]) == -1.0
    assert cohen_kappa([True, True], [True, True]) is None
    assert cohen_kappa([], []) is None


@pytest.mark.parametrize(
    ("host", "adapter", "repaired", "want"),
    [
        (0.0, 1.0, 0.97, 0.97),
        (0.2, 1.0, 0.6, 0.5),
        (-2.0, -0.5, -1.0, 2 / 3),  # −NLL
        (0.2, 1.0, 0.1, -0.125),  # worse than the host
        (0.0, 0.5, 0.75, 1.5),  # better than the adapter
        (0.5, 0.54, 0.5, None),  # nothing was gained
        (0.5, 0.2, 0.4, None),
        (0.0, math.nan, 0.5, None),
        (-math.inf, 0.0, -1.0, None),
        (-1.0, 0.0, -math.inf, None),
    ],
)
def test_retention_by_hand(host: float, adapter: float, repaired: float, want: float | None) -> None:
    assert retention(host, adapter, repaired, 0.05) == (None if want is None else pytest.approx(want))


def test_the_summary_by_hand() -> None:
    assert summary_score(0.0, 0.0, 1.0) == 1.0
    assert summary_score(0.1, 0.2, 0.7) == pytest.approx(3 / (1 / 0.9 + 1 / 0.8 + 1 / 0.7))
    assert summary_score(0.5, 0.0, 1.4) == pytest.approx(3 / (2 + 1 + 1))
    assert summary_score(1.0, 0.0, 1.0) == summary_score(0.0, 1.0, 1.0) == summary_score(0.0, 0.0, -0.3) == 0.0
    assert summary_score(0.0, 0.0, None) is None
