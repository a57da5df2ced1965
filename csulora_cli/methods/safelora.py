"""SafeLoRA as published (Hsu et al., NeurIPS 2024, arXiv 2405.16833), by threshold and by number of modules.

With D = W_host − W_unaligned of a module,

    Ĉ = D Dᵀ / ‖D‖_F,      B ← Ĉ B   where cos(ĈBA, BA) <= τ,      else B as it is

Ĉ is no orthogonal projector: its eigenvalues are σ²/‖D‖_F, so that a module that is "projected" also changes its size,
usually to nearly nothing. That is the published formula, and it is kept. In number mode the N modules of smallest
cosine are replaced (ties by name; the released code rounds the cosines and may take more).

Not kept are defects of the released code that are no part of the formula: modules are matched by name instead of by
position, biases and `rank_pattern` do not stop it, and equal weights (D = 0) leave a module alone instead of NaN.

Neither Ĉ nor BA is formed: ĈB = D(DᵀB)/‖D‖_F, and the cosine needs (r, r) products only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DisplacementMethod, Family, counts, linear, with_b


@dataclass(frozen=True)
class Projection:
    """What projecting one module would do.

    Attributes:
        lora_b: ĈB, (out, r), float32.
        cosine: cos(ĈBA, BA); NaN where one of them is 0, and then nothing is replaced.
    """

    lora_b: Tensor
    cosine: float


def observe(module: Site, displacement: Tensor) -> Projection:
    """ĈB and the cosine. Cost O(out·in·r)."""
    wide, lora_b = displacement.double(), module.lora_b.to(displacement.device, torch.float64)
    norm = float(torch.linalg.matrix_norm(wide))
    mapped = wide @ (wide.mT @ lora_b) / norm if norm > 0 else torch.zeros_like(lora_b)  # (out, r)
    return Projection(mapped.float().cpu(), cosine(mapped.cpu(), module))


def cosine(mapped: Tensor, module: Site) -> float:
    """cos(B'A, BA) of a mapped B', (out, r), by Frobenius products: ⟨B'A, BA⟩ = tr(B'ᵀB · AAᵀ)."""
    lora_b, lora_a = module.lora_b.double(), module.lora_a.double()
    gram = lora_a @ lora_a.mT  # (r, r)

    def inner(left: Tensor, right: Tensor) -> float:
        return float(((left.mT @ right) * gram).sum())

    size = inner(mapped, mapped) * inner(lora_b, lora_b)
    return inner(mapped, lora_b) / math.sqrt(size) if size > 0 else math.nan


def by_threshold(modules: Sequence[Site], projections: Mapping[str, Projection], strength: float) -> dict[str, Factors]:
    """Replace B where the cosine is at most τ = `strength`."""
    return {
        module.name: with_b(module, projections[module.name].lora_b)
        if projections[module.name].cosine <= strength
        else Factors.of(module)
        for module in modules
    }


def by_number(modules: Sequence[Site], projections: Mapping[str, Projection], strength: float) -> dict[str, Factors]:
    """Replace B in the `strength` modules of smallest cosine."""
    able = [module.name for module in modules if not math.isnan(projections[module.name].cosine)]
    chosen = set(sorted(able, key=lambda name: (projections[name].cosine, name))[: round(strength)])
    return {
        module.name: with_b(module, projections[module.name].lora_b) if module.name in chosen else Factors.of(module)
        for module in modules
    }


METHODS = (
    DisplacementMethod(
        name="safelora-threshold",
        family=Family.PEER,
        summary="SafeLoRA as published, modules below a cosine",
        symbol="τ",
        grid=linear(0.2, 1),
        default=0.5,
        observe=observe,
        repair=by_threshold,
    ),
    DisplacementMethod(
        name="safelora-number",
        family=Family.PEER,
        summary="SafeLoRA as published, N modules",
        symbol="N",
        grid=counts,
        default=10.0,
        observe=observe,
        repair=by_number,
    ),
)
