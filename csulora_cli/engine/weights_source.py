"""Source "weights": directions of the displacement host − unaligned, streamed tensor by tensor, without any model."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from csulora_cli.checkpoint import PRECISION, Checkpoint, WeightMatch, read_weight
from csulora_cli.engine.attach import Factors
from csulora_cli.engine.memory import with_cpu_in_reserve
from csulora_cli.engine.progress import Progress
from csulora_cli.errors import HostError, UnsupportedError
from csulora_cli.formats.site import Site
from csulora_cli.settings import Geometry, RankMode
from csulora_cli.solver.attenuate import by_directions, displacement_gains
from csulora_cli.solver.displacement import Directions, leading_directions
from csulora_cli.solver.lowrank import truncate
from csulora_cli.solver.split import split
from csulora_cli.text import printable, some

# ‖D‖/‖W‖ of unrelated models is about √2; above this a warning says so.
UNLIKE = 1.0
# What looks at the displacement D, (out, in), of a site while it is at hand.
Observer = Callable[[Site, Tensor], None]


@dataclass(frozen=True)
class ModuleDisplacement:
    """What the weights source knows of one site.

    Attributes:
        directions: of D, float32 bases.
        relative_norm: ‖D‖ / ‖W‖.
        noise_share: share of ‖D‖² in entries no larger than the spacing of the stored dtype around W.
    """

    directions: Directions
    relative_norm: float
    noise_share: float


@dataclass(frozen=True)
class _Pair:
    name: str
    displacement: Tensor  # (out, in), float32
    weight_norm: float
    noise_share: float


class WeightsPath:
    """The repaired update for any λ, in either geometry."""

    def __init__(
        self,
        sites: Sequence[Site],
        displacements: dict[str, ModuleDisplacement],
        geometry: Geometry,
        rank: RankMode,
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.displacements = displacements
        self.geometry = geometry
        self.rank = rank
        self.truncation_error: dict[str, float] = {}

    def repaired(self, strength: float) -> dict[str, Factors]:
        """The closest update at λ, by name of the site. A site without displacement stays as it is."""
        return {name: self._solve(site, strength) for name, site in self.sites.items()}

    def _solve(self, site: Site, strength: float) -> Factors:
        directions = self.displacements[site.name].directions
        if self.geometry is Geometry.KEEP_OUT:
            return keep_out(site, directions, strength)
        factors, self.truncation_error[site.name] = keep_in(site, directions, strength, self.rank)
        return factors


def check_geometry(sites: Sequence[Site], geometry: Geometry) -> None:
    """Refuse keep-in where it has no place for what it makes: P B is not block-diagonal, as B is between groups.

    Raises:
        UnsupportedError: keep-in, and a site is a convolution with groups.
    """
    grouped = next((site for site in sites if site.place.groups > 1), None)
    if grouped is not None and geometry is Geometry.KEEP_IN:
        raise UnsupportedError(
            f"'{printable(grouped.name)}' is a convolution of {grouped.place.groups} groups, whose lora_B has no place "
            "for what keep-in makes of it",
            "Use --geometry keep-out, which changes lora_A alone.",
        )


def keep_out(site: Site, directions: Directions, strength: float) -> Factors:
    """The closest update that fades on V (`attenuate.by_directions`); A' in float32, B as stored."""
    if directions.rank == 0 or strength == 0:
        return Factors.of(site)
    gains = displacement_gains(directions.singular_values, site.in_features, directions.squared_total)
    repaired = by_directions(site.lora_a, directions.right, gains, strength)
    return replace(Factors.of(site), lora_a=repaired.float())


def keep_in(site: Site, directions: Directions, strength: float, rank: RankMode) -> tuple[Factors, float]:
    """The closest update that keeps what lies in U and V (`split.Split.closest`), and the truncation's relative error.

    Args:
        site: an adapted one.
        directions: of its displacement.
        strength: λ.
        rank: truncate to the adapter's rank, or keep the exact one of at most twice that.
    """
    if directions.rank == 0 or strength == 0:
        return Factors.of(site), 0.0
    parts = split(site.lora_b, site.lora_a, directions.left, directions.right)
    columns, rows = parts.closest(strength)
    wanted = site.rank if rank is RankMode.KEEP else min(2 * site.rank, *columns.shape[:1], rows.shape[1])
    columns, rows, error = truncate(columns, rows, wanted)
    return replace(Factors.of(site), lora_a=rows.float(), lora_b=columns.float()), error


def measure_displacements(
    sites: Sequence[Site],
    host: tuple[Checkpoint, dict[str, WeightMatch]],
    unaligned: tuple[Checkpoint, dict[str, WeightMatch]],
    energy: float,
    rank: int | None,
    device: torch.device,
    progress: Progress,
    observers: Sequence[Observer] = (),
) -> dict[str, ModuleDisplacement]:
    """Stream both checkpoints once and keep the leading directions of every adapted site's displacement.

    Args:
        sites: the adapted sites.
        host, unaligned: open checkpoints with the weight of every site.
        energy: τ.
        rank: k, in the place of τ, or None.
        device: where the factorisations run.
        progress: one step a site.
        observers: called with every site and its D, (out, in), which is gone afterwards.

    Raises:
        HostError: the two checkpoints do not differ, or a weight holds NaN or Inf.
    """
    progress.stage("displacement", len(sites))
    result: dict[str, ModuleDisplacement] = {}
    by_name = {site.name: site for site in sites}
    for pair in _pairs(sites, host, unaligned):
        found = with_cpu_in_reserve(partial(_directions, pair.displacement, energy, rank), device, progress.warn)
        for observe in observers:
            observe(by_name[pair.name], pair.displacement.to(found.right.device))
        norm = found.squared_total**0.5 / pair.weight_norm if pair.weight_norm > 0 else 0.0
        result[pair.name] = ModuleDisplacement(found.compact(), norm, pair.noise_share)
        progress.advance()
    if all(entry.directions.rank == 0 for entry in result.values()):
        raise HostError(
            f"the host and the unaligned model are the same in all {len(result)} adapted modules",
            "Give the checkpoint that the host was aligned from as --unaligned.",
        )
    if same := [name for name, entry in result.items() if entry.directions.rank == 0]:
        progress.warn(f"host and unaligned model do not differ in {len(same)} modules, left unchanged: {some(same)}")
    if unlike := [name for name, entry in result.items() if entry.relative_norm > UNLIKE]:
        progress.warn(
            f"host and unaligned model differ by more than the host's own weights in {len(unlike)} of {len(result)} "
            f"modules, as models that have nothing to do with each other do: {some(unlike, 2)}"
        )
    return result


def _directions(displacement: Tensor, energy: float, rank: int | None, device: torch.device) -> Directions:
    return leading_directions(displacement.to(device), energy, rank)


def _pairs(
    sites: Sequence[Site],
    host: tuple[Checkpoint, dict[str, WeightMatch]],
    unaligned: tuple[Checkpoint, dict[str, WeightMatch]],
) -> Iterator[_Pair]:
    """Displacements in the order in which they lie on disk, the next one being read while one is used."""
    checkpoint, matches = host
    ordered = sorted(sites, key=lambda site: _place(checkpoint, matches[site.name].tensor))
    with ThreadPoolExecutor(max_workers=1) as reader:
        following = [reader.submit(_read_pair, site, host, unaligned) for site in ordered[:1]]
        for index in range(len(ordered)):
            current = following.pop()
            if index + 1 < len(ordered):
                following.append(reader.submit(_read_pair, ordered[index + 1], host, unaligned))
            yield current.result()


def _place(checkpoint: Checkpoint, name: str) -> tuple[str, str]:
    return checkpoint.tensors[name].file.name, name


def _read_pair(
    site: Site,
    host: tuple[Checkpoint, dict[str, WeightMatch]],
    unaligned: tuple[Checkpoint, dict[str, WeightMatch]],
) -> _Pair:
    (checkpoint, matches), (other_checkpoint, other_matches) = host, unaligned
    weight, other = read_weight(checkpoint, matches[site.name]), read_weight(other_checkpoint, other_matches[site.name])
    displacement = weight - other
    if not bool(torch.isfinite(displacement).all()):
        raise HostError(f"the weight of '{printable(site.name)}' holds NaN or Inf in the host or the unaligned model")
    precision = min(
        PRECISION[checkpoint.tensors[matches[site.name].tensor].dtype],
        PRECISION[other_checkpoint.tensors[other_matches[site.name].tensor].dtype],
    )
    return _Pair(
        site.name,
        displacement,
        float(torch.linalg.vector_norm(weight)),
        rounding_share(displacement, weight, precision),
    )


def rounding_share(displacement: Tensor, weight: Tensor, precision: int) -> float:
    """Share of ‖D‖² in entries no larger than one spacing of a dtype around the weight: it may be rounding alone.

    Args:
        displacement: D, (out, in).
        weight: W, (out, in).
        precision: bits of the dtype's significand, the hidden one included (bfloat16: 8).
    """
    _, exponent = torch.frexp(weight)
    spacing = torch.ldexp(torch.ones_like(weight), exponent - precision)
    squares = displacement.square()
    total = float(squares.sum())
    return float(squares.where(displacement.abs() <= spacing, 0.0).sum()) / total if total > 0 else 0.0
