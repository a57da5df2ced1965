"""Closed forms that change A alone: the update fades on some directions of its input and stays elsewhere.

For a penalty λC on the input side and a protection βC_b (method.md, "prompts" and "keep-out"; our own formulation):

    min_X ‖X − Δ‖² + β‖(X − Δ) C_b^½‖² + λ‖X C^½‖²   ⇒   A' = A (I + βC_b)(I + βC_b + λC)⁻¹,   B' = B

Four ways to the same A', for four shapes of C. Modules that read the same input share the factorisation: stack their
A's. A Cholesky factorisation per (β, λ) beats one eigendecomposition for all λ, up to about twenty of them, and it
leaves β free too (scripts/bench.py solver).
"""

import math

import torch
from torch import Tensor


def by_moments(lora_a: Tensor, harmful: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """A' from the (in, in) moments: best where `in` is at most the number of tokens.

    A' = A − λ(A C_h)(I + βC_b + λC_h)⁻¹, the same as above without a product with the protection.

    Args:
        lora_a: A, (r, in).
        harmful: C_h, (in, in), symmetric positive semi-definite.
        benign: C_b, (in, in), or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost in³/3 + O(r·in²).
    """
    lora_a, harmful = lora_a.double(), harmful.double()
    benign = benign.double() if benign is not None and protect > 0 else None
    lower, problem = torch.linalg.cholesky_ex(_system(harmful, benign, protect, strength))
    if int(problem):
        # Sums of float32 products can be a little indefinite, and a large λ lifts that above the identity.
        harmful = _semi_definite(harmful)
        benign = None if benign is None else _semi_definite(benign)
        lower = torch.linalg.cholesky(_system(harmful, benign, protect, strength))
    return lora_a - torch.cholesky_solve(strength * (lora_a @ harmful).mT, lower).mT


def _system(harmful: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """I + βC_b + λC_h, (in, in)."""
    system = strength * harmful
    if benign is not None:
        system = system + protect * benign
    system.diagonal().add_(1)
    return system


def _semi_definite(moment: Tensor) -> Tensor:
    """The nearest symmetric positive semi-definite matrix in Frobenius norm (Higham 1988), (in, in)."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    nearest: Tensor = (vectors * values.clamp(min=0)) @ vectors.mT
    return nearest


def by_tokens(lora_a: Tensor, harmful: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """A' from the tokens themselves: best where `in` is larger than their number.

    With S = [√λ H, √β G] and W = I + SᵀS, Woodbury's identity gives A' = A − √λ[A H, 0] W⁻¹ Sᵀ. In float32 the
    subtraction would cancel, so all of it is float64.

    Args:
        lora_a: A, (r, in).
        harmful: H, (in, N), scaled so that HHᵀ = C_h.
        benign: G, (in, N_b), scaled so that GGᵀ = C_b, or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost (N + N_b)³/3 + O(in·(N + N_b)²).
    """
    lora_a = lora_a.double()
    columns = math.sqrt(strength) * harmful.double()
    right = lora_a @ columns  # (r, N)
    if benign is not None and protect > 0:
        columns = torch.cat([columns, math.sqrt(protect) * benign.double()], dim=1)  # S, (in, N + N_b)
        right = torch.cat([right, right.new_zeros(right.shape[0], columns.shape[1] - right.shape[1])], dim=1)
    system = columns.mT @ columns
    system.diagonal().add_(1)
    lower = torch.linalg.cholesky(system)
    coordinates: Tensor = torch.cholesky_solve(right.mT, lower)  # W⁻¹[√λ A H, 0]ᵀ, (N + N_b, r)
    return lora_a - coordinates.mT @ columns.mT


def by_diagonal(lora_a: Tensor, harmful: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """A' where the moments are diagonal, as those of an embedding, whose inputs are unit vectors.

    Each column of A is multiplied by (1 + βc_b)/(1 + βc_b + λc_h), one minus λc_h over the same.

    Args:
        lora_a: A, (r, in).
        harmful: the diagonal of C_h, (in,).
        benign: the diagonal of C_b, (in,), or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost O(r·in).
    """
    lora_a, load = lora_a.double(), strength * harmful.double()
    kept = torch.ones_like(load)
    if benign is not None and protect > 0:
        kept = kept + protect * benign.double()
    return lora_a - lora_a * (load / (kept + load))


def by_directions(lora_a: Tensor, basis: Tensor, gains: Tensor, strength: float) -> Tensor:
    """A' where C = V diag(κ) Vᵀ on orthonormal V and β = 0: a filter of 1/(1 + λκ) on each direction.

    Args:
        lora_a: A, (r, in).
        basis: V, (in, k), orthonormal columns.
        gains: κ >= 0, (k,).
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost O(r·in·k).
    """
    lora_a, basis = lora_a.double(), basis.double()
    load = strength * gains.double()
    return lora_a - ((lora_a @ basis) * (load / (1 + load))) @ basis.mT


def displacement_gains(singular_values: Tensor, features: int, squared_total: float) -> Tensor:
    """κ of the keep-out geometry: C_w = DᵀD·in/‖D‖² has the eigenvalues in·σ²/‖D‖² on V. (k,).

    Args:
        singular_values: σ of the leading directions, (k,).
        features: in.
        squared_total: ‖D‖²_F of the whole displacement, also of what the k directions leave out.
    """
    return features * singular_values.double().square() / squared_total


def unit_trace_scale(features: int, squared_total: float) -> float:
    """c = in/‖H‖²_F, which scales HHᵀ to trace `in` so that λ and β have no unit (0 where there is no energy)."""
    return features / squared_total if squared_total > 0 else 0.0


def penalised_change(distance: float, protected: float, penalty: float, protect: float, strength: float) -> float:
    """The objective ‖X − Δ‖² + β‖(X − Δ) C_b^½‖² + λ‖X C^½‖² from its squared parts.

    Args:
        distance: ‖X − Δ‖².
        protected: ‖(X − Δ) C_b^½‖².
        penalty: ‖X C^½‖².
        protect: β.
        strength: λ.
    """
    return distance + protect * protected + strength * penalty
