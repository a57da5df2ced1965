"""DoRA: a weight W + s·BA whose rows are scaled to trained magnitudes.

    W' = D (W + s·BA),   D = diag(m / ‖W + s·BA‖_row)   ⇒   W' − W = (D − I) W + s·DB·A

The second part is a low-rank update with DB in the place of B, and its closest update has an exact form: A' in the
place of A, with D as it is, so that the magnitudes become m' = D·‖W + s·BA'‖_row. The first part scales what the host
gives, whatever the input is; it has the rank of W and stays.
"""

import torch
from torch import Tensor

from csulora_cli.solver.lowrank import truncate


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """‖W + s·BA‖ of every row, (out,), float64, without forming the product.

    ‖w + s·bA‖² = ‖w‖² + 2s·(W Aᵀ)·b + s²·b A Aᵀ b. W (out, in), A (r, in), B (out, r).
    """
    weight, lora_a, lora_b = weight.double(), lora_a.double(), lora_b.double()
    cross = ((weight @ lora_a.mT) * lora_b).sum(1)
    own = ((lora_b @ (lora_a @ lora_a.mT)) * lora_b).sum(1)
    squares = weight.square().sum(1) + 2 * scale * cross + scale**2 * own
    return squares.clamp_min(0).sqrt()


def gain_of(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The diagonal of D, (out,), float64; 0 for a row that is 0 whatever its magnitude."""
    norms = row_norms(weight, lora_a, lora_b, scale)
    return torch.where(norms > 0, magnitude.double().flatten() / norms.clamp_min(1e-300), 0.0)


def merged_factors(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, magnitude: Tensor
) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of the same rank for all of W' − W, its squared norm, and the squared norm of what they miss.

    Returns:
        A (r, in) and B (out, r), float64, with s·BA the truncated update, ‖W' − W‖², and what is lost of it.
    """
    weight, lora_a, lora_b = weight.double(), lora_a.double(), lora_b.double()
    gain = gain_of(weight, lora_a, lora_b, scale, magnitude)
    change = gain[:, None] * (weight + scale * lora_b @ lora_a) - weight
    eye = torch.eye(change.shape[1], dtype=torch.float64, device=change.device)
    columns, rows, error = truncate(change, eye, lora_a.shape[0])
    total = float(change.square().sum())
    return rows, columns / scale, total, error**2 * total
