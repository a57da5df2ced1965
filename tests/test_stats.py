"""Intervals, paired tests, agreement, retention and the summary against scipy and by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from csulora_cli.stats import Count, wilson

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
