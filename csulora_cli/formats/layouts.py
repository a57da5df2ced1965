"""Layouts: how the factors of one adapted module are stored, and the two-dimensional factors of its sites.

Each layout is a pair of pure functions. `unpack` gives one (A, B) a site, A (r, in) and B (out, r), as views where it
can; `pack` is its inverse and casts nothing. Which layout a module has follows from the names of its tensors, from
their number of dimensions, and from whether the config targets it as a parameter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_cli.errors import UnsupportedError
from csulora_cli.formats.site import Kind

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """One way of storing factors.

    Attributes:
        name: for people.
        kind: how the host uses the weight.
        suffixes: what the names of A and B end with, after the module's name.
        fits: whether the shapes of A and B are possible at a rank.
        unpack: stored A and B and the rank -> factors of the sites.
        pack: factors of the sites (of any rank, the same for all), shapes of the stored A and B -> stored A and B.
    """

    name: str
    kind: Kind
    suffixes: tuple[str, str]
    fits: Callable[[Tensor, Tensor, int], bool]
    unpack: Callable[[Tensor, Tensor, int], list[Pair]]
    pack: Callable[[Sequence[Pair], torch.Size, torch.Size], Pair]


WEIGHTS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_WEIGHTS = ("lora_embedding_A", "lora_embedding_B")


def _fits_matrix(lora_a: Tensor, lora_b: Tensor, rank: int) -> bool:
    return lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == rank == lora_b.shape[1]


def _unpack_matrix(lora_a: Tensor, lora_b: Tensor, _rank: int) -> list[Pair]:
    return [(lora_a, lora_b)]


def _pack_matrix(pairs: Sequence[Pair], _shape_a: torch.Size, _shape_b: torch.Size) -> Pair:
    ((lora_a, lora_b),) = pairs
    return lora_a, lora_b


def _fits_kernel(lora_a: Tensor, lora_b: Tensor, rank: int) -> bool:
    is_kernel = lora_a.ndim == lora_b.ndim and lora_a.ndim in (3, 4, 5) and math.prod(lora_b.shape[2:]) == 1
    if not is_kernel or lora_a.shape[0] != rank or rank % lora_b.shape[1]:
        return False
    groups = groups_of(lora_a, lora_b)
    return lora_b.shape[0] % groups == 0 == lora_a.shape[1] % groups


def groups_of(lora_a: Tensor, lora_b: Tensor) -> int:
    """Of a convolution, from B (out, r/groups, 1, …); PEFT's A reads all channels, whatever the groups."""
    return lora_a.shape[0] // lora_b.shape[1]


def _unpack_kernel(lora_a: Tensor, lora_b: Tensor, _rank: int) -> list[Pair]:
    """A (r, in, *kernel) -> (r, in·kernel), B (out, r/groups, 1, …) -> (out, r), block-diagonal.

    The update of a kernel, flattened, is B.flat @ A.flat. With groups it is no update of the kernel, whose groups read
    in/groups channels each, but it is the same function of the patches (in·kernel) that the layer reads.
    """
    return [(lora_a.flatten(1), block_diagonal(lora_b.flatten(1), groups_of(lora_a, lora_b)))]


def block_diagonal(rows: Tensor, groups: int) -> Tensor:
    """Rows (out, n), of which each group's n are others, as (out, groups·n) with zeros elsewhere."""
    return rows if groups == 1 else torch.block_diag(*rows.chunk(groups))  # type: ignore[no-untyped-call]


def _pack_kernel(pairs: Sequence[Pair], shape_a: torch.Size, shape_b: torch.Size) -> Pair:
    ((lora_a, lora_b),) = pairs
    groups = shape_a[0] // shape_b[1]
    if groups > 1:
        lora_b = _blocks(lora_b, groups)
    return lora_a.reshape(-1, *shape_a[1:]), lora_b.reshape(shape_b[0], -1, *shape_b[2:])


def _blocks(lora_b: Tensor, groups: int) -> Tensor:
    """The blocks of a block-diagonal B (out, r), one below the other, (out, r/groups)."""
    rows, width = lora_b.shape[0] // groups, lora_b.shape[1] // groups
    blocks = torch.cat([lora_b[i * rows : (i + 1) * rows, i * width : (i + 1) * width] for i in range(groups)])
    if lora_b.shape[1] % groups or not torch.equal(block_diagonal(blocks, groups), lora_b):
        raise UnsupportedError(
            "an update of a convolution with groups would have to change its lora_B, which has no place for it",
            "Use what changes lora_A alone, as the prompts source does.",
        )
    return blocks


def _fits_experts(lora_a: Tensor, lora_b: Tensor, rank: int) -> bool:
    if lora_a.ndim != 2 or lora_b.ndim != 2 or 0 in (*lora_a.shape, *lora_b.shape):
        return False
    return lora_a.shape[0] == lora_b.shape[1] and lora_a.shape[0] % rank == 0


def _unpack_experts(lora_a: Tensor, lora_b: Tensor, rank: int) -> list[Pair]:
    """A (experts·r, in) lies expert by expert, B (out, r·experts) rank by rank with the experts side by side."""
    by_expert = lora_a.reshape(-1, rank, lora_a.shape[1])  # (experts, r, in)
    columns = lora_b.reshape(lora_b.shape[0], rank, -1)  # (out, r, experts)
    return [(by_expert[expert], columns[:, :, expert]) for expert in range(len(by_expert))]


def _pack_experts(pairs: Sequence[Pair], _shape_a: torch.Size, _shape_b: torch.Size) -> Pair:
    lora_a = torch.cat([a for a, _ in pairs])  # (experts·r, in)
    lora_b = torch.stack([b for _, b in pairs], dim=2)  # (out, r, experts)
    return lora_a, lora_b.flatten(1)


MATRIX = Layout("matrix", Kind.LINEAR, WEIGHTS, _fits_matrix, _unpack_matrix, _pack_matrix)
TABLE = Layout("embedding", Kind.EMBEDDING, EMBEDDING_WEIGHTS, _fits_matrix, _unpack_matrix, _pack_matrix)
KERNEL = Layout("convolution", Kind.CONVOLUTION, WEIGHTS, _fits_kernel, _unpack_kernel, _pack_kernel)
EXPERTS = Layout("parameter", Kind.PARAMETER, WEIGHTS, _fits_experts, _unpack_experts, _pack_experts)

LAYOUTS = (MATRIX, TABLE, KERNEL, EXPERTS)


def layout_of(suffix_a: str, dimensions: int, is_parameter: bool) -> Layout:
    """The layout of a module from the name of its A, that tensor's dimensions, and whether a parameter is targeted."""
    if suffix_a == EMBEDDING_WEIGHTS[0]:
        return TABLE
    if is_parameter:
        return EXPERTS
    return KERNEL if dimensions > 2 else MATRIX
