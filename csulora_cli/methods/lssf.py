"""LSSF (ACL 2025, arXiv 2602.00038) written as an adapter: the displacement's low-rank part is added back.

    W + Δ + α·P D,      P = Ũ Ũᵀ restricted to the ρ leading left singular directions of D

In its data-free form U comes from the SVD of D. Its columns are scaled by α_i = 1 + (α₁ − 1)(σ_i − σ_ρ)/(σ₁ − σ_ρ), and
ρ is the smallest rank whose entropy H_ρ = −Σ_{i<=ρ} p_i log p_i, p_i = σ_i²/Σσ², reaches a share η of the whole. With
P = Σ α_i u_i u_iᵀ the piece is Σ α_i σ_i u_i v_iᵀ, and the result Δ + α·piece is exact at rank r + ρ.

No code by the authors is public, and accounts of its settings differ. Ours: η = 0.8, α₁ = 1 (no further scaling beside
α, which the strength is), and ρ at most 256, for the size of the adapter.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DisplacementMethod, Family, logarithmic, with_displacement
from csulora_cli.solver.displacement import Directions, leading_directions

ENTROPY_SHARE = 0.8
LARGEST_RANK = 256


def entropy_rank(singular_values: Tensor, share: float = ENTROPY_SHARE) -> int:
    """The smallest ρ with H_ρ >= share · H, from all singular values, (n,), descending. 0 for D = 0.

    A matrix of rank one has no entropy; its rank is its ρ.
    """
    squares = singular_values.double().square()
    total = squares.sum()
    if total == 0:
        return 0
    shares = squares / total
    held = torch.cumsum(torch.special.entr(shares), 0)  # H_ρ, (n,)
    return min(int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1, shares.numel())


def observe(_module: Site, displacement: Tensor) -> Directions:
    """The ρ leading directions of D. Cost O(out·in·m + m³), m = min(out, in): the entropy needs the whole spectrum."""
    wide = displacement.double()
    gram = wide.mT @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.mT  # (m, m)
    singular_values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
    rank = max(1, min(entropy_rank(singular_values), LARGEST_RANK))
    return leading_directions(displacement, rank=rank).compact()


def repair(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """Add α = `strength` times the leading part of D."""
    return {module.name: with_displacement(module, directions[module.name], strength) for module in modules}


METHODS = (
    DisplacementMethod(
        name="lssf",
        family=Family.PEER,
        summary="adds the displacement's low-rank part back",
        symbol="α",
        grid=logarithmic(0.25, 4),
        default=1.0,
        observe=observe,
        keeps_blocks=False,
        repair=repair,
    ),
)
