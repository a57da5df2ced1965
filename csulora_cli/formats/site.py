"""A site: one two-dimensional weight of the host, the update that an adapter makes to it, and where it lies."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from csulora_cli.errors import AdapterError
from csulora_cli.solver.lowrank import squared_norm
from csulora_cli.text import printable


class Kind(StrEnum):
    """How the host uses the weight, and with it how a site's inputs are seen and its update is applied."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    PARAMETER = "parameter"


@dataclass(frozen=True)
class Place:
    """Where in the host a site lies.

    Attributes:
        module: the module that owns the weight.
        kind: how the module uses it.
        parameter: the weight's name in the module.
        expert: the index into a parameter (experts, out, in), or None for a weight of its own.
        is_transposed: a parameter of the kind PARAMETER is stored as (in, out).
        groups: of a convolution; its update reads all channels nevertheless.
    """

    module: str
    kind: Kind = Kind.LINEAR
    parameter: str = "weight"
    expert: int | None = None
    is_transposed: bool = False
    groups: int = 1

    @property
    def weight(self) -> str:
        """The name of the weight in the host."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Site:
    """What the solver sees of an adapter: always two factors of a two-dimensional update.

    Attributes:
        name: unique; the module's name, for a parameter with the parameter's name and the expert in brackets.
        lora_a: A, (r, in), in the stored dtype.
        lora_b: B, (out, r), in the stored dtype.
        alpha: lora_alpha of this module, after alpha_pattern.
        scale: s = alpha/r, or alpha/sqrt(r) with rsLoRA; the update is s·B·A.
        place: where it lies; by default the weight of the module of that name.
        gain: of DoRA, (out,), float64: the layer's output without its bias is multiplied by it, update included. B is
            already multiplied by it then. None without DoRA, or as long as the host's weight is not known.
        bias: b of `lora_bias`, (out,), which adds s·b to the output whatever the input is; None without one.
    """

    name: str
    lora_a: Tensor
    lora_b: Tensor
    alpha: float
    scale: float
    place: Place = Place("")
    bias: Tensor | None = None
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.place.module:
            object.__setattr__(self, "place", Place(self.name))

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[0]

    @property
    def is_zero(self) -> bool:
        """Whether the update adds nothing, whatever the input is."""
        has_bias = self.bias is not None and bool(self.bias.any())
        return not (self.scale and (has_bias or (self.lora_a.any() and self.lora_b.any())))

    def check_size(self) -> None:
        """Where ‖s·B·A‖_F fits the stored dtype, no entry of the update and no norm of it overflows.

        Raises:
            AdapterError: it does not.
        """
        largest = min(torch.finfo(tensor.dtype).max for tensor in (self.lora_a, self.lora_b))
        norm = abs(self.scale) * math.sqrt(squared_norm(self.lora_b, self.lora_a))
        if not norm <= largest:
            raise AdapterError(
                f"the update of '{printable(self.name)}', lora_B times lora_A, overflows (norm {norm:.1g})",
                "Training diverged or the file is damaged: use another checkpoint.",
            )

    @property
    def in_features(self) -> int:
        """Width of the input; for an embedding the size of the vocabulary."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.lora_b.shape[0]
