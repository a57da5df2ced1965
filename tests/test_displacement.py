"""Leading singular directions, against the dense SVD; both the exact and the sketched path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csulora_cli.solver import displacement as module
from csulora_cli.solver.displacement import Directions, leading_directions

QUICK = settings(max_examples=25, deadline=None)
SHAPES = [(96, 96), (160, 96), (96, 160)]


def with_spectrum(sigma: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A random float32 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    bases = [
        torch.linalg.qr(torch.randn(side, sigma.numel(), generator=generator, dtype=torch.float64)).Q
        for side in (rows, columns)
    ]
    return (bases[0] * sigma @ bases[1].mT).float()


def decaying(count: int, rate: float = 0.8) -> Tensor:
    return rate ** torch.arange(count, dtype=torch.float64)


def smallest_rank(matrix: Tensor, energy: float) -> int:
    squares = torch.linalg.svdvals(matrix.double()).square()
    return int((torch.cumsum(squares, 0) / squares.sum() < energy).sum()) + 1


def best_energy(matrix: Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(matrix.double()).square()
    return float(squares[:rank].sum() / squares.sum())


def captured(matrix: Tensor, found: Directions) -> float:
    """The share of ‖D‖² that both bases really hold: ‖Uᵀ D V‖² / ‖D‖²."""
    return float((found.left.mT @ matrix.double() @ found.right).square().sum() / matrix.double().square().sum())


def assert_orthonormal(found: Directions) -> None:
    for basis in (found.left, found.right):
        assert float((basis.mT @ basis - torch.eye(found.rank)).abs().max()) < 1e-6


@pytest.fixture(params=["exact", "sketch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both code paths on small matrices."""
    if request.param == "sketch":
        monkeypatch.setattr(module, "EXACT_SIDE", 16)
        monkeypatch.setattr(module, "BLOCK", 8)
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.usefixtures("path")
def test_the_smallest_rank_that_holds_the_energy(shape: tuple[int, int], energy: float) -> None:
    matrix = with_spectrum(decaying(60), *shape)
    found = leading_directions(matrix, energy)
    assert found.rank == smallest_rank(matrix, energy)
    assert found.energy >= energy - 1e-6
    assert captured(matrix, found) >= best_energy(matrix, found.rank) * 0.99
    assert_orthonormal(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 6, 20, 50])
@pytest.mark.usefixtures("path")
def test_a_fixed_rank_is_taken_as_given(shape: tuple[int, int], rank: int) -> None:
    matrix = with_spectrum(decaying(96), *shape)
    found = leading_directions(matrix, 0.1, rank)
    assert found.rank == rank
    assert captured(matrix, found) >= best_energy(matrix, rank) * 0.99
    assert found.energy == pytest.approx(best_energy(matrix, rank), rel=0.01)
    assert_orthonormal(found)


@pytest.fixture(scope="module")
def large_bases() -> tuple[Tensor, Tensor]:
    """Orthonormal (540, 540) and (600, 540): large enough for the sketch as it ships."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(side, 540, generator=generator, dtype=torch.float64) for side in (540, 600))
    return torch.linalg.qr(left).Q, torch.linalg.qr(right).Q


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 8}, {"rank": 64}, {"energy": 0.7}, {"energy": 0.9}])
@pytest.mark.parametrize("rate", [0.95, 0.98, 0.99])
def test_the_sketch_as_it_ships_is_within_one_percent_of_the_best_energy(
    large_bases: tuple[Tensor, Tensor], rate: float, options: dict[str, float]
) -> None:
    left, right = large_bases
    sigma = decaying(540, rate)
    matrix = (left * sigma @ right.mT).float()
    found = leading_directions(matrix, **options)  # type: ignore[arg-type]
    best = torch.cumsum(sigma.square(), 0) / sigma.square().sum()
    assert captured(matrix, found) >= 0.99 * float(best[found.rank - 1])
    if "energy" in options:
        assert found.rank <= int((best < options["energy"]).sum()) + 2  # the smallest is one less
    assert_orthonormal(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("path")
def test_a_flat_spectrum_is_still_answered(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(torch.ones(96, dtype=torch.float64), *shape)
    found = leading_directions(matrix, 0.9)
    assert found.rank == 87  # 0.9 · 96 = 86.4
    assert found.energy == pytest.approx(87 / 96, abs=1e-4)
    assert_orthonormal(found)


def test_a_flat_spectrum_falls_back_to_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIDE", 16)
    monkeypatch.setattr(module, "BLOCK", 8)
    calls: list[str] = []
    by_gram = module._by_gram
    monkeypatch.setattr(module, "_by_gram", lambda *given: calls.append("gram") or by_gram(*given))
    leading_directions(with_spectrum(decaying(60), 96, 96), 0.9)
    assert calls == []  # a decaying spectrum never gets there
    leading_directions(with_spectrum(torch.ones(96, dtype=torch.float64), 96, 96), 0.9)
    assert calls == ["gram"]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", [{"energy": 0.9}, {"energy": 1.0}, {"rank": 3}, {"rank": 6}])
def test_a_rank_deficient_displacement(options: dict[str, float]) -> None:
    matrix = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 90, 70)
    found = leading_directions(matrix, **options)  # type: ignore[arg-type]
    assert found.rank >= (2 if options.get("energy") == 0.9 else 3)
    assert_orthonormal(found)
    rebuilt = found.left * found.singular_values @ found.right.mT
    optimum = best_energy(matrix, found.rank)
    assert float((rebuilt - matrix.double()).square().sum() / matrix.double().square().sum()) <= 1 - optimum + 1e-5


@pytest.mark.usefixtures("path")
def test_energy_one_of_a_rank_deficient_displacement_takes_its_rank() -> None:
    sigma = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    matrix = with_spectrum(sigma, 90, 70).double()
    assert leading_directions(matrix, 0.9999).rank == 3
    assert torch.allclose(leading_directions(matrix, 0.9999).singular_values, sigma, rtol=1e-5)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("options", [{"energy": 0.9}, {"rank": 4}])
@pytest.mark.usefixtures("path")
def test_no_displacement_has_no_directions(shape: tuple[int, int], options: dict[str, float]) -> None:
    found = leading_directions(torch.zeros(*shape), **options)  # type: ignore[arg-type]
    assert (found.rank, found.energy, found.squared_total) == (0, 0.0, 0.0)
    assert found.left.shape == (shape[0], 0)
    assert found.right.shape == (shape[1], 0)


@QUICK
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    energy=st.floats(0.01, 1.0),
    double=st.booleans(),
)
def test_small_matrices_are_exact(seed: int, rows: int, columns: int, energy: float, double: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64 if double else torch.float32)
    found = leading_directions(matrix, energy)
    sigma = torch.linalg.svdvals(matrix.double())
    assert torch.allclose(found.singular_values, sigma[: found.rank], rtol=1e-6)
    assert found.energy >= energy - 1e-9
    assert found.rank == 1 or best_energy(matrix, found.rank - 1) < energy  # one less would not do
    assert found.squared_total == pytest.approx(float(matrix.double().square().sum()))
    assert_orthonormal(found)
    assert captured(matrix, found) == pytest.approx(found.energy, abs=1e-9)


@QUICK
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 60))
def test_a_fixed_rank_is_capped_at_the_smaller_side(seed: int, rank: int) -> None:
    matrix = torch.randn(20, 33, generator=torch.Generator().manual_seed(seed))
    assert leading_directions(matrix, rank=rank).rank == min(rank, 20)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("path")
def test_bases_pair_up_as_singular_directions(shape: tuple[int, int]) -> None:
    matrix = with_spectrum(decaying(40), *shape)
    found = leading_directions(matrix, rank=8)
    sigma = found.singular_values
    assert bool((sigma[:-1] >= sigma[1:]).all())
    paired = found.left.mT @ matrix.double() @ found.right  # diag(σ) for singular directions, signs included
    assert float((paired - sigma.diag()).abs().max()) < 0.02 * float(sigma[0])


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"rank": 10}])
@pytest.mark.usefixtures("path")
def test_the_same_displacement_gives_the_same_bits(options: dict[str, float]) -> None:
    matrix = with_spectrum(decaying(60, 0.9), 120, 80)
    torch.manual_seed(1)
    first = leading_directions(matrix, **options)  # type: ignore[arg-type]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = leading_directions(matrix.clone(), **options)  # type: ignore[arg-type]
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.singular_values, second.singular_values)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e6])
@pytest.mark.usefixtures("path")
def test_the_scale_of_the_displacement_does_not_matter(scale: float) -> None:
    matrix = with_spectrum(decaying(60), 96, 96)
    plain, scaled = leading_directions(matrix, 0.9), leading_directions(matrix * scale, 0.9)
    assert plain.rank == scaled.rank
    assert torch.allclose(scaled.singular_values / scale, plain.singular_values, rtol=1e-3)


def test_the_displacement_is_not_modified() -> None:
    matrix = with_spectrum(decaying(20), 40, 30).double()
    before = matrix.clone()
    leading_directions(matrix, 0.9)
    assert torch.equal(matrix, before)


def test_a_transposed_view_is_read_as_it_looks() -> None:
    matrix = with_spectrum(decaying(20), 40, 30)
    found, flipped = leading_directions(matrix, 0.9), leading_directions(matrix.mT, 0.9)
    assert found.rank == flipped.rank
    assert torch.allclose(found.left @ found.left.mT, flipped.right @ flipped.right.mT, atol=1e-6)
