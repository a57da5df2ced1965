"""`fix_adapter`: the product. Everything that the command line does, without a terminal."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora_cli import card, html, writer
from csulora_cli.adapter import Adapter, describe, read_adapter, scale_options
from csulora_cli.engine import effects, strength
from csulora_cli.engine.attach import Factors, Update, unchanged
from csulora_cli.engine.behaviour import KlJudge, measure_behaviour
from csulora_cli.engine.host import Host, choose_device, solver_device
from csulora_cli.engine.inputs import DirectionPrompts, Encoded, encode_prompts
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.prompts_source import Confined, PromptsPath, closest, protecting
from csulora_cli.engine.reach import reach_of
from csulora_cli.engine.search import find_strength
from csulora_cli.engine.weights_source import ModuleDisplacement, WeightsPath, check_geometry, measure_displacements
from csulora_cli.errors import AdapterError, HostError, VerificationError
from csulora_cli.files import read_again, sha256_of, staged_file
from csulora_cli.fitting import Fitting, check_magnitudes, tell_active
from csulora_cli.formats.config import CONFIG_NAME
from csulora_cli.formats.site import Site
from csulora_cli.locate import ADAPTER_FILES, locate, locate_model
from csulora_cli.opening import (
    Recorder,
    check_report,
    check_unchanged,
    folders_of,
    locate_host,
    model_files,
    model_record,
    run_on_device,
    stamps_of,
)
from csulora_cli.promptset import SPLITS, PromptSet, load_prompts
from csulora_cli.report import FixReport, InputRecord, ModuleRecord, StrengthRecord
from csulora_cli.settings import FixSettings, Source
from csulora_cli.text import printable, some
from csulora_cli.version import __version__


def fix_adapter(settings: FixSettings, progress: Progress | None = None) -> FixReport:
    """Find the closest safe update to an adapter and write it as a new adapter folder.

    Args:
        settings: what to do.
        progress: receives stages, steps and warnings; nothing is printed here.

    Returns:
        What was done and measured. The output folder is complete when this returns; `report.exit_code` is 3 if it was
        written but a gate failed.

    Raises:
        CsuloraError: see `errors`; nothing is left behind.
    """
    return run_on_device(lambda settings, recorder: _Fix(settings, recorder).run(), settings, progress)


# Recomputes what every module's stored factors do; given to `_finish` by the source that was used.
_Effects = Callable[[Mapping[str, Factors]], list[effects.Effect]]
# The closest update at a λ, by name of the site.
_Repair = Callable[[float], dict[str, Factors]]


@dataclass(frozen=True)
class _Solution:
    """What a source found: the factors in full precision, λ, and what it knows of the modules."""

    factors: dict[str, Factors]
    strength: StrengthRecord
    truncation_error: Mapping[str, float]


class _Fix:
    """One run of `fix_adapter`, stage by stage."""

    def __init__(self, settings: FixSettings, progress: Recorder) -> None:
        self.settings = settings
        self.progress = progress

    def run(self) -> FixReport:
        settings = self.settings
        self.progress.stage("adapter")
        self.adapter_at = locate(settings.adapter, ADAPTER_FILES, settings.revision)
        self.out = settings.out or Path(f"{self.adapter_at.name}-csulora")
        writer.check_output(self.out, self.adapter_at.folder, settings.overwrite)
        check_report(settings.report, settings.overwrite, self.out)
        self.stamps = stamps_of(ADAPTER_FILES, self.adapter_at)
        self.adapter = read_adapter(self.adapter_at.folder)
        check_magnitudes(self.adapter, settings.dora, settings.strict)
        self.device = choose_device(settings.device)
        self.prompts = load_prompts(settings.prompts) if settings.runs_prompts else None
        self.progress.stage("models")
        files = model_files(settings.trust_remote_code)
        self.host_at = locate_host(self.adapter, settings.base, files, self.progress)
        self.unaligned_at = locate_model(settings.unaligned, files, "unaligned model") if settings.unaligned else None
        writer.check_apart(self.out, *folders_of(self.host_at, self.unaligned_at), settings.prompts)
        self.stamps += stamps_of(files, self.host_at, self.unaligned_at)
        with ExitStack() as stack:
            self.fitting = Fitting(self.adapter, self.host_at, self.unaligned_at, settings.trust_remote_code)
            self.fitting.match(stack)
            self.host = self.fitting.load(self.device, settings.dtype, self.progress) if settings.runs_prompts else None
            self.carried = self.fitting.settle(settings.dora, self.progress)
            tell_active(self.carried, settings.strict, self.progress)
            self.adapter = self.fitting.adapter
            self._check_reach()
            if settings.chosen_source is Source.WEIGHTS:
                return self._finish(*self._weights())
        return self._finish(*self._prompts())

    def _check_reach(self) -> None:
        """Refuse to measure what the prompts do not run; the weights source can go on with what they do run.

        Raises:
            HostError: nothing, or not all that has to be, runs on text prompts.
        """
        if self.host is None or self.prompts is None:
            return
        reach = reach_of(self.host, self.sites, self.prompts.directions.harmful)
        if not reach.unreached:
            return
        if self.settings.fades_on_prompts:
            way = "use --unaligned without --protect"
            way += ", with a number for --strength" if reach.is_none else ""
            raise HostError(f"{reach}: {reach.names}", f"Prompts cannot judge them; {way}.")
        if reach.is_none:
            raise HostError(
                f"{reach}, so that no λ can be found by measuring: {reach.names}", "Give --strength a number."
            )
        self.progress.warn(f"{reach}; λ and all that is measured come from the others alone: {reach.names}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the solver sees of the adapter."""
        return self.adapter.sites

    def _encode(self, host: Host, split: str) -> Encoded:
        assert self.prompts is not None
        return encode_prompts(host, getattr(self.prompts, split))

    # Sources

    def _prompts(self, bases: Mapping[str, Tensor] | None = None) -> tuple[_Solution, _Effects]:
        """By what the host reads in prompts; given bases, along these directions of each site's input alone."""
        host = self.host
        assert host is not None
        fixed = self.settings.fixed_strength
        protect = self.settings.chosen_protect
        directions = self._directions(host)
        solver = closest if bases is None else Confined(bases)
        strengths = strength.PATH if fixed is None else [fixed]
        path = PromptsPath(host, self.sites, directions, protect, strengths, self.progress, solvers=[solver])
        record, factors = self._solve(partial(path.repaired, solver=solver))

        def of(stored: Mapping[str, Factors]) -> list[effects.Effect]:
            found = effects.prompt_effects(
                host, self.sites, path.groups, stored, directions, protect, record.value, self.progress, bases
            )
            self._tell_unreached([each for each in found if bases is None or bases[each.name].shape[1]])
            return found

        return _Solution(factors, record, {}), of

    def _tell_unreached(self, found: Sequence[effects.Effect]) -> None:
        """Experts to which no token was sent that the update fades on were not judged, and keep what they do."""
        experts = {site.name for site in self.sites if site.place.expert is not None and not site.is_zero}
        unreached = [effect.name for effect in found if effect.name in experts and effect.before["faded"] == 0]
        if unreached:
            self.progress.warn(
                f"no token of the prompts that updates fade on reached {len(unreached)} of {len(experts)} adapted "
                f"experts, whose updates are not repaired: {some(unreached, 2)}"
            )

    def _directions(self, host: Host) -> DirectionPrompts:
        assert self.prompts is not None
        prompts = self.prompts.directions
        if self.settings.chosen_protect == 0 or self.settings.fixed_strength == 0:
            return DirectionPrompts.encode(host, prompts)
        return protecting(host, prompts, Update.of(self.adapter), self.progress)

    def _weights(self) -> tuple[_Solution, _Effects]:
        settings = self.settings
        check_geometry(self.sites, settings.chosen_geometry)
        self.displacements: dict[str, ModuleDisplacement] = measure_displacements(
            self.sites,
            *self.fitting.oriented(),
            settings.chosen_energy,
            settings.subspace_rank,
            solver_device(self.device),
            self.progress,
        )
        if settings.fades_on_prompts:
            return self._prompts({name: entry.directions.right for name, entry in self.displacements.items()})
        path = WeightsPath(self.sites, self.displacements, settings.chosen_geometry, settings.chosen_rank)
        record, factors = self._solve(path.repaired)

        def of(stored: Mapping[str, Factors]) -> list[effects.Effect]:
            return effects.weight_effects(
                self.sites, stored, self.displacements, settings.chosen_geometry, record.value
            )

        return _Solution(factors, record, path.truncation_error), of

    def _solve(self, repaired: _Repair) -> tuple[StrengthRecord, dict[str, Factors]]:
        """λ, given or found, and the closest update there."""
        fixed = self.settings.fixed_strength
        record = self._search(repaired) if fixed is None else StrengthRecord(fixed, is_auto=False)
        return record, unchanged(self.sites) if record.value == 0 else repaired(record.value)

    def _search(self, repaired: _Repair) -> StrengthRecord:
        """The smallest λ at which the repaired model begins its answers to harmful tuning prompts as the host does."""
        host = self.host
        assert host is not None
        self.progress.stage("strength")
        judge = KlJudge(host, self._encode(host, "tuning"), Update.of(self.adapter))
        return find_strength(judge, self.sites, repaired, self.settings.target, self.progress)

    # Writing

    def _finish(self, solution: _Solution, measure_effects: _Effects) -> FixReport:
        with self._staged() as (staging, page):
            self.progress.stage("write")
            tensors, config = writer.stored_tensors(self.adapter, solution.factors, self.fitting.weight_of)
            if not writer.is_finite(tensors):
                raise AdapterError(
                    f"the repaired factors do not fit the adapter's dtype ({', '.join(self.adapter.dtypes)})",
                    "Save the adapter in float32 first.",
                )
            changed = [key for key, tensor in tensors.items() if not torch.equal(tensor, self.adapter.tensors[key])]
            self._write_adapter(staging, tensors, config, changed)
            written = self.fitting.reopened(staging)
            self._tell_servers(written)
            stored = unchanged(written.sites)
            if set(stored) != {site.name for site in self.sites}:
                raise VerificationError("the written file does not hold the modules of the adapter")
            records = self._verify(solution, stored, measure_effects(stored))
            behaviour = {}
            if self.host is not None and self.prompts is not None:
                behaviour = measure_behaviour(
                    self.host,
                    self._encode(self.host, "report"),
                    Update.of(self.adapter),
                    stored,
                    self.progress,
                )
            self.progress.stage("report")
            report = self._report(solution.strength, records, behaviour, tensors, changed)
            (staging / writer.CARD_NAME).write_text(
                card.model_card(report, self.adapter, self.host_at), encoding="utf-8"
            )
            report = replace(report, files=_digests(staging))
            document = {key: value for key, value in report.to_dict().items() if key != "out"}
            (staging / writer.REPORT_NAME).write_text(
                json.dumps(document, indent=2, ensure_ascii=True) + "\n", encoding="utf-8"
            )
            if page is not None:
                page.parent.mkdir(parents=True, exist_ok=True)
                page.write_text(html.fix_page(report), encoding="utf-8")
            check_unchanged(self.stamps)
        return report

    @contextmanager
    def _staged(self) -> Iterator[tuple[Path, Path | None]]:
        """The output folder and the report as they are to become: both appear when the block ends well.

        A report in the output folder comes and goes with it.
        """
        page, out = self.settings.report, self.out.resolve()
        with ExitStack() as stack:
            if page is None:
                yield stack.enter_context(writer.staged(self.out)), None
            elif out in page.resolve().parents:
                staging = stack.enter_context(writer.staged(self.out))
                yield staging, staging / page.resolve().relative_to(out)
            else:
                staged_page = stack.enter_context(staged_file(page))
                yield stack.enter_context(writer.staged(self.out)), staged_page

    def _write_adapter(
        self, staging: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], changed: Sequence[str]
    ) -> None:
        """Write weights, config and companions; a file with nothing new in it keeps its bytes, whoever stored it.

        Args:
            staging: where to.
            tensors, config: what the files are to hold.
            changed: the keys of tensors that do not hold what was read.
        """
        is_as_read = not self.adapter.conversions
        keeps_tensors = is_as_read and tensors.keys() == self.adapter.tensors.keys() and not changed
        weights_name = self.adapter.dialect.weights_name
        data = self._read_again(weights_name) if keeps_tensors else writer.serialise(tensors)
        (staging / weights_name).write_bytes(data)
        if is_as_read and config == self.adapter.config:
            (staging / CONFIG_NAME).write_bytes(self._read_again(CONFIG_NAME))
        else:
            (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        writer.copy_companions(self.adapter_at.folder, staging)

    def _read_again(self, name: str) -> bytes:
        """The bytes of one of the adapter's two files, which the report gives the hash of."""
        return read_again(self.adapter_at.folder / name, AdapterError, self.adapter.sha256[name])

    def _tell_servers(self, written: Adapter) -> None:
        """What llama.cpp leaves out when it converts an adapter, without a word."""
        if options := scale_options(written):
            self.progress.warn(
                f"llama.cpp ignores {' and '.join(options)}, which this adapter uses: converted for it, its updates "
                "would have other scales"
            )

    def _verify(
        self, solution: _Solution, stored: Mapping[str, Factors], found: Sequence[effects.Effect]
    ) -> list[ModuleRecord]:
        """Check the re-opened file against what was promised, site by site.

        Raises:
            VerificationError: an objective is above the one at Δ by more than rounding.
        """
        self.progress.stage("verify")
        errors = writer.cast_error(self.sites, solution.factors, stored)
        records = []
        for site, effect in zip(self.sites, found, strict=True):
            error = errors[site.name] + solution.truncation_error.get(site.name, 0.0)
            slack = 1e-9 + 4 * effect.weight * error**2
            if self.settings.fades_on_prompts:  # another objective is minimised, so that this one has a slope
                slack += 2 * math.sqrt(effect.weight * effect.objective_before) * error
            if not effect.objective_after <= effect.objective_before * (1 + 1e-6) + slack:  # also for NaN
                raise VerificationError(
                    f"module '{printable(site.name)}' came out worse than it went in: objective "
                    f"{effect.objective_after:.6g} above {effect.objective_before:.6g}",
                    "Please report this with csulora's version and the adapter's name.",
                )
            records.append(self._record(site, effect, errors[site.name], solution))
        return records

    def _record(self, site: Site, effect: effects.Effect, error: float, solution: _Solution) -> ModuleRecord:
        update, _ = effects.update_norms(site, Factors.of(site))
        record = ModuleRecord(
            name=site.name,
            rank=effect.rank,
            energy=update,
            moved=effect.moved,
            before=effect.before,
            after=effect.after,
            chance=effect.chance,
            objective_before=effect.objective_before,
            objective_after=effect.objective_after,
            storage_error=error,
            truncation_error=solution.truncation_error.get(site.name),
        )
        if self.settings.chosen_source is Source.PROMPTS:
            return record
        entry = self.displacements[site.name]
        return replace(
            record,
            directions=entry.directions.rank,
            direction_energy=entry.directions.energy,
            displacement_norm=entry.relative_norm,
            rounding_share=entry.noise_share,
        )

    def _report(
        self,
        strength_record: StrengthRecord,
        records: Sequence[ModuleRecord],
        behaviour: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        changed: Sequence[str],
    ) -> FixReport:
        before = self.adapter.tensors
        carried = {record.key for record in self.carried}
        counts = {
            "changed": len(changed),
            "unchanged": len(tensors) - len(changed) - len(carried & tensors.keys()),
            "carried": len(carried & tensors.keys()),
            "dropped": len(before.keys() - tensors.keys()),
            "total": len(before),
        }
        return FixReport(
            version=__version__,
            out=str(self.out),
            adapter_summary=describe(self.adapter),
            library=self.adapter.dialect.name,
            inputs=self._inputs(),
            settings=self._settings_used(strength_record.value),
            prompt_counts=_counts(self.prompts),
            strength=strength_record,
            modules=records,
            behaviour=behaviour,
            tensors=counts,
            conversions=self.adapter.conversions,
            carried=self.carried,
            warnings=tuple(self.progress.warnings),
        )

    def _inputs(self) -> dict[str, InputRecord]:
        inputs = {"adapter": InputRecord(self.adapter_at.label, self.adapter_at.commit, self.adapter.sha256)}
        for role, location in (("host", self.host_at), ("unaligned", self.unaligned_at)):
            if location is not None:
                inputs[role] = model_record(
                    location,
                    role,
                    is_run=role == "host" and self.host is not None,
                    trust_remote_code=self.settings.trust_remote_code,
                )
        if self.prompts is not None:
            inputs["prompts"] = InputRecord(self.prompts.name, None, {self.prompts.name: self.prompts.sha256})
        return inputs

    def _settings_used(self, value: float) -> dict[str, Any]:
        settings = self.settings
        used: dict[str, Any] = {"source": str(settings.chosen_source), "strength": value}
        if settings.fades_on_prompts:
            used["protect"] = settings.chosen_protect
        if settings.chosen_source is Source.WEIGHTS:
            used["geometry"] = str(settings.chosen_geometry)
            used["subspace_energy"] = None if settings.subspace_rank else settings.chosen_energy
            used["subspace_rank"] = settings.subspace_rank
            used["rank"] = str(settings.chosen_rank)
        used["target"] = settings.chosen_target if settings.is_auto else None
        used["device"] = self.device.type
        return used if self.host is None else used | self.host.settings


def _counts(prompts: PromptSet | None) -> dict[str, dict[str, int]]:
    if prompts is None:
        return {}
    counts = {
        split: {"harmful": len(getattr(prompts, split).harmful), "benign": len(getattr(prompts, split).benign)}
        for split in SPLITS
    }
    own = prompts.directions
    faded = {kind: len({*getattr(own, kind)} & {*own.faded}) for kind in ("harmful", "lookalikes")}
    counts["directions"] = {**faded, "benign": len(own.protected)}
    return counts


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
