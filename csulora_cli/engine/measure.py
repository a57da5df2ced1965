"""How far apart two models' first answer tokens are."""

import math

from torch import Tensor


def mean_kl(reference: Tensor, other: Tensor, most: float = math.inf) -> float:
    """Mean of min(KL(reference ‖ other), most) over prompts, in nats. Both are log-probabilities, (N, vocab)."""
    reference, other = reference.double(), other.double()
    terms = reference.exp() * (reference - other)
    # A token that the reference excludes counts 0, whatever the other says.
    return float(terms.where(reference > -math.inf, 0.0).sum(-1).clamp(max=most).mean().clamp_min(0))


def contrast(harmful: Tensor, benign: Tensor) -> float:
    """Total variation distance between the mean distributions, in [0, 1]. Log-probabilities, (N, vocab)."""
    return float((harmful.double().exp().mean(0) - benign.double().exp().mean(0)).abs().sum() / 2)
