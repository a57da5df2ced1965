"""What a method of `csulora compare` is: a pure function of the modules, what it asks for and a strength, and its name.

A method says what it needs by its kind; whoever runs it computes that once and shares it among all methods of the kind.
Strength 0 gives the adapter back, and a method repairs more as its strength rises.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.prompts_source import Solver
from csulora_cli.formats.site import Site
from csulora_cli.promptset import Prompts
from csulora_cli.solver.displacement import Directions

Observation = TypeVar("Observation")
# (how many strengths, how many modules the adapter has) -> that many strengths, or fewer, ascending.
Grid = Callable[[int, int], tuple[float, ...]]


class Family(StrEnum):
    """Whose a method is."""

    CSULORA = "csulora"
    PEER = "peer"
    CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is known of a method without running it.

    Attributes:
        name: what `--methods` calls it.
        family: whose it is.
        summary: what it does, in a few words.
        symbol: what its strength is called where it comes from.
        grid: its strengths.
        default: the strength that its authors recommend, or None.
        at_norm: the strength at which ‖X‖/‖Δ‖ is a given ratio; for controls of equal norm.
        has_auto: whether a strength is also found by measuring, as `csulora fix` does. So for csulora's own methods,
            and for the controls of them: a control that gets less care than what it controls shows nothing.
        keeps_blocks: B of a convolution with groups, block-diagonal as its D is, stays so.
    """

    name: str
    family: Family
    summary: str
    symbol: str
    grid: Grid
    default: float | None = None
    has_auto: bool = False
    at_norm: Callable[[float], float] | None = None
    keeps_blocks: bool = True

    def strengths(self, points: int, modules: int) -> tuple[float, ...]:
        """So many strengths, ascending; the recommended one takes the place of the nearest."""
        grid = self.grid(points, modules)
        default = self.default
        if default is None or default > grid[-1]:
            return grid
        nearest = min(grid, key=lambda strength: abs(strength - default))
        return tuple(sorted({*grid} - {nearest} | {default}))


@dataclass(frozen=True, kw_only=True)
class FactorsMethod(Method):
    """Needs the adapter's factors only.

    Attributes:
        repair: (modules, strength) -> factors by module name.
    """

    repair: Callable[[Sequence[Site], float], dict[str, Factors]]


@dataclass(frozen=True, kw_only=True)
class DirectionsMethod(Method):
    """Needs the leading singular directions of every module's displacement D = host − unaligned.

    Attributes:
        repair: (modules, directions by module name, strength) -> factors by module name.
    """

    repair: Callable[[Sequence[Site], Mapping[str, Directions], float], dict[str, Factors]]


@dataclass(frozen=True, kw_only=True)
class DisplacementMethod(Method, Generic[Observation]):
    """Needs one look at every module's whole D, which is streamed and never kept.

    Attributes:
        observe: (module, D) -> all that `repair` needs of it; methods with the same function share what it gives.
        repair: (modules, observations by module name, strength) -> factors by module name.
    """

    observe: Callable[[Site, Tensor], Observation]
    repair: Callable[[Sequence[Site], Mapping[str, Observation], float], dict[str, Factors]]


@dataclass(frozen=True, kw_only=True)
class MomentsMethod(Method):
    """Needs the second moments of the modules' inputs, from a forward pass of the host over the direction prompts.

    Attributes:
        solve: the factors of the modules that read one input.
        fades_on: the direction prompts that C_h comes from.
    """

    solve: Solver
    fades_on: Callable[[Prompts], tuple[str, ...]] = attrgetter("faded")


@dataclass(frozen=True, kw_only=True)
class ConfinedMethod(Method):
    """Needs the moments of a `MomentsMethod`, and the displacement's directions of every module.

    Attributes:
        solver: V by module name, (in, k) -> the factors of the modules that read one input.
    """

    solver: Callable[[Mapping[str, Tensor]], Solver]


def logarithmic(low: float, high: float) -> Grid:
    """Strengths with equal ratios from `low` to `high`, to three digits."""

    def grid(points: int, _modules: int) -> tuple[float, ...]:
        if points == 1:
            return (_rounded(math.sqrt(low * high)),)
        return tuple(_rounded(low * (high / low) ** (index / (points - 1))) for index in range(points))

    return grid


def linear(low: float, high: float) -> Grid:
    """Strengths with equal steps from `low` to `high`, to three digits."""

    def grid(points: int, _modules: int) -> tuple[float, ...]:
        if points == 1:
            return (_rounded((low + high) / 2),)
        return tuple(_rounded(low + (high - low) * index / (points - 1)) for index in range(points))

    return grid


def counts(points: int, modules: int) -> tuple[float, ...]:
    """Numbers of modules with equal steps, up to all of them."""
    return tuple(sorted({float(math.ceil(modules * (index + 1) / points)) for index in range(points)}))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def seeded(name: str) -> torch.Generator:
    """Random numbers that depend on a name alone: the same on every run, others for every module."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(seed)


def random_basis(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, uniformly distributed: QR of a Gaussian, R with a positive diagonal. (rows, columns)."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    basis: Tensor = q * r.diagonal().sign()
    return basis


def with_b(module: Site, lora_b: Tensor) -> Factors:
    """The module with another B, (out, r)."""
    return replace(Factors.of(module), lora_b=lora_b.float().cpu())


def with_addition(module: Site, columns: Tensor, rows: Tensor) -> Factors:
    """Δ + columns·rows, exactly, by stacking the factors: B' = [s·B, columns], A' = [A; rows], scale 1.

    Args:
        module: with the update Δ = s·B·A.
        columns: (out, k).
        rows: (k, in).
    """
    lora_b = torch.cat([module.scale * module.lora_b.float(), columns.float().cpu()], dim=1)  # (out, r+k)
    lora_a = torch.cat([module.lora_a.float(), rows.float().cpu()], dim=0)  # (r+k, in)
    return replace(Factors.of(module), lora_a=lora_a, lora_b=lora_b, scale=1.0)


def with_displacement(module: Site, directions: Directions, strength: float) -> Factors:
    """Δ + strength · U Σ Vᵀ, exactly, at rank r + k."""
    if strength == 0 or directions.rank == 0:
        return Factors.of(module)
    root = (strength * directions.singular_values).sqrt()  # half of Σ in each factor keeps 16-bit storage accurate
    return with_addition(module, directions.left * root, (directions.right * root).mT)
