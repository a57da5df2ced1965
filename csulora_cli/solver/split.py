"""The three-way split of an update by the displacement's singular directions (weights, keep-in).

That the safety-aligned subspace comes from D and that the update splits into a fully aligned, a partially aligned and
an off-subspace part, attenuated by relative energy, is the paper's (arXiv 2605.30640, abstract). Two-sided projectors
and the penalty's exact form are our reading of it (method.md):

    F = P Δ Q        R = P Δ (I−Q) + (I−P) Δ Q        O = (I−P) Δ (I−Q)        P = UUᵀ, Q = VVᵀ

    min_X ‖X − Δ‖² + λρ_R‖R(X)‖² + λρ_O‖O(X)‖²   ⇒   X = F + R/(1+λρ_R) + O/(1+λρ_O),   ρ = energy share in Δ
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from csulora_cli.solver.lowrank import squared_norm


@dataclass(frozen=True)
class Parts:
    """Squared norms of the three parts, or their shares of the whole."""

    full: float
    partial: float
    off: float

    @property
    def total(self) -> float:
        """‖·‖²_F of the whole: the parts are Frobenius-orthogonal."""
        return self.full + self.partial + self.off

    @property
    def shares(self) -> "Parts":
        """The parts as shares of the whole (all 0 for a zero update)."""
        total = self.total
        return Parts(self.full / total, self.partial / total, self.off / total) if total > 0 else Parts(0.0, 0.0, 0.0)


def chance_shares(out_features: int, in_features: int, rank: int) -> Parts:
    """Expected shares of a random update for bases of k = rank directions: F is k²/(out·in)."""
    on_left, on_right = rank / out_features, rank / in_features
    return Parts(
        on_left * on_right,
        on_left * (1 - on_right) + (1 - on_left) * on_right,
        (1 - on_left) * (1 - on_right),
    )


@dataclass(frozen=True)
class Split:
    """An update B·A split by two bases.

    Attributes:
        lora_b, lora_a: B (out, r) and A (r, in), float64.
        on_b, on_a: B₁ = P B (out, r) and A₁ = A Q (r, in), float64.
    """

    lora_b: Tensor
    lora_a: Tensor
    on_b: Tensor
    on_a: Tensor

    @cached_property
    def parts(self) -> Parts:
        """‖F‖², ‖R‖², ‖O‖² of B·A, from (r, r) products only."""
        off_b, off_a = self.lora_b - self.on_b, self.lora_a - self.on_a
        partial = squared_norm(self.on_b, off_a) + squared_norm(off_b, self.on_a)
        return Parts(squared_norm(self.on_b, self.on_a), partial, squared_norm(off_b, off_a))

    def closest(self, strength: float) -> tuple[Tensor, Tensor]:
        """X(λ) of the update B·A as a product of rank at most 2r: (out, 2r), (2r, in), float64.

        X = [B, B₁]·[[b, a−b], [a−b, 1−2a+b]]⊗I_r·[A; A₁] with a = 1/(1+λρ_R), b = 1/(1+λρ_O).
        """
        shares = self.parts.shares
        a, b = 1 / (1 + strength * shares.partial), 1 / (1 + strength * shares.off)
        columns = torch.cat(
            [b * self.lora_b + (a - b) * self.on_b, (a - b) * self.lora_b + (1 - 2 * a + b) * self.on_b], dim=1
        )
        return columns, torch.cat([self.lora_a, self.on_a], dim=0)


def split(lora_b: Tensor, lora_a: Tensor, left_basis: Tensor, right_basis: Tensor) -> Split:
    """Split B·A by U (out, k) and V (in, k), orthonormal columns. Cost O((out + in)·k·r)."""
    lora_b, lora_a = lora_b.double(), lora_a.double()
    left, right = left_basis.double(), right_basis.double()
    return Split(lora_b, lora_a, left @ (left.mT @ lora_b), (lora_a @ right) @ right.mT)


def penalised_change(distance: float, parts: Parts, weights: Parts, strength: float) -> float:
    """The objective ‖X − Δ‖² + λρ_R‖R(X)‖² + λρ_O‖O(X)‖² from its squared parts.

    Args:
        distance: ‖X − Δ‖².
        parts: ‖F(X)‖², ‖R(X)‖², ‖O(X)‖².
        weights: the shares ρ of Δ (not of X).
        strength: λ.
    """
    return distance + strength * (weights.partial * parts.partial + weights.off * parts.off)
