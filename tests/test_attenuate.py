"""The closed forms that change A alone, against dense float64 references."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_cli.solver.attenuate import (
    MOST_OUTWEIGHED,
    by_diagonal,
    by_directions,
    by_moments,
    by_tokens,
    contrast,
    definite,
    displacement_gains,
    penalised_change,
    unit_trace_scale,
)
from csulora_cli.solver.lowrank import truncate

QUICK = settings(max_examples=25, deadline=None)
STRENGTHS = st.sampled_from([0.01, 0.3, 1.0, 7.0, 100.0])
PROTECTS = st.sampled_from([0.0, 0.2, 1.0, 30.0])


@dataclass(frozen=True)
class Problem:
    """An update B·A, scaled inputs H and G, and how much both cost."""

    lora_b: Tensor
    lora_a: Tensor
    faded: Tensor
    benign: Tensor
    protect: float
    strength: float

    @property
    def faded_moment(self) -> Tensor:
        return self.faded @ self.faded.mT

    @property
    def benign_moment(self) -> Tensor:
        return self.benign @ self.benign.mT

    @property
    def moments(self) -> tuple[Tensor, Tensor, float]:
        return self.faded_moment, self.benign_moment, self.protect

    def moments_form(self, lora_a: Tensor) -> Tensor:
        return by_moments(lora_a, *self.moments, self.strength)

    def contrast_form(self, lora_a: Tensor) -> Tensor:
        return by_moments(lora_a, *self.moments, self.strength, contrast(*self.moments))

    def tokens_form(self, lora_a: Tensor) -> Tensor:
        return by_tokens(lora_a, self.faded, self.benign, self.protect, self.strength)

    def forms(self, tolerance: float) -> list[tuple[Callable[[Tensor], Tensor], float]]:
        """All forms, with what they may differ by: beside a λ²K that is not too large the identity loses digits."""
        outweighed = self.strength**2 * float(contrast(*self.moments).trace())
        lost = 1e-15 * outweighed if outweighed <= MOST_OUTWEIGHED else 0.0
        return [
            (self.moments_form, tolerance),
            (self.tokens_form, tolerance),
            (self.contrast_form, max(tolerance, lost)),
        ]

    def dense(self) -> Tensor:
        return dense(self.lora_a, *self.moments, self.strength)

    def change(self, repaired: Tensor) -> Tensor:
        """‖X − Δ‖² + β‖(X − Δ) G‖² of a dense X."""
        change = repaired - self.lora_b @ self.lora_a
        return change.square().sum() + self.protect * (change @ self.benign).square().sum()

    def objective(self, repaired: Tensor) -> Tensor:
        """‖(X − Δ) M^½‖² + λ²‖X C_h M^−½‖² of a dense X."""
        faded = repaired @ self.faded_moment
        kept = torch.eye(len(self.faded), dtype=torch.float64) + self.protect * self.benign_moment
        penalty = (faded * torch.linalg.solve(kept, faded, left=False)).sum()
        return self.change(repaired) + self.strength**2 * penalty

    def penalised(self, repaired: Tensor) -> Tensor:
        """‖X − Δ‖² + β‖(X − Δ) G‖² + λ‖X H‖² of a dense X."""
        return self.change(repaired) + self.strength * (repaired @ self.faded).square().sum()


def dense(lora_a: Tensor, faded: Tensor, benign: Tensor, protect: float, strength: float) -> Tensor:
    """A M (M + λ²C_h M⁻¹ C_h)⁻¹ with M = I + βC_b, by the directions v with C_h v = μMv: v fades by 1 + λ²μ²."""
    kept = torch.eye(lora_a.shape[1], dtype=torch.float64) + protect * benign
    lower = torch.linalg.cholesky(kept)
    whitened = torch.linalg.solve_triangular(lower, faded, upper=False)
    whitened = torch.linalg.solve_triangular(lower, whitened.mT, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    faded = (lora_a @ lower @ vectors) / (1 + (strength * values).square())
    return torch.linalg.solve_triangular(lower, faded @ vectors.mT, upper=False, left=False)


def first_order(lora_a: Tensor, moment: Tensor, strength: float) -> Tensor:
    """A (I + λC)⁻¹ as it is written."""
    eye = torch.eye(len(moment), dtype=torch.float64)
    return torch.linalg.solve(eye + strength * moment, lora_a, left=False)


def unit_trace(inputs: Tensor) -> Tensor:
    return inputs * unit_trace_scale(inputs.shape[0], float(inputs.square().sum())) ** 0.5


def random_problem(
    seed: int, features: int = 7, tokens: int = 5, rank: int = 3, protect: float = 0.5, strength: float = 2.0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    faded, benign = unit_trace(draw(features, tokens)), unit_trace(draw(features, tokens + 2))
    return Problem(draw(6, rank), draw(rank, features), faded, benign, protect, strength)


PROBLEMS = st.builds(
    random_problem,
    seed=st.integers(0, 10**6),
    features=st.integers(1, 24),
    tokens=st.integers(1, 30),
    rank=st.integers(1, 6),
    protect=PROTECTS,
    strength=STRENGTHS,
)


def close(have: Tensor, want: Tensor, tolerance: float = 1e-10) -> bool:
    return float((have - want).abs().max()) <= tolerance * (1 + float(want.abs().max()))


@QUICK
@given(PROBLEMS)
def test_each_form_is_the_dense_formula(problem: Problem) -> None:
    for form, tolerance in problem.forms(1e-10):
        assert close(form(problem.lora_a), problem.dense(), tolerance)


@QUICK
@given(PROBLEMS)
def test_diagonal_form_is_the_dense_formula(problem: Problem) -> None:
    faded, benign = problem.faded.square().sum(1), problem.benign.square().sum(1)
    want = dense(problem.lora_a, faded.diag(), benign.diag(), problem.protect, problem.strength)
    assert close(by_diagonal(problem.lora_a, faded, benign, problem.protect, problem.strength), want)


@QUICK
@given(PROBLEMS)
def test_woodbury_agrees_with_the_direct_solve(problem: Problem) -> None:
    assert close(problem.tokens_form(problem.lora_a), problem.moments_form(problem.lora_a))


@QUICK
@given(PROBLEMS)
def test_without_benign_inputs_is_the_same_as_no_protection(problem: Problem) -> None:
    moment = problem.faded_moment
    want = dense(problem.lora_a, moment, torch.zeros_like(moment), 0.0, problem.strength)
    assert close(by_moments(problem.lora_a, moment, None, 3.0, problem.strength), want)
    assert close(by_moments(problem.lora_a, moment, problem.benign_moment, 0.0, problem.strength), want)
    tolerance = replace(problem, protect=0.0).forms(1e-10)[-1][1]
    for given_contrast in (contrast(moment, None, 3.0), contrast(moment, problem.benign_moment, 0.0)):
        assert close(by_moments(problem.lora_a, moment, None, 3.0, problem.strength, given_contrast), want, tolerance)
    assert close(by_tokens(problem.lora_a, problem.faded, None, 3.0, problem.strength), want)
    assert close(by_tokens(problem.lora_a, problem.faded, problem.benign, 0.0, problem.strength), want)


@QUICK
@given(seed=st.integers(0, 10**6), features=st.integers(2, 20), data=st.data(), strength=STRENGTHS)
def test_directions_form_is_the_dense_formula(seed: int, features: int, data: st.DataObject, strength: float) -> None:
    kept = data.draw(st.integers(1, features))
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(3, features, generator=generator, dtype=torch.float64)
    square = torch.randn(features, features, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q[:, :kept]
    gains = torch.rand(kept, generator=generator, dtype=torch.float64) * 10
    moment = basis * gains @ basis.mT
    assert close(by_directions(lora_a, basis, gains, strength), first_order(lora_a, moment, strength))


@QUICK
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), features=st.integers(1, 12), strength=STRENGTHS)
def test_keep_out_by_singular_directions_is_the_solve_with_the_displacement(
    seed: int, rows: int, features: int, strength: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    displacement = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    lora_a = torch.randn(2, features, generator=generator, dtype=torch.float64)
    _, sigma, basis = torch.linalg.svd(displacement, full_matrices=False)
    total = float(displacement.square().sum())
    moment = displacement.mT @ displacement * features / total
    gains = displacement_gains(sigma, features, total)
    assert close(by_directions(lora_a, basis.mT, gains, strength), first_order(lora_a, moment, strength))
    assert float(gains.sum()) == pytest.approx(features)


@QUICK
@given(PROBLEMS)
def test_gradient_of_the_objective_vanishes_at_the_closed_form(problem: Problem) -> None:
    repaired = (problem.lora_b @ problem.moments_form(problem.lora_a)).requires_grad_()
    value = problem.objective(repaired)
    (gradient,) = torch.autograd.grad(value, repaired)
    size = (1 + problem.protect + problem.strength) * problem.lora_a.shape[1]
    assert float(gradient.abs().max()) <= 1e-10 * size * (1 + float(repaired.detach().abs().max()))


@QUICK
@given(PROBLEMS, st.integers(0, 10**6))
def test_no_perturbation_of_the_closed_form_is_better(problem: Problem, seed: int) -> None:
    repaired = problem.lora_b @ problem.moments_form(problem.lora_a)
    best = float(problem.objective(repaired))
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1.0):
        step = size * torch.randn(repaired.shape, generator=generator, dtype=torch.float64)
        assert float(problem.objective(repaired + step)) > best
        # The objective is a quadratic: what a step adds is its own curvature, at least ‖step‖².
        assert float(problem.objective(repaired + step)) - best >= float(step.square().sum()) * (1 - 1e-6) - 1e-9 * best


@pytest.mark.parametrize("protect", [0.0, 1.5])
def test_a_numerical_minimiser_finds_the_closed_form(protect: float) -> None:
    problem = random_problem(3, protect=protect)
    guess = torch.zeros(6, 7, dtype=torch.float64, requires_grad=True)
    minimiser = torch.optim.LBFGS(
        [guess], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def evaluate() -> Tensor:
        minimiser.zero_grad()
        value = problem.objective(guess)
        value.backward()
        return value

    minimiser.step(evaluate)
    assert close(problem.lora_b @ problem.tokens_form(problem.lora_a), guess.detach(), 1e-7)


@QUICK
@given(PROBLEMS)
def test_objective_is_not_above_the_trained_update_nor_any_truncation_or_shrink(problem: Problem) -> None:
    best = float(problem.objective(problem.lora_b @ problem.moments_form(problem.lora_a)))
    update = problem.lora_b @ problem.lora_a
    rivals = [scale * update for scale in (0.0, 0.3, 0.7, 1.0)]
    for rank in range(1, problem.lora_a.shape[0] + 1):
        lora_b, lora_a, _ = truncate(problem.lora_b, problem.lora_a, rank)
        rivals.append(lora_b @ lora_a)
    assert all(best <= float(problem.objective(rival)) * (1 + 1e-12) for rival in rivals)


@QUICK
@given(PROBLEMS)
def test_strength_zero_gives_a_back(problem: Problem) -> None:
    lora_a = problem.lora_a
    basis, gains = torch.linalg.qr(problem.faded).Q, torch.ones(min(problem.faded.shape), dtype=torch.float64)
    assert torch.equal(by_moments(lora_a, *problem.moments, 0.0), lora_a)
    assert torch.equal(by_moments(lora_a, *problem.moments, 0.0, contrast(*problem.moments)), lora_a)
    assert torch.equal(by_tokens(lora_a, problem.faded, problem.benign, problem.protect, 0.0), lora_a)
    assert torch.equal(by_directions(lora_a, basis, gains, 0.0), lora_a)
    diagonals = problem.faded_moment.diagonal(), problem.benign_moment.diagonal()
    assert torch.equal(by_diagonal(lora_a, *diagonals, problem.protect, 0.0), lora_a)


@QUICK
@given(PROBLEMS, st.integers(1, 4))
def test_modules_that_share_an_input_can_be_stacked(problem: Problem, count: int) -> None:
    parts = [problem.lora_a * (index + 1) - index for index in range(count)]
    for form, tolerance in problem.forms(1e-12):
        stacked = form(torch.cat(parts))
        assert close(stacked, torch.cat([form(part) for part in parts]), tolerance)


@QUICK
@given(PROBLEMS, st.integers(0, 10**6))
def test_rotating_the_factors_does_not_change_the_repaired_update(problem: Problem, seed: int) -> None:
    rank = problem.lora_a.shape[0]
    mixing = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixing = torch.linalg.qr(mixing).Q * torch.arange(1, rank + 1)  # condition number r at most
    for form, tolerance in problem.forms(1e-10):
        plain = problem.lora_b @ form(problem.lora_a)
        mixed = problem.lora_b @ mixing @ form(torch.linalg.solve(mixing, problem.lora_a))
        assert close(mixed, plain, tolerance)


@QUICK
@given(PROBLEMS, st.sampled_from([1e3, 1e4, 1e6]))
def test_large_strengths_stay_accurate(problem: Problem, strength: float) -> None:
    moment = problem.faded_moment
    # Without protection the eigenvectors of C_h give A' with no cancellation at all.
    values, vectors = torch.linalg.eigh(moment)
    exact = (problem.lora_a @ vectors / (1 + (strength * values).square())) @ vectors.mT
    for form, tolerance in replace(problem, protect=0.0, strength=strength).forms(1e-7):
        assert close(form(problem.lora_a), exact, tolerance)
    for form, tolerance in replace(problem, strength=strength).forms(1e-7):
        assert close(form(problem.lora_a), dense(problem.lora_a, *problem.moments, strength), tolerance)


def test_wide_inputs_at_large_strength_agree_with_the_direct_solve() -> None:
    problem = random_problem(5, features=192, tokens=24, strength=1e6, protect=1.0)
    assert close(problem.tokens_form(problem.lora_a), problem.dense(), 1e-7)
    assert float((problem.tokens_form(problem.lora_a) @ problem.faded).abs().max()) < 1e-3


@QUICK
@given(PROBLEMS)
def test_more_strength_lowers_the_penalty_and_raises_the_distance(problem: Problem) -> None:
    distances, penalties = [], []
    values, vectors = torch.linalg.eigh(contrast(*problem.moments))
    half = vectors * values.clamp(min=0).sqrt()  # K^½
    for strength in (0.0, 0.1, 1.0, 10.0, 1000.0):
        moments = (problem.faded_moment, problem.benign_moment)
        repaired = problem.lora_b @ by_moments(problem.lora_a, *moments, problem.protect, strength)
        change = repaired - problem.lora_b @ problem.lora_a
        distances.append(float(change.square().sum() + problem.protect * (change @ problem.benign).square().sum()))
        penalties.append(float((repaired @ half).square().sum()))
    slack = 1e-12 * (1 + penalties[0])
    assert all(after >= before - slack for before, after in pairwise(distances))
    assert all(after <= before + slack for before, after in pairwise(penalties))


@QUICK
@given(PROBLEMS)
def test_penalised_change_is_the_dense_objective(problem: Problem) -> None:
    repaired = 0.5 * problem.lora_b @ problem.lora_a
    change = repaired - problem.lora_b @ problem.lora_a
    parts = [change, change @ problem.benign, repaired @ problem.faded]
    distance, protected, penalty = (float(part.square().sum()) for part in parts)
    have = penalised_change(distance, protected, penalty, problem.protect, problem.strength)
    assert have == pytest.approx(float(problem.penalised(repaired)))


@QUICK
@given(PROBLEMS)
def test_the_penalised_change_is_not_above_the_trained_update_either(problem: Problem) -> None:
    repaired = problem.lora_b @ problem.contrast_form(problem.lora_a)
    assert float(problem.penalised(repaired)) <= float(problem.penalised(problem.lora_b @ problem.lora_a)) * (1 + 1e-12)


@QUICK
@given(PROBLEMS)
def test_it_fades_less_below_and_more_above_than_a_penalty_of_the_first_order(problem: Problem) -> None:
    """Both halve at μ = 1/λ."""
    ratios = torch.logspace(-3, 3, 13, dtype=torch.float64) / problem.strength
    ones, nothing = torch.ones(1, len(ratios), dtype=torch.float64), torch.zeros_like(ratios)
    second = by_diagonal(ones, ratios, nothing, 0.0, problem.strength)[0]
    first = 1 / (1 + problem.strength * ratios)
    below, above = ratios * problem.strength < 0.99, ratios * problem.strength > 1.01
    assert bool((second[below] > first[below]).all())
    assert bool((second[above] < first[above]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtypes_are_solved_in_float64_and_not_modified(dtype: torch.dtype) -> None:
    problem = random_problem(1)
    given_tensors = [problem.lora_a.to(dtype), problem.faded.to(dtype), problem.benign.to(dtype)]
    before = [tensor.clone() for tensor in given_tensors]
    lora_a, faded, benign = given_tensors
    tokens = by_tokens(lora_a, faded, benign, 1.0, 2.0)
    wide = [tensor.double() for tensor in given_tensors]
    assert tokens.dtype is torch.float64
    assert close(tokens, dense(wide[0], wide[1] @ wide[1].mT, wide[2] @ wide[2].mT, 1.0, 2.0))
    assert all(torch.equal(now, then) for now, then in zip(given_tensors, before, strict=True))


def test_moments_are_not_modified() -> None:
    problem = random_problem(2)
    moment, benign = problem.faded_moment, problem.benign_moment
    before = moment.clone(), benign.clone()
    by_moments(problem.lora_a, moment, benign, 1.0, 1.0)
    contrasted = contrast(moment, benign, 1.0)
    given_contrast = contrasted.clone()
    by_moments(problem.lora_a, moment, benign, 1.0, 1.0, contrasted)
    assert torch.equal(contrasted, given_contrast)
    assert torch.equal(moment, before[0])
    assert torch.equal(benign, before[1])


def test_unit_trace_scale_gives_trace_in_and_survives_no_energy() -> None:
    inputs = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = unit_trace(inputs)
    assert float((scaled @ scaled.mT).trace()) == pytest.approx(9)
    assert unit_trace_scale(9, 0.0) == 0.0


def test_inputs_without_energy_leave_the_update_alone() -> None:
    problem = random_problem(4)
    silent = torch.zeros_like(problem.faded)
    assert torch.equal(by_tokens(problem.lora_a, silent, None, 0.0, 10.0), problem.lora_a)
    assert torch.equal(by_moments(problem.lora_a, silent @ silent.mT, None, 0.0, 10.0), problem.lora_a)


@pytest.mark.parametrize("strength", [0.25, 4.0, 9.97, 10.0, 30.0])
def test_moments_that_rounding_made_indefinite_are_solved_as_the_nearest_that_are_not(strength: float) -> None:
    """Below the null spaces of C_h and C_b lies −1e-5, which β = 1e6 makes −9 in M."""
    problem = random_problem(3, features=12, tokens=5, strength=strength, protect=1e6)

    def rounded(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return (vectors * torch.where(values < 1e-9, -1e-5, values)) @ vectors.mT

    faded, benign, protect = rounded(problem.faded_moment), rounded(problem.benign_moment), problem.protect
    whole = definite(benign, protect)
    assert whole is not None
    assert not torch.equal(whole, benign)
    have = by_moments(problem.lora_a, faded, whole, protect, strength, contrast(faded, whole, protect))
    assert close(have, problem.dense(), 1e-4)
    assert close(by_moments(problem.lora_a, faded, benign, protect, strength), problem.dense(), 1e-4)


@QUICK
@given(PROBLEMS)
def test_moments_that_are_definite_stay_as_they_are(problem: Problem) -> None:
    moment = problem.benign_moment
    assert definite(moment, problem.protect) is (moment if problem.protect > 0 else None)
    assert definite(None, problem.protect) is None
