"""Divergences of the first answer token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csulora_cli.engine.measure import mean_kl

QUICK = settings(max_examples=50, deadline=None)


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_kl_by_hand() -> None:
    reference, other = logs([0.5, 0.5], [0.9, 0.1]), logs([0.25, 0.75], [0.5, 0.5])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert mean_kl(reference, other) == pytest.approx((first + second) / 2)


def test_a_token_that_the_reference_excludes_counts_nothing() -> None:
    want = math.log(2)
    assert mean_kl(logs([0.0, 1.0]), logs([0.5, 0.5])) == pytest.approx(want)
    assert mean_kl(logs([0.0, 1.0, 0.0]), logs([0.0, 0.5, 0.5])) == pytest.approx(want)


def test_a_token_that_only_the_other_excludes_is_infinitely_far() -> None:
    assert mean_kl(logs([0.5, 0.5]), logs([0.0, 1.0])) == math.inf


def test_equal_distributions_are_at_zero() -> None:
    log_probs = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert mean_kl(log_probs, log_probs) == 0.0
    assert mean_kl(log_probs, log_probs.double().log_softmax(-1)) >= 0.0


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 20))
def test_kl_is_the_sum_over_the_vocabulary(seed: int, rows: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference, other = torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
    want = torch.nn.functional.kl_div(other, reference, reduction="batchmean", log_target=True)
    assert mean_kl(reference, other) == pytest.approx(float(want), abs=1e-12)
