"""Closed forms that change A alone: the update fades on some directions of its input and stays elsewhere.

From prompts (our own formulation), with M = I + βC_b and K = C_h M⁻¹ C_h:

    min_X ‖(X − Δ) M^½‖² + λ²‖X K^½‖²   ⇒   A' = A M (M + λ²K)⁻¹,   B' = B

Where C_h v = μ M v, what the update does to v is divided by 1 + λ²μ². A penalty λ‖X C_h^½‖² would divide it by 1 + λμ,
which takes more from what is mostly benign by the time it has faded as far on what is to fade.

Three ways to the same A', for three shapes of C_h and C_b. 1/(1 + λ²μ²) is the real part of 1/(1 + iλμ), so that the
solution is the real part of the one with a penalty of iλ,

    A' = Re[A M (M + iλC_h)⁻¹],

in which no λ² eats the digits of the identity. Its factorisation takes eight times as long as the real one with K,
which serves every λ. Modules that read the same input share all of it: stack their A's. A Cholesky factorisation per λ
beats one eigendecomposition for all of them up to about seven λ at in = 576, fifteen at 4096 (scripts/bench.py solver);
`--strength auto` tries three to five.

From weights, keep-out, with C_w = V diag(κ) Vᵀ (`by_directions`): min_X ‖X − Δ‖² + λ‖X C_w^½‖².
"""

import cmath
import math

import torch
from torch import Tensor

# The identity keeps about seven of its digits beside a λ²K of this trace.
MOST_OUTWEIGHED = 1e9


def definite(benign: Tensor | None, protect: float) -> Tensor | None:
    """C_b, or the nearest semi-definite matrix to it (Higham 1988) where I + βC_b is not positive definite.

    Sums of float32 products can be a little indefinite, and a large β lifts that above the identity.
    """
    if benign is None or protect == 0:
        return None
    _, problem = torch.linalg.cholesky_ex(_with_identity(protect * benign.double()))
    if not int(problem):
        return benign
    benign = benign.double()
    values, vectors = torch.linalg.eigh((benign + benign.mT) / 2)
    nearest: Tensor = (vectors * values.clamp(min=0)) @ vectors.mT
    return nearest


def contrast(faded: Tensor, benign: Tensor | None, protect: float) -> Tensor:
    """K = C_h (I + βC_b)⁻¹ C_h.

    Args:
        faded: C_h, (in, in), symmetric positive semi-definite.
        benign: C_b, (in, in), `definite`; None for β = 0.
        protect: β >= 0.

    Returns:
        (in, in), float64. Cost about 7/3·in³.
    """
    faded = faded.double()
    if benign is None or protect == 0:
        return faded @ faded
    lower = torch.linalg.cholesky(_with_identity(protect * benign.double()))
    half = torch.linalg.solve_triangular(lower, faded, upper=False)
    product: Tensor = half.mT @ half
    return product


def by_moments(
    lora_a: Tensor,
    faded: Tensor,
    benign: Tensor | None,
    protect: float,
    strength: float,
    contrasted: Tensor | None = None,
) -> Tensor:
    """A' from the (in, in) moments: best where `in` is at most the number of tokens.

    A' = A − λ²A K (M + λ²K)⁻¹, or A − Re[iλA C_h (M + iλC_h)⁻¹] where K is not at hand or λ²K too large.

    Args:
        lora_a: A, (r, in).
        faded: C_h, (in, in), symmetric positive semi-definite.
        benign: C_b, (in, in), or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.
        contrasted: K (`contrast`), which makes several λ faster. C_b must then be `definite`.

    Returns:
        (r, in), float64. Cost in³/3 + O(r·in²) with K, 8/3·in³ without.
    """
    lora_a = lora_a.double()
    benign = benign if contrasted is not None else definite(benign, protect)
    protected = 0.0 if benign is None else protect * benign.double()
    if contrasted is not None and strength * strength * float(contrasted.trace()) <= MOST_OUTWEIGHED:
        load = strength * strength * contrasted
        lower = torch.linalg.cholesky(_with_identity(load + protected))
        return lora_a - torch.cholesky_solve((lora_a @ load).mT, lower).mT
    turned = 1j * strength * faded.double()
    system = _with_identity(turned + protected)
    removed: Tensor = torch.linalg.solve(system, lora_a.to(turned.dtype) @ turned, left=False)
    return lora_a - removed.real


def _with_identity(moment: Tensor) -> Tensor:
    """A matrix plus I, in its place."""
    moment.diagonal().add_(1)
    return moment


def by_tokens(lora_a: Tensor, faded: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """A' from the tokens themselves: best where `in` is larger than their number.

    With S = [H, G], w = √(iλ) for a column of H and √β for one of G, and W = I + wᵀ∘SᵀS∘w, Woodbury's identity gives
    A' = A − Re(√(iλ)[A H, 0] W⁻¹∘w) Sᵀ. In single precision the subtraction would cancel.

    Args:
        lora_a: A, (r, in).
        faded: H, (in, N), scaled so that HHᵀ = C_h.
        benign: G, (in, N_b), scaled so that GGᵀ = C_b, or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost 8/3·(N + N_b)³ + O(in·(N + N_b)²).
    """
    lora_a = lora_a.double()
    faded = faded.double()
    turn = cmath.sqrt(1j * strength)
    columns, weights = faded, lora_a.new_full((faded.shape[1],), turn, dtype=torch.complex128)
    right = turn * (lora_a @ faded)  # (r, N)
    if benign is not None and protect > 0:
        columns = torch.cat([faded, benign.double()], dim=1)  # S, (in, N + N_b)
        weights = torch.cat([weights, weights.new_full((benign.shape[1],), math.sqrt(protect))])
        right = torch.cat([right, right.new_zeros(right.shape[0], benign.shape[1])], dim=1)
    system = weights[:, None] * (columns.mT @ columns) * weights
    system.diagonal().add_(1)
    coordinates: Tensor = torch.linalg.solve(system, right, left=False) * weights  # (r, N + N_b)
    return lora_a - coordinates.real @ columns.mT


def by_diagonal(lora_a: Tensor, faded: Tensor, benign: Tensor | None, protect: float, strength: float) -> Tensor:
    """A' where the moments are diagonal, as those of an embedding, whose inputs are unit vectors.

    Each column of A is divided by 1 + (λc_h/(1 + βc_b))².

    Args:
        lora_a: A, (r, in).
        faded: the diagonal of C_h, (in,).
        benign: the diagonal of C_b, (in,), or None for β = 0.
        protect: β >= 0.
        strength: λ >= 0; 0 gives A back.

    Returns:
        (r, in), float64. Cost O(r·in).
    """
    ratio = strength * faded.double()
    if benign is not None:
        ratio = ratio / (1 + protect * benign.double())
    return lora_a.double() / (1 + ratio.square())


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
    """‖X − Δ‖² + β‖(X − Δ) C_b^½‖² + λ‖X C^½‖² from its squared parts: what a repair must not raise.

    Keep-out minimises it. The closed forms from prompts do not, but they lower it as well: at x = λμ it goes from x to
    (x⁴ + x)/(1 + x²)² on every direction, which is less.

    Args:
        distance: ‖X − Δ‖².
        protected: ‖(X − Δ) C_b^½‖².
        penalty: ‖X C^½‖².
        protect: β.
        strength: λ.
    """
    return distance + protect * protected + strength * penalty
