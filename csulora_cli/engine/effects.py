"""What an update and its repair do, site by site, recomputed from factors alone and from scratch.

These are the numbers of the report, and the check of the written file: they share no intermediate result with the
solver. For prompts, a fresh forward pass reduces every input to (r, r) Gram matrices on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from csulora_cli.engine.attach import Factors, Inputs
from csulora_cli.engine.host import Host
from csulora_cli.engine.inputs import DirectionPrompts, InputGroup, Side, watch_inputs
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.weights_source import ModuleDisplacement
from csulora_cli.formats.site import Site
from csulora_cli.settings import Geometry
from csulora_cli.solver import attenuate, lowrank
from csulora_cli.solver import split as three_way


@dataclass(frozen=True)
class Effect:
    """One site. Every energy is a share of ‖Δ‖², so that it has no unit; all are 0 for a zero update.

    Attributes:
        name: of the site.
        rank: of the update as written.
        moved: ‖X − Δ‖².
        before, after: the named energies of Δ and X.
        objective_before, objective_after: what a repair must not raise (`penalised_change`), at Δ and at X.
        chance: what the named energies are for a random update; empty where they are of what prompts feed in.
        weight: what a random change of relative size e, such as rounding, adds to the objective: e² times this.
    """

    name: str
    rank: int
    moved: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    objective_before: float
    objective_after: float
    chance: Mapping[str, float]
    weight: float


def update_norms(site: Site, repaired: Factors) -> tuple[float, float]:
    """‖Δ‖² and ‖X − Δ‖², scales included, from the factors."""
    update = site.scale**2 * lowrank.squared_norm(site.lora_b, site.lora_a)
    if repaired.scale == site.scale and torch.equal(repaired.lora_b, site.lora_b):
        change = repaired.lora_a.double() - site.lora_a.double()
        return update, site.scale**2 * lowrank.squared_norm(site.lora_b, change)
    return update, lowrank.squared_distance(
        site.scale * site.lora_b.double(),
        site.lora_a,
        repaired.scale * repaired.lora_b.double(),
        repaired.lora_a,
    )


def moved_share(sites: Sequence[Site], repaired: Mapping[str, Factors]) -> float:
    """Σ‖X − Δ‖² / Σ‖Δ‖² over all sites."""
    norms = [update_norms(site, repaired[site.name]) for site in sites]
    total = sum(update for update, _ in norms)
    return sum(distance for _, distance in norms) / total if total > 0 else 0.0


def prompt_effects(
    host: Host,
    sites: Sequence[Site],
    groups: Sequence[InputGroup],
    repaired: Mapping[str, Factors],
    prompts: DirectionPrompts,
    protect: float,
    strength: float,
    progress: Progress,
    bases: Mapping[str, Tensor] | None = None,
) -> list[Effect]:
    """Effects of a prompts repair on the direction prompts: energies `faded` and `benign`.

    faded is ‖Δ C_h^½‖² / ‖Δ‖²: 1 means "as strong on prompts where it is to fade as on any input of the same size".
    Both are without sinks (`Side.sink`), which the objective has.
    With bases V (`prompts_source.Confined`), both are of what the updates read along V: VVᵀx in the place of every x.
    """
    by_name = {site.name: site for site in sites}
    progress.stage("check", len(prompts.faded.tokens) + len(prompts.benign.tokens))

    def run(side: Side) -> dict[str, _Read]:
        return host.batch_size.restarting(
            lambda tell: _Grams(host, groups, by_name, repaired, bases or {}).run(side, tell), progress.advance
        )

    grams = {"faded": run(prompts.faded), "benign": run(prompts.benign)}
    return [
        _prompt_effect(site, repaired[site.name], {label: gram[site.name] for label, gram in grams.items()},
                       protect, strength)
        for site in sites
    ]  # fmt: skip


def _prompt_effect(
    site: Site, repaired: Factors, read: Mapping[str, "_Read"], protect: float, strength: float
) -> Effect:
    update, distance = update_norms(site, repaired)
    unit = 1 / update if update > 0 else 0.0
    inner = site.scale**2 * (site.lora_b.double().mT @ site.lora_b.double())  # (r, r)

    def energy(gram: Tensor) -> float:
        return float((inner * gram.to(inner.device)).sum()) * unit

    faded, benign = read["faded"], read["benign"]
    return Effect(
        site.name,
        repaired.lora_a.shape[0],
        distance * unit,
        {label: energy(each.own_tokens.before) for label, each in read.items()},
        {label: energy(each.own_tokens.after) for label, each in read.items()},
        attenuate.penalised_change(0, 0, energy(faded.all_tokens.before), protect, strength),
        attenuate.penalised_change(
            distance * unit, energy(benign.all_tokens.change), energy(faded.all_tokens.after), protect, strength
        ),
        {},
        1 + protect * benign.trace + strength * faded.trace,
    )


@dataclass(frozen=True)
class _Gram:
    """A C Aᵀ for A, A' and A' − A, (r, r) each, C scaled to trace `in`."""

    before: Tensor
    after: Tensor
    change: Tensor


@dataclass(frozen=True)
class _Read:
    """What one site reads of all tokens, of those that are no sink, and tr C/in with the sinks."""

    all_tokens: _Gram
    own_tokens: _Gram
    trace: float


class _Grams:
    """Sums of (A h)(A h)ᵀ over tokens, for A, A' and A' − A of every site."""

    def __init__(
        self,
        host: Host,
        groups: Sequence[InputGroup],
        sites: Mapping[str, Site],
        repaired: Mapping[str, Factors],
        bases: Mapping[str, Tensor],
    ) -> None:
        self.host = host
        self.groups = groups
        self.squared_total = dict.fromkeys(groups, 0.0)
        self.rows = {
            name: [
                _along(rows, bases.get(name)).to(host.device, torch.float32)
                for rows in (site.lora_a, repaired[name].lora_a, repaired[name].lora_a.double() - site.lora_a.double())
            ]
            for name, site in sites.items()
        }
        self.sums = {
            name: [torch.zeros(len(rows), len(rows), dtype=torch.float64) for rows in triple]
            for name, triple in self.rows.items()
        }

    def run(self, side: Side, advance: Callable[[int], None]) -> dict[str, _Read]:
        takers = {group: self._adder(group) for group in self.groups}
        for batch in side.batches(self.host):
            watch_inputs(self.host, batch, side.weights(batch), takers)
            advance(len(batch.rows))
        scaled_by = dict(self.squared_total)
        own = self._scaled(scaled_by)
        for batch, weights in side.sinks(self.host):
            watch_inputs(self.host, batch, weights, takers)
        trace = {
            name: self.squared_total[group] / scaled_by[group]
            for group in self.groups
            if scaled_by[group] > 0
            for name in group.members
        }
        return {name: _Read(gram, own[name], trace.get(name, 1.0)) for name, gram in self._scaled(scaled_by).items()}

    def _scaled(self, squared_total: Mapping[InputGroup, float]) -> dict[str, _Gram]:
        result = {name: _Gram(*sums) for name, sums in self.sums.items()}  # zero, of those that do not run
        for group in self.groups:
            scale = attenuate.unit_trace_scale(group.features, squared_total[group])
            for name in group.members:
                result[name] = _Gram(*(scale * total for total in self.sums[name]))
        return result

    def _adder(self, group: InputGroup) -> Callable[[Inputs], None]:
        def add(inputs: Inputs) -> None:
            self.squared_total[group] += inputs.squared_total()
            for name in group.members:
                for index, rows in enumerate(self.rows[name]):
                    inner = inputs.project(rows)  # (N, r)
                    self.sums[name][index] += (inner.mT @ inner).cpu().double()

        return add


def _along(rows: Tensor, basis: Tensor | None) -> Tensor:
    """What rows of A, (r, in), read of V, (in, k): A V Vᵀ; all that they read where there is no V."""
    return rows if basis is None else rows.double() @ basis.double() @ basis.double().mT


def weight_effects(
    sites: Sequence[Site],
    repaired: Mapping[str, Factors],
    displacements: Mapping[str, ModuleDisplacement],
    geometry: Geometry,
    strength: float,
) -> list[Effect]:
    """Effects of a weights repair: energies `full`, `partial`, `off` (keep-in) or `along D` (keep-out)."""
    effect = _keep_in_effect if geometry is Geometry.KEEP_IN else _keep_out_effect
    return [effect(site, repaired[site.name], displacements[site.name], strength) for site in sites]


def _keep_in_effect(site: Site, repaired: Factors, entry: ModuleDisplacement, strength: float) -> Effect:
    update, distance = update_norms(site, repaired)
    unit = 1 / update if update > 0 else 0.0
    directions = entry.directions
    old = three_way.split(site.scale * site.lora_b.double(), site.lora_a, directions.left, directions.right).parts
    new = three_way.split(
        repaired.scale * repaired.lora_b.double(), repaired.lora_a, directions.left, directions.right
    ).parts
    shares = old.shares
    chance = three_way.chance_shares(site.out_features, site.in_features, directions.rank)
    return Effect(
        site.name,
        repaired.lora_a.shape[0],
        distance * unit,
        {"full": shares.full, "partial": shares.partial, "off": shares.off},
        {"full": new.full * unit, "partial": new.partial * unit, "off": new.off * unit},
        three_way.penalised_change(0, old, shares, strength) * unit,
        three_way.penalised_change(distance, new, shares, strength) * unit,
        {"full": chance.full, "partial": chance.partial, "off": chance.off},
        1 + strength,
    )


def _keep_out_effect(site: Site, repaired: Factors, entry: ModuleDisplacement, strength: float) -> Effect:
    update, distance = update_norms(site, repaired)
    unit = 1 / update if update > 0 else 0.0
    directions = entry.directions
    gains = attenuate.displacement_gains(
        directions.singular_values, site.in_features, max(directions.squared_total, 1e-300)
    )

    def along(factors: Factors, weights: Tensor) -> float:
        inner = factors.lora_a.double() @ directions.right.double() * weights.sqrt()  # (r, k)
        return factors.scale**2 * lowrank.squared_norm(factors.lora_b, inner) * unit

    before, after = along(Factors.of(site), gains), along(repaired, gains)
    ones = torch.ones_like(gains)
    return Effect(
        site.name,
        repaired.lora_a.shape[0],
        distance * unit,
        {"along D": along(Factors.of(site), ones)},
        {"along D": along(repaired, ones)},
        attenuate.penalised_change(0, 0, before, 0, strength),
        attenuate.penalised_change(distance * unit, 0, after, 0, strength),
        {"along D": directions.rank / site.in_features},
        1 + strength,
    )
