"""The three-way split, against dense projectors."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_cli.solver.lowrank import squared_norm, truncate
from csulora_cli.solver.split import Parts, Split, chance_shares, penalised_change, split

QUICK = settings(max_examples=25, deadline=None)
STRENGTHS = st.sampled_from([0.0, 0.1, 1.0, 4.0, 100.0, 1e6])


@dataclass(frozen=True)
class Problem:
    """An update B·A and two orthonormal bases."""

    lora_b: Tensor
    lora_a: Tensor
    left: Tensor
    right: Tensor

    @property
    def update(self) -> Tensor:
        return self.lora_b @ self.lora_a

    def split(self) -> Split:
        return split(self.lora_b, self.lora_a, self.left, self.right)

    def dense(self, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F, R and O of a dense update."""
        on_left, on_right = self.left @ self.left.mT, self.right @ self.right.mT
        off_left = torch.eye(on_left.shape[0], dtype=torch.float64) - on_left
        off_right = torch.eye(on_right.shape[0], dtype=torch.float64) - on_right
        partial = on_left @ update @ off_right + off_left @ update @ on_right
        return on_left @ update @ on_right, partial, off_left @ update @ off_right

    def shares(self) -> tuple[float, float, float]:
        full, partial, off = (float(part.square().sum()) for part in self.dense(self.update))
        return full / (full + partial + off), partial / (full + partial + off), off / (full + partial + off)

    def closest(self, strength: float) -> Tensor:
        full, partial, off = self.dense(self.update)
        _, on_one_side, outside = self.shares()
        return full + partial / (1 + strength * on_one_side) + off / (1 + strength * outside)

    def objective(self, repaired: Tensor, strength: float) -> Tensor:
        """‖X − Δ‖² + λρ_R‖R(X)‖² + λρ_O‖O(X)‖², ρ of Δ."""
        _, partial, off = self.dense(repaired)
        _, on_one_side, outside = self.shares()
        cost = on_one_side * partial.square().sum() + outside * off.square().sum()
        return (repaired - self.update).square().sum() + strength * cost


def random_problem(seed: int, rows: int = 8, columns: int = 6, rank: int = 2, directions: int = 3) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(height: int, width: int) -> Tensor:
        return torch.randn(height, width, generator=generator, dtype=torch.float64)

    directions = min(directions, rows, columns)
    left, right = (torch.linalg.qr(draw(side, directions)).Q for side in (rows, columns))
    return Problem(draw(rows, rank), draw(rank, columns), left, right)


PROBLEMS = st.builds(
    random_problem,
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    rank=st.integers(1, 5),
    directions=st.integers(1, 14),
)


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    return factors[0] @ factors[1]


def close(have: Tensor, want: Tensor, tolerance: float = 1e-10) -> bool:
    return float((have - want).abs().max()) <= tolerance * (1 + float(want.abs().max()))


@QUICK
@given(PROBLEMS)
def test_parts_are_the_energies_of_the_dense_parts(problem: Problem) -> None:
    parts = problem.split().parts
    scale = float(problem.update.square().sum())
    want = [float(part.square().sum()) for part in problem.dense(problem.update)]
    assert [parts.full, parts.partial, parts.off] == pytest.approx(want, abs=1e-12 * scale)


@QUICK
@given(PROBLEMS)
def test_parts_are_orthogonal_and_add_up(problem: Problem) -> None:
    full, partial, off = problem.dense(problem.update)
    scale = float(problem.update.square().sum())
    assert close(full + partial + off, problem.update)
    for one, other in ((full, partial), (full, off), (partial, off)):
        assert abs(float((one * other).sum())) <= 1e-12 * scale
    parts = problem.split().parts
    assert parts.total == pytest.approx(scale)
    assert parts.total == pytest.approx(squared_norm(problem.lora_b, problem.lora_a))
    shares = parts.shares
    assert shares.full + shares.partial + shares.off == pytest.approx(1)


@QUICK
@given(PROBLEMS, STRENGTHS)
def test_closest_is_the_dense_formula(problem: Problem, strength: float) -> None:
    assert close(product(problem.split().closest(strength)), problem.closest(strength))


@QUICK
@given(PROBLEMS, STRENGTHS)
def test_closest_has_rank_2r_at_most(problem: Problem, strength: float) -> None:
    columns, rows = problem.split().closest(strength)
    rank = problem.lora_a.shape[0]
    assert columns.shape == (problem.lora_b.shape[0], 2 * rank)
    assert rows.shape == (2 * rank, problem.lora_a.shape[1])


@QUICK
@given(PROBLEMS, STRENGTHS)
def test_gradient_of_the_objective_vanishes_at_the_closed_form(problem: Problem, strength: float) -> None:
    repaired = product(problem.split().closest(strength)).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.objective(repaired, strength), repaired)
    assert float(gradient.abs().max()) <= 1e-9 * (1 + strength) * (1 + float(repaired.detach().abs().max()))


def test_a_numerical_minimiser_finds_the_closed_form() -> None:
    problem = random_problem(3)
    guess = torch.zeros_like(problem.update, requires_grad=True)
    minimiser = torch.optim.LBFGS(
        [guess], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def evaluate() -> Tensor:
        minimiser.zero_grad()
        value = problem.objective(guess, 4.0)
        value.backward()
        return value

    minimiser.step(evaluate)
    assert close(product(problem.split().closest(4.0)), guess.detach(), 1e-7)


@QUICK
@given(PROBLEMS, STRENGTHS, st.integers(0, 10**6))
def test_no_rival_is_better(problem: Problem, strength: float, seed: int) -> None:
    repaired = product(problem.split().closest(strength))
    best = float(problem.objective(repaired, strength))
    step = torch.randn(repaired.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rivals = [repaired + size * step for size in (1e-3, 1.0)]
    rivals += [scale * problem.update for scale in (0.0, 0.5, 1.0)]
    for rank in range(1, problem.lora_a.shape[0] + 1):
        rivals.append(product(truncate(problem.lora_b, problem.lora_a, rank)[:2]))
    slack = 1e-12 * float(problem.update.square().sum()) * (1 + strength)
    assert all(best <= float(problem.objective(rival, strength)) + slack for rival in rivals)


@QUICK
@given(PROBLEMS, STRENGTHS, st.integers(0, 10**6))
def test_rotating_the_factors_does_not_change_the_repaired_update(problem: Problem, strength: float, seed: int) -> None:
    rank = problem.lora_a.shape[0]
    mixing = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixing = torch.linalg.qr(mixing).Q * torch.arange(1, rank + 1)
    mixed = split(problem.lora_b @ mixing, torch.linalg.solve(mixing, problem.lora_a), problem.left, problem.right)
    assert close(product(mixed.closest(strength)), product(problem.split().closest(strength)))


@QUICK
@given(PROBLEMS, STRENGTHS, st.sampled_from([-2.0, 1e-4, 0.5, 300.0]))
def test_scaling_the_update_scales_the_repaired_update(problem: Problem, strength: float, scale: float) -> None:
    scaled = split(scale * problem.lora_b, problem.lora_a, problem.left, problem.right)
    plain = product(problem.split().closest(strength))
    assert close(product(scaled.closest(strength)) / scale, plain)
    assert scaled.parts.shares.full == pytest.approx(problem.split().parts.shares.full, abs=1e-12)


@QUICK
@given(PROBLEMS)
def test_strength_zero_gives_the_update_back(problem: Problem) -> None:
    assert close(product(problem.split().closest(0.0)), problem.update, 1e-13)


@QUICK
@given(PROBLEMS)
def test_infinite_strength_leaves_the_fully_aligned_part(problem: Problem) -> None:
    # A part that carries no energy costs nothing, and there is nothing of it to remove.
    assert close(product(problem.split().closest(1e15)), problem.dense(problem.update)[0], 1e-6)


def test_complete_bases_keep_the_whole_update_at_any_strength() -> None:
    problem = random_problem(0, rows=5, columns=5, directions=5)
    assert close(product(problem.split().closest(1e6)), problem.update)


def test_a_zero_update_has_no_shares_and_stays_zero() -> None:
    problem = random_problem(0)
    nothing = split(torch.zeros_like(problem.lora_b), problem.lora_a, problem.left, problem.right)
    assert nothing.parts.shares == Parts(0.0, 0.0, 0.0)
    assert product(nothing.closest(5.0)).count_nonzero() == 0


def test_stored_dtypes_are_split_in_float64() -> None:
    problem = random_problem(1)
    halves = [tensor.to(torch.bfloat16) for tensor in (problem.lora_b, problem.lora_a)]
    parts = split(*halves, problem.left.float(), problem.right.float())
    assert {parts.lora_b.dtype, parts.lora_a.dtype, parts.on_b.dtype, parts.on_a.dtype} == {torch.float64}


@QUICK
@given(PROBLEMS, STRENGTHS)
def test_penalised_change_is_the_dense_objective(problem: Problem, strength: float) -> None:
    repaired = 0.6 * problem.update + 0.1
    parts = Parts(*(float(part.square().sum()) for part in problem.dense(repaired)))
    distance = float((repaired - problem.update).square().sum())
    have = penalised_change(distance, parts, Parts(*problem.shares()), strength)
    assert have == pytest.approx(float(problem.objective(repaired, strength)))


@QUICK
@given(st.integers(1, 5000), st.integers(1, 5000), st.data())
def test_chance_shares_add_up_to_one(rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(rows, columns)))
    chance = chance_shares(rows, columns, rank)
    assert chance.total == pytest.approx(1, abs=1e-15)
    assert chance.full == pytest.approx(rank * rank / (rows * columns))
    assert min(chance.full, chance.partial, chance.off) >= 0


def test_chance_shares_are_what_random_updates_have() -> None:
    shares = []
    for seed in range(400):
        problem = random_problem(seed, rows=12, columns=9, rank=2, directions=4)
        found = problem.split().parts.shares
        shares.append([found.full, found.partial, found.off])
    mean = torch.tensor(shares, dtype=torch.float64).mean(0)
    error = torch.tensor(shares, dtype=torch.float64).std(0) / 400**0.5
    chance = chance_shares(12, 9, 4)
    want = torch.tensor([chance.full, chance.partial, chance.off], dtype=torch.float64)
    assert bool(((mean - want).abs() < 4 * error).all())
