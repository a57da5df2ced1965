"""S3LoRA (arXiv 2508.15068), its pruning: the modules whose update has the sharpest spectrum are emptied.

    sharpness = σ₁ / Σ_i σ_i   of Δ = s·B·A,      B ← 0 in the N sharpest modules (ties by name)

The index is the paper's. Its released code takes it of a rank-one fit of Δ, which has one singular value, so that the
index becomes σ₁/(σ₁ + 1e-6) and says nothing of the spectrum; here it is taken of Δ itself, from the small core
of the factors. The released code looks at q, k, v and o; here at every adapted module.
"""

from collections.abc import Sequence

import torch

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import FactorsMethod, Family, counts, with_b


def sharpness(module: Site) -> float:
    """σ₁/Σσ of Δ in [1/r, 1], and 0 for Δ = 0. B A = Q_b (R_b R_aᵀ) Q_aᵀ has the singular values of its core."""
    r_b = torch.linalg.qr(module.lora_b.double(), mode="r").R
    r_a = torch.linalg.qr(module.lora_a.double().mT, mode="r").R
    singular_values = torch.linalg.svdvals(r_b @ r_a.mT)
    total = float(singular_values.sum())
    return float(singular_values[0]) / total if total > 0 else 0.0


def repair(modules: Sequence[Site], strength: float) -> dict[str, Factors]:
    """Empty the N = `strength` sharpest modules."""
    score = {module.name: sharpness(module) for module in modules}
    chosen = set(sorted(score, key=lambda name: (-score[name], name))[: round(strength)])
    return {
        module.name: with_b(module, torch.zeros_like(module.lora_b)) if module.name in chosen else Factors.of(module)
        for module in modules
    }


METHODS = (
    FactorsMethod(
        name="s3lora",
        family=Family.PEER,
        summary="empties the N modules of sharpest spectrum",
        symbol="N",
        grid=counts,
        default=10.0,
        repair=repair,
    ),
)
