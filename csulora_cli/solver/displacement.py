"""Leading singular directions of a displacement D = host weight − unaligned weight.

Small sides (<= `EXACT_SIDE`) go through the Gram matrix in float64, which is exact. Larger ones through a randomised
range finder that grows by blocks until the wanted energy is held, in float32 products with float64 orthogonalisation;
a flat spectrum, where it would have to grow past `FLAT_SHARE` of the small side, falls back to the Gram matrix.
Directions past the wanted energy are noise, so what is promised is energy, not angles.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXACT_SIDE = 512
BLOCK = 64
POWER_ITERATIONS = 2
FLAT_SHARE = 0.25


@dataclass(frozen=True)
class Directions:
    """D ≈ U Σ Vᵀ.

    Attributes:
        left: U, (out, k), float64, orthonormal columns.
        right: V, (in, k), float64, orthonormal columns.
        singular_values: σ, (k,), float64, descending.
        squared_total: ‖D‖²_F.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    squared_total: float

    @property
    def rank(self) -> int:
        """k."""
        return self.singular_values.numel()

    @property
    def energy(self) -> float:
        """Share of ‖D‖²_F that the k directions hold (0 for D = 0)."""
        held = float(self.singular_values.square().sum())
        return held / self.squared_total if self.squared_total > 0 else 0.0

    def compact(self) -> "Directions":
        """The bases in float32 on the CPU, for holding those of all modules at once."""
        return replace(
            self,
            left=self.left.float().cpu(),
            right=self.right.float().cpu(),
            singular_values=self.singular_values.cpu(),
        )


def leading_directions(displacement: Tensor, energy: float = 0.9, rank: int | None = None) -> Directions:
    """The k leading singular directions: the smallest k that holds `energy`, or `rank` of them.

    Args:
        displacement: D, (out, in), float32 or float64.
        energy: τ in (0, 1]; ignored when `rank` is given.
        rank: k, capped at min(out, in) and at the numerical rank of D: σ below 1e-6 σ₁ (sketch) or 1e-7 σ₁ is rounding.

    Returns:
        `Directions`; k = 0 for D = 0. The same input gives the same result: the random start is seeded.

    Cost: O(out·in·k) for a decaying spectrum, O(out·in·m + m³) with m = min(out, in) otherwise. Captured energy is
    within 1 % of the optimum at the same k (tests).
    """
    rows, columns = displacement.shape
    small = min(rows, columns)
    total = float(displacement.double().square().sum()) if small <= EXACT_SIDE else _squared_norm(displacement)
    if total == 0:
        empty = displacement.new_zeros(0, dtype=torch.float64)
        return Directions(empty.new_zeros(rows, 0), empty.new_zeros(columns, 0), empty, 0.0)
    if small <= EXACT_SIDE:
        return _by_gram(displacement, total, energy, rank)
    limit = int(small * FLAT_SHARE)
    if rank is not None and rank > limit:
        return _by_gram(displacement, total, energy, rank)
    found = _by_sketch(displacement, total, energy, rank, limit)
    return found if found is not None else _by_gram(displacement, total, energy, rank)


def _squared_norm(matrix: Tensor) -> float:
    """‖·‖²_F without a float64 copy of the matrix."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _choose(squares: Tensor, total: float, energy: float, rank: int | None) -> int:
    """How many of the descending squared singular values to keep; all of them if they do not hold `energy`."""
    if rank is not None:
        return min(rank, squares.numel())
    held = torch.cumsum(squares, 0) / total
    enough = int((held < energy * (1 - 1e-12)).sum()) + 1
    return min(enough, squares.numel())


def _by_gram(displacement: Tensor, total: float, energy: float, rank: int | None) -> Directions:
    """Eigenvectors of the smaller Gram matrix, float64; the other side by one product."""
    matrix = displacement.double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix if is_tall else matrix.mT  # (large, small)
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    kept = _choose(squares, total, energy, rank)
    kept = min(kept, int((squares > squares[0] * 1e-14).sum()))
    near = vectors[:, :kept]  # (small, k)
    sigma = squares[:kept].sqrt()
    far = _orthonormal(matrix @ near / sigma)  # (large, k)
    left, right = (far, near) if is_tall else (near, far)
    return Directions(left, right, sigma, total)


def _by_sketch(displacement: Tensor, total: float, energy: float, rank: int | None, limit: int) -> Directions | None:
    """Block-growing randomised range finder; None when `limit` columns do not hold the energy."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = displacement.shape
    range_basis = displacement.new_zeros(rows, 0)  # Q
    coordinates = displacement.new_zeros(0, columns)  # Qᵀ D
    held = 0.0
    # A sketch is sharp well inside its own width only: a fixed rank gets a whole block as its margin.
    width = None if rank is None else rank + BLOCK
    while True:
        block = BLOCK if width is None else min(2 * BLOCK, width - range_basis.shape[1])
        start = torch.randn(columns, block, generator=generator, dtype=torch.float32).to(displacement)
        fresh = _new_range(displacement, range_basis, start)
        range_basis = torch.cat([range_basis, fresh], dim=1)
        coordinates = torch.cat([coordinates, fresh.mT @ displacement], dim=0)
        held += _squared_norm(coordinates[-block:])
        size = range_basis.shape[1]
        if width is not None and size >= width:
            break
        if width is None and held >= energy * total:
            break
        if size + BLOCK > limit and width is None:
            return None
    for _ in range(POWER_ITERATIONS):  # the blocks were sharpened alone; now all of them together
        range_basis = _orthonormal(displacement @ _orthonormal(coordinates.mT))
        coordinates = range_basis.mT @ displacement
    gram = coordinates.double() @ coordinates.double().mT  # (b, b)
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    kept = _choose(squares, total, energy, rank)
    kept = max(1, min(kept, int((squares > squares[0] * 1e-12).sum())))
    squares, vectors = squares[:kept], vectors[:, :kept]
    sigma = squares.sqrt()
    left = _orthonormal(range_basis.double() @ vectors)
    right = _orthonormal(coordinates.double().mT @ (vectors / sigma))
    return Directions(left, right, sigma, total)


def _new_range(displacement: Tensor, known: Tensor, start: Tensor) -> Tensor:
    """Orthonormal columns that span what D maps `start` to, outside the known range. (out, b)."""
    fresh = displacement @ start
    for iteration in range(POWER_ITERATIONS + 1):
        if iteration:
            fresh = displacement @ _orthonormal(displacement.mT @ fresh)
        fresh = fresh - known @ (known.mT @ fresh)
        fresh = _orthonormal(fresh)
    return _orthonormal(fresh - known @ (known.mT @ fresh))


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same span: Cholesky QR twice with a float64 Gram matrix, Householder if that fails.

    The diagonal of R is positive in both passes, so nearly orthonormal columns keep their directions and signs.
    """
    result = columns
    for _ in range(2):
        wide = result.double()
        lower, info = torch.linalg.cholesky_ex(wide.mT @ wide)
        if int(info) != 0:
            exact: Tensor = torch.linalg.qr(columns.double()).Q
            return exact.to(columns.dtype)
        result = torch.linalg.solve_triangular(lower, wide.mT, upper=False).mT.to(columns.dtype)
    return result
