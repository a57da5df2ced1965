"""Norms, distances and truncation of a product B·A that is never formed. B: (out, r), A: (r, in)."""

import torch
from torch import Tensor


def squared_norm(lora_b: Tensor, lora_a: Tensor) -> float:
    """‖B·A‖²_F = tr(BᵀB · AAᵀ), from two (r, r) Gram matrices in float64. Cost O((out + in)·r²)."""
    lora_b, lora_a = lora_b.double(), lora_a.double()
    return float(((lora_b.mT @ lora_b) * (lora_a @ lora_a.mT)).sum())


def squared_distance(b_left: Tensor, a_left: Tensor, b_right: Tensor, a_right: Tensor) -> float:
    """‖B₁A₁ − B₂A₂‖²_F by QR of the stacked factors, so that nearly equal products lose no digits to cancellation.

    Shapes: (out, r₁), (r₁, in), (out, r₂), (r₂, in). Cost O((out + in)·(r₁ + r₂)²), float64.
    """
    columns = torch.cat([b_left.double(), -b_right.double()], dim=1)  # (out, r1+r2)
    rows = torch.cat([a_left.double(), a_right.double()], dim=0)  # (r1+r2, in)
    core = torch.linalg.qr(columns, mode="r").R @ torch.linalg.qr(rows.mT, mode="r").R.mT
    return float(core.square().sum())


def truncate(lora_b: Tensor, lora_a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best product of a given rank (Eckart-Young), and its relative error.

    B·A = Q_b (R_b R_aᵀ) Q_aᵀ; the SVD of the small core gives the leading directions. The singular values are split
    evenly between both factors, which keeps 16-bit storage accurate. A product whose own rank is smaller is padded
    with zeros.

    Args:
        lora_b: (out, m).
        lora_a: (m, in).
        rank: the wanted rank, >= 1.

    Returns:
        B' (out, rank), A' (rank, in) in float64, and ‖B'A' − BA‖_F / ‖BA‖_F (0 for a zero product).
    """
    q_b, r_b = torch.linalg.qr(lora_b.double())  # (out, p), (p, m)
    q_a, r_a = torch.linalg.qr(lora_a.double().mT)  # (in, q), (q, m)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)  # (p, c), (c,), (c, q)
    kept = min(rank, sigma.numel())
    root = sigma[:kept].sqrt()
    new_b = torch.zeros(lora_b.shape[0], rank, dtype=torch.float64, device=lora_b.device)
    new_a = torch.zeros(rank, lora_a.shape[1], dtype=torch.float64, device=lora_a.device)
    new_b[:, :kept] = q_b @ (u[:, :kept] * root)
    new_a[:kept] = (root[:, None] * vt[:kept]) @ q_a.mT
    total = float(sigma.square().sum())
    lost = float(sigma[kept:].square().sum())
    return new_b, new_a, (lost / total) ** 0.5 if total > 0 else 0.0


def pad_rank(lora_b: Tensor, lora_a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product at a larger rank: B gets zero columns, A zero rows. (out, rank), (rank, in)."""
    extra = rank - lora_a.shape[0]
    columns = lora_b.new_zeros(lora_b.shape[0], extra)
    rows = lora_a.new_zeros(extra, lora_a.shape[1])
    return torch.cat([lora_b, columns], dim=1), torch.cat([lora_a, rows], dim=0)
