"""Norms, distances and truncation of products that are never formed, against dense ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_cli.solver.lowrank import pad_rank, squared_distance, squared_norm, truncate

QUICK = settings(max_examples=25, deadline=None)
SIDES = st.integers(1, 12)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def products(pick: st.DrawFn) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in), the rank possibly larger than a side."""
    rows, columns, rank, seed = pick(SIDES), pick(SIDES), pick(SIDES), pick(st.integers(0, 10**6))
    return draw(seed, rows, rank), draw(seed + 1, rank, columns)


@QUICK
@given(products())
def test_squared_norm_is_the_dense_one(factors: tuple[Tensor, Tensor]) -> None:
    lora_b, lora_a = factors
    assert squared_norm(lora_b, lora_a) == pytest.approx(float((lora_b @ lora_a).square().sum()), rel=1e-10)


@QUICK
@given(products(), st.integers(1, 6))
def test_squared_distance_is_the_dense_one(factors: tuple[Tensor, Tensor], rank: int) -> None:
    lora_b, lora_a = factors
    other_b, other_a = draw(7, lora_b.shape[0], rank), draw(8, rank, lora_a.shape[1])
    want = float((lora_b @ lora_a - other_b @ other_a).square().sum())
    assert squared_distance(lora_b, lora_a, other_b, other_a) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12])
def test_distance_of_nearly_equal_products_loses_no_digits(gap: float) -> None:
    lora_b, lora_a, step = draw(1, 40, 4), draw(2, 4, 30), draw(3, 4, 30)
    moved = lora_a + gap * step
    want = float((lora_b @ (moved - lora_a)).square().sum())  # the difference of two floats this close is exact
    assert squared_distance(lora_b, lora_a, lora_b, moved) == pytest.approx(want, rel=1e-3)


def test_distance_of_a_product_to_itself_is_zero_to_rounding() -> None:
    lora_b, lora_a = draw(1, 40, 4), draw(2, 4, 30)
    mixing = draw(3, 4, 4)
    mixed = lora_b @ mixing, torch.linalg.solve(mixing, lora_a)
    assert squared_distance(lora_b, lora_a, *mixed) <= 1e-24 * squared_norm(lora_b, lora_a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_dtypes_are_widened_first(dtype: torch.dtype) -> None:
    lora_b, lora_a = (300 * draw(1, 20, 3)).to(dtype), (300 * draw(2, 3, 20)).to(dtype)
    want = float((lora_b.double() @ lora_a.double()).square().sum())  # far above what float16 holds
    assert squared_norm(lora_b, lora_a) == pytest.approx(want)
    assert squared_distance(lora_b, lora_a, torch.zeros_like(lora_b), lora_a) == pytest.approx(want)
    new_b, new_a, error = truncate(lora_b, lora_a, 3)
    assert new_b.dtype is new_a.dtype is torch.float64
    assert error < 1e-12


@QUICK
@given(products(), st.integers(1, 14))
def test_truncation_is_the_leading_part_of_the_dense_svd(factors: tuple[Tensor, Tensor], rank: int) -> None:
    lora_b, lora_a = factors
    update = lora_b @ lora_a
    new_b, new_a, error = truncate(lora_b, lora_a, rank)
    assert new_b.shape == (lora_b.shape[0], rank)
    assert new_a.shape == (rank, lora_a.shape[1])
    u, sigma, vt = torch.linalg.svd(update, full_matrices=False)
    best = u[:, :rank] * sigma[:rank] @ vt[:rank]
    assert float((new_b @ new_a - best).norm()) <= 1e-6 * float(sigma[0])
    dense_error = float((new_b @ new_a - update).norm() / update.norm())
    assert error == pytest.approx(dense_error, abs=1e-10)
    assert error == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), abs=1e-10)


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_no_product_of_that_rank_is_closer(seed: int, rank: int) -> None:
    lora_b, lora_a = draw(seed, 9, 5), draw(seed + 1, 5, 8)
    new_b, new_a, _ = truncate(lora_b, lora_a, rank)
    best = squared_distance(new_b, new_a, lora_b, lora_a)
    rivals = [(draw(seed + 2, 9, rank), draw(seed + 3, rank, 8)), (lora_b[:, :rank], lora_a[:rank])]
    for size in (1e-4, 1e-1):
        rivals.append((new_b + size * draw(seed + 4, 9, rank), new_a + size * draw(seed + 5, rank, 8)))
    assert all(best <= squared_distance(*rival, lora_b, lora_a) * (1 + 1e-12) for rival in rivals)


def test_truncation_splits_the_singular_values_evenly() -> None:
    new_b, new_a, _ = truncate(1e4 * draw(1, 20, 6), 1e-3 * draw(2, 6, 15), 4)
    assert torch.allclose(new_b.norm(dim=0), new_a.norm(dim=1))
    gram = new_b.mT @ new_b
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-9 * float(gram.max()))


def test_truncation_pads_a_smaller_rank_with_zeros() -> None:
    lora_b, lora_a = draw(1, 6, 2), draw(2, 2, 5)
    new_b, new_a, error = truncate(lora_b, lora_a, 8)
    assert torch.allclose(new_b @ new_a, lora_b @ lora_a)
    assert new_b[:, 5:].count_nonzero() == 0
    assert new_a[5:].count_nonzero() == 0
    assert error < 1e-14


def test_truncating_a_zero_product_gives_zeros_and_no_error() -> None:
    new_b, new_a, error = truncate(torch.zeros(6, 3), draw(1, 3, 5), 2)
    assert new_b.count_nonzero() == 0
    assert bool(torch.isfinite(new_a).all())
    assert error == 0.0
    assert squared_norm(torch.zeros(6, 3), draw(1, 3, 5)) == 0.0


@QUICK
@given(products(), st.integers(0, 9))
def test_padding_keeps_the_product_and_the_leading_factors(factors: tuple[Tensor, Tensor], extra: int) -> None:
    lora_b, lora_a = factors
    rank = lora_a.shape[0]
    new_b, new_a = pad_rank(lora_b, lora_a, rank + extra)
    assert new_b.shape[1] == new_a.shape[0] == rank + extra
    assert torch.equal(new_b[:, :rank], lora_b)
    assert torch.equal(new_a[:rank], lora_a)
    assert new_b[:, rank:].count_nonzero() + new_a[rank:].count_nonzero() == 0
    assert torch.allclose(new_b @ new_a, lora_b @ lora_a, rtol=1e-12, atol=1e-12)


def test_padding_keeps_the_dtype() -> None:
    new_b, new_a = pad_rank(torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.float16), 5)
    assert (new_b.dtype, new_a.dtype) == (torch.bfloat16, torch.float16)
