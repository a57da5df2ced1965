"""`compare_methods`: one adapter, every method, several strengths each, scored alike on prompts that chose nothing."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from csulora_cli import html, writer
from csulora_cli.adapter import read_adapter, rewritten
from csulora_cli.compare_report import CompareReport, MethodRecord, Origin, Point, find_levels
from csulora_cli.engine import strength
from csulora_cli.engine.attach import Factors, Update, unchanged
from csulora_cli.engine.behaviour import KlJudge
from csulora_cli.engine.effects import moved_share
from csulora_cli.engine.host import choose_device, solver_device
from csulora_cli.engine.inputs import encode_prompts, group_sites
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.prompts_source import PromptsPath, Solver, protecting
from csulora_cli.engine.reach import reach_of
from csulora_cli.engine.scoring import (
    EncodedScoring,
    ModelRun,
    References,
    ScoringPrompts,
    encode_scoring,
    run_model,
    score_run,
)
from csulora_cli.engine.search import find_strength
from csulora_cli.engine.weights_source import measure_displacements
from csulora_cli.errors import AdapterError, HostError, PromptsError
from csulora_cli.files import write_whole
from csulora_cli.fitting import Fitting, tell_active
from csulora_cli.formats.config import CONFIG_NAME
from csulora_cli.formats.site import Site
from csulora_cli.journal import Journal
from csulora_cli.locate import ADAPTER_FILES, locate, locate_model
from csulora_cli.methods import choose, needs_displacement, needs_moments
from csulora_cli.methods.method import (
    ConfinedMethod,
    DirectionsMethod,
    DisplacementMethod,
    FactorsMethod,
    Family,
    Method,
    MomentsMethod,
)
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
from csulora_cli.pareto import dominated
from csulora_cli.promptset import SPLITS, load_prompts
from csulora_cli.report import InputRecord, StrengthRecord
from csulora_cli.scores import ModelScore
from csulora_cli.settings import DEFAULT_PROTECT, DEFAULT_SUBSPACE_ENERGY, CompareSettings, DoraMode
from csulora_cli.solver.displacement import Directions
from csulora_cli.solver.lowrank import squared_norm
from csulora_cli.taskset import load_task
from csulora_cli.text import number
from csulora_cli.version import __version__

# The factors of one method at a strength, by module name.
_Repair = Callable[[float], Mapping[str, Factors]]


def compare_methods(
    settings: CompareSettings, progress: Progress | None = None, journal: Path | None = None
) -> CompareReport:
    """Repair one adapter by every method at several strengths, and score all of them alike.

    Directions come from the direction prompts, strengths that are found by measuring from the tuning prompts; what is
    scored are the report prompts and the task, which choose nothing.

    Args:
        settings: what to do.
        progress: receives stages, steps and warnings; nothing is printed here.
        journal: a file of our own that is made and grows with every strength that is found and every point that is
            scored. What it holds from a run on the same inputs with the same settings is not measured again.

    Raises:
        CsuloraError: see `errors`; nothing is left behind.
    """
    kept = Journal(journal)
    return run_on_device(lambda settings, recorder: _Comparison(settings, recorder, kept).run(), settings, progress)


class _Comparison:
    """One run of `compare_methods`, stage by stage."""

    def __init__(self, settings: CompareSettings, progress: Recorder, journal: Journal) -> None:
        self.settings = settings
        self.progress = progress
        self.journal = journal
        self.scores: dict[str, tuple[ModelScore, tuple[bool, ...]]] = {}  # by the digest of the factors

    def run(self) -> CompareReport:
        settings = self.settings
        wanted = choose(settings.method_names, settings.unaligned is not None).methods  # before anything is fetched
        self.progress.stage("adapter")
        self.adapter_at = locate(settings.adapter, ADAPTER_FILES, settings.revision)
        if settings.out is not None:
            writer.check_output(settings.out, self.adapter_at.folder, settings.overwrite)
        check_report(settings.report, settings.overwrite, settings.out)
        self.stamps = stamps_of(ADAPTER_FILES, self.adapter_at)
        self.adapter = read_adapter(self.adapter_at.folder)
        self.device = choose_device(settings.device)
        self.prompts = load_prompts(settings.prompts)
        self.task = load_task(settings.task) if settings.task else None
        self.scored = self._scored_prompts()
        self.progress.stage("models")
        files = model_files(settings.trust_remote_code)
        self.host_at = locate_host(self.adapter, settings.base, files, self.progress)
        self.unaligned_at = locate_model(settings.unaligned, files, "unaligned model") if settings.unaligned else None
        if settings.out is not None:
            inputs = folders_of(self.host_at, self.unaligned_at)
            writer.check_apart(settings.out, *inputs, settings.prompts, settings.task)
        self.stamps += stamps_of(files, self.host_at, self.unaligned_at)
        with ExitStack() as stack:
            self.fitting = Fitting(self.adapter, self.host_at, self.unaligned_at, settings.trust_remote_code)
            self.fitting.match(stack)
            self.host = self.fitting.load(self.device, settings.dtype, self.progress)
            tell_active(self.fitting.settle(DoraMode.KEEP, self.progress), is_strict=False, progress=self.progress)
            self.adapter = self.fitting.adapter
            self.sites = self.adapter.sites
            has_groups = any(site.place.groups > 1 for site in self.sites)
            obstacle = self._obstacle_to_prompts(wanted)
            chosen = choose(
                settings.method_names, settings.unaligned is not None, has_groups, obstacle, self.prompts.directions
            )
            self.methods, self.left_out = chosen.methods, chosen.left_out
            self.repairs = self._prepare()
        return self._measure()

    def _obstacle_to_prompts(self, wanted: Sequence[Method]) -> str | None:
        """Why nothing can be repaired by what its modules read on prompts, as a predicate; None where it can be.

        Warns of modules that do not run on text. What modules read is looked at where a method asks for it.

        Raises:
            HostError: none does.
        """
        prompts = self.prompts.directions.harmful
        reach = reach_of(self.host, self.sites, prompts)
        if reach.is_none:
            raise HostError(
                f"{reach}, so that no repair can be measured: {reach.names}", "Text prompts cannot judge it."
            )
        if reach.unreached:
            self.progress.warn(f"{reach}; all that is measured comes from the others alone: {reach.names}")
            return "cannot judge the adapter's modules that run on no text prompt"
        if not any(map(needs_moments, wanted)):
            return None
        try:
            group_sites(self.host, self.sites, self.host.encode(prompts[0]))
        except HostError as problem:
            return f"cannot be run: {problem.message}"
        return None

    def _scored_prompts(self) -> ScoringPrompts:
        """The report split and the task, less what gives directions or chooses strengths."""
        used = {prompt for split in ("directions", "tuning") for prompt in getattr(self.prompts, split).everything}
        prompts = ScoringPrompts.of(self.prompts.report, self.task.examples if self.task else ())
        kept = prompts.without(used)
        if dropped := prompts.count_beyond(kept):
            self.progress.warn(f"{dropped} prompts are not scored: they give directions or choose strengths")
        if not kept.lacks_nothing_of(prompts):
            raise PromptsError(
                "no prompts are left that give no directions and choose no strengths",
                "Give others as --prompts or --task.",
            )
        return kept.first(self.settings.limit)

    # What the methods ask for

    def _prepare(self) -> dict[str, _Repair]:
        """Every method as a function of its strength alone; what they need is computed once for all."""
        repairs: dict[str, _Repair] = {
            method.name: partial(method.repair, self.sites)
            for method in self.methods
            if isinstance(method, FactorsMethod)
        }
        directions, from_weights = self._from_weights()
        bases = {name: entry.right for name, entry in directions.items()}
        return repairs | from_weights | self._from_prompts(bases)

    def _from_weights(self) -> tuple[dict[str, Directions], dict[str, _Repair]]:
        """The displacements' directions by module name, and the methods that need nothing else."""
        by_directions = [method for method in self.methods if isinstance(method, DirectionsMethod)]
        by_displacement = [method for method in self.methods if isinstance(method, DisplacementMethod)]
        if not any(map(needs_displacement, self.methods)):
            return {}, {}
        seen: dict[Callable[[Site, Tensor], Any], dict[str, Any]] = {method.observe: {} for method in by_displacement}

        def look(module: Site, displacement: Tensor) -> None:
            for observe, observations in seen.items():
                observations[module.name] = observe(module, displacement)

        displacements = measure_displacements(
            self.sites,
            *self.fitting.oriented(),
            DEFAULT_SUBSPACE_ENERGY,
            None,
            solver_device(self.device),
            self.progress,
            [look],
        )
        directions = {name: entry.directions for name, entry in displacements.items()}
        repairs: dict[str, _Repair] = {
            method.name: partial(method.repair, self.sites, directions) for method in by_directions
        }
        return directions, repairs | {
            method.name: partial(method.repair, self.sites, seen[method.observe]) for method in by_displacement
        }

    def _from_prompts(self, bases: Mapping[str, Tensor]) -> dict[str, _Repair]:
        repairs: dict[str, _Repair] = {}
        solvers = self._solvers(bases)
        if not solvers:
            return repairs
        own = protecting(self.host, self.prompts.directions, Update.of(self.adapter), self.progress)
        for faded, group in solvers.items():
            path = PromptsPath(
                self.host,
                self.sites,
                own.fading_on([self.host.encode(text) for text in faded]),
                DEFAULT_PROTECT,
                sorted({*strength.PATH, *(value for method in group for value in self._grid(method))}),
                self.progress,
                solvers=list(group.values()),
            )
            repairs |= {method.name: partial(path.repaired, solver=solver) for method, solver in group.items()}
        return repairs

    def _solvers(self, bases: Mapping[str, Tensor]) -> dict[tuple[str, ...], dict[Method, Solver]]:
        """Solvers of the methods that need moments, by the prompts that they fade on."""
        solvers: dict[tuple[str, ...], dict[Method, Solver]] = {}
        directions = self.prompts.directions
        for method in self.methods:
            if isinstance(method, MomentsMethod):
                solvers.setdefault(method.fades_on(directions), {})[method] = method.solve
            elif isinstance(method, ConfinedMethod):
                solvers.setdefault(directions.faded, {})[method] = method.solver(bases)
        return solvers

    def _grid(self, method: Method) -> tuple[float, ...]:
        return method.strengths(self.settings.points, len(self.sites))

    # What is measured

    def _measure(self) -> CompareReport:
        encoded = encode_scoring(self.host, self.scored, self.settings.answer_tokens, cuts_wrong=True)
        inputs, used = self._inputs(), self._settings_used(encoded)
        self.identity = _identity(inputs, used)
        automatic = self._search()
        plans = self._plans(automatic)
        self.progress.stage("methods", (2 + sum(map(len, plans.values()))) * encoded.steps)
        adapter = run_model(self.host, encoded, Update.of(self.adapter), self.progress.advance)
        references = References(run_model(self.host, encoded, Update(), self.progress.advance), adapter)
        points = []
        for method, strengths in plans.items():
            for value, origin in sorted(strengths.items()):
                points.append(self._point(method, value, origin, encoded, references))
        worse = dominated([point.standing for point in points])
        points = [replace(point, is_dominated=is_worse) for point, is_worse in zip(points, worse, strict=True)]
        host_score = score_run(references.host, references)
        report = CompareReport(
            version=__version__,
            inputs=inputs,
            settings=used,
            prompt_counts=self._counts(),
            methods=[_record(method, automatic.get(method.name)) for method in self.methods],
            host=host_score,
            adapter=score_run(references.adapter, references),
            points=points,
            levels=find_levels(points, host_score.attack_success),
            left_out=self.left_out,
            out=str(self.settings.out) if self.settings.out else None,
            warnings=tuple(self.progress.warnings),
        )
        page = html.compare_page(report) if self.settings.report is not None else ""
        check_unchanged(self.stamps)
        if self.settings.out is not None:
            self._write(self.settings.out, report)
        if self.settings.report is not None:
            write_whole(self.settings.report, page)
        return report

    def _search(self) -> dict[str, StrengthRecord]:
        """The strengths that are found on the tuning prompts, as `csulora fix` finds them."""
        methods = [method for method in self.methods if method.has_auto]
        if not methods:
            return {}
        self.progress.stage("strength")
        judge = KlJudge(self.host, encode_prompts(self.host, self.prompts.tuning), Update.of(self.adapter))
        return {method.name: self._find(method, judge) for method in methods}

    def _find(self, method: Method, judge: KlJudge) -> StrengthRecord:
        found = self.journal.get(StrengthRecord, self.identity, method.name)
        if found is None:
            repaired = partial(self._stored, method)
            found = find_strength(judge, self.sites, repaired, None, self.progress, costs_everywhere=False)
            self.journal.put(found, self.identity, method.name)
        return found

    def _plans(self, automatic: Mapping[str, StrengthRecord]) -> dict[Method, dict[float, Origin]]:
        """Every method's strengths and where they come from."""
        ratio = self._left_norm(automatic)
        plans: dict[Method, dict[float, Origin]] = {}
        for method in self.methods:
            plans[method] = dict.fromkeys(self._grid(method), Origin.GRID)
            if method.at_norm is not None and ratio:
                plans[method][method.at_norm(ratio)] = Origin.NORM
            if method.name in automatic:
                plans[method][automatic[method.name].value] = Origin.AUTO
        return plans

    def _left_norm(self, automatic: Mapping[str, StrengthRecord]) -> float | None:
        """‖X‖/‖Δ‖ of csulora's first method at its automatic strength; None if none is run, or for Δ = 0."""
        own = [method for method in self.methods if method.family is Family.CSULORA and method.name in automatic]
        before = _squared_norm(unchanged(self.sites))
        if not own or before == 0:
            return None
        return math.sqrt(_squared_norm(self._stored(own[0], automatic[own[0].name].value)) / before)

    def _stored(self, method: Method, value: float) -> dict[str, Factors]:
        """A repair as it would be written: in the adapter's layout and dtypes."""
        tensors, config = writer.stored_tensors(self.adapter, self.repairs[method.name](value), self.fitting.weight_of)
        if not writer.is_finite(tensors):
            raise AdapterError(
                f"what {method.name} makes at {number(value)} does not fit the adapter's dtype "
                f"({', '.join(self.adapter.dtypes)})",
                "Leave it out of --methods, or save the adapter in float32 first.",
            )
        written = self.fitting.fitted(rewritten(self.adapter, config, tensors))
        return unchanged(written.sites)

    def _point(
        self, method: Method, value: float, origin: Origin, encoded: EncodedScoring, references: References
    ) -> Point:
        known = self.journal.get(Point, self.identity, method.name, value)
        if known is not None:
            self.progress.advance(encoded.steps)
            return replace(known, origin=origin)
        factors = self._stored(method, value)
        score, task_right = self._score(factors, encoded, references)
        point = Point(
            method=method.name,
            family=str(method.family),
            strength=value,
            origin=origin,
            moved=moved_share(self.sites, factors),
            rank=max(each.lora_a.shape[0] for each in factors.values()),
            score=score,
            task_right=task_right,
        )
        self.journal.put(point, self.identity, method.name, value)
        return point

    def _score(
        self, factors: Mapping[str, Factors], encoded: EncodedScoring, references: References
    ) -> tuple[ModelScore, tuple[bool, ...]]:
        """The score and the right task answers; the same factors, the adapter's own among them, are run once."""
        if not self.scores:
            self.scores[_digest(unchanged(self.sites))] = _scored(references.adapter, references)
        key = _digest(factors)
        if key in self.scores:
            self.progress.advance(encoded.steps)
        else:
            run = run_model(self.host, encoded, Update(factors, self.adapter.carried), self.progress.advance)
            self.scores[key] = _scored(run, references)
        return self.scores[key]

    # What comes out

    def _inputs(self) -> dict[str, InputRecord]:
        trust = self.settings.trust_remote_code
        inputs = {
            "adapter": InputRecord(self.adapter_at.label, self.adapter_at.commit, self.adapter.sha256),
            "host": model_record(self.host_at, "host", is_run=True, trust_remote_code=trust),
        }
        if self.unaligned_at is not None:
            inputs["unaligned"] = model_record(
                self.unaligned_at, "unaligned model", is_run=False, trust_remote_code=trust
            )
        for name, source in (("prompts", self.prompts), ("task", self.task)):
            if source is not None:
                inputs[name] = InputRecord(source.name, None, {source.name: source.sha256})
        return inputs

    def _settings_used(self, encoded: EncodedScoring) -> dict[str, Any]:
        return {
            "decoding": "greedy",
            "seed": None,
            "answer_tokens": encoded.answer_tokens,
            "task_tokens": encoded.task.new_tokens if encoded.task else None,
            "points": self.settings.points,
            "limit": self.settings.limit,
            "protect": DEFAULT_PROTECT,
            "subspace_energy": DEFAULT_SUBSPACE_ENERGY,
            **self.host.settings,
        }

    def _counts(self) -> dict[str, int]:
        scored = self.scored
        counts = {split: len(getattr(self.prompts, split).everything) for split in SPLITS if split != "report"}
        return counts | {
            "harmful": len(scored.harmful),
            "lookalikes": len(scored.lookalikes),
            "general": len(scored.general) if scored.has_general else 0,
            "task": len(scored.task),
        }

    def _write(self, out: Path, report: CompareReport) -> None:
        """The winners' adapters, a folder each, all of them or none."""
        self.progress.stage("write")
        chosen = sorted({place for level in report.levels for place in level.winners})
        with writer.staged(out) as staging:
            for point in (report.points[place] for place in chosen):
                folder = staging / f"{point.method}-{number(point.strength)}"
                folder.mkdir()
                tensors, config = writer.stored_tensors(
                    self.adapter, self.repairs[point.method](point.strength), self.fitting.weight_of
                )
                (folder / self.adapter.dialect.weights_name).write_bytes(writer.serialise(tensors))
                (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                writer.copy_companions(self.adapter_at.folder, folder)
                _write_json(folder, {"method": point.method, "strength": point.strength, **_provenance(report)})
            _write_json(staging, {key: value for key, value in report.to_dict().items() if key != "out"})
            check_unchanged(self.stamps)  # more of the adapter's files were copied just now


def _identity(inputs: Mapping[str, InputRecord], settings: Mapping[str, Any]) -> str:
    """What a measured strength or point depends on, beside the method and its strength."""
    files = {name: dict(record.sha256) for name, record in inputs.items()}
    others = {name: value for name, value in settings.items() if name != "points"}
    return hashlib.sha256(json.dumps([__version__, files, others], sort_keys=True).encode()).hexdigest()


def _scored(run: ModelRun, references: References) -> tuple[ModelScore, tuple[bool, ...]]:
    return score_run(run, references), tuple(run.task.is_right) if run.task else ()


def _digest(factors: Mapping[str, Factors]) -> str:
    """Of everything that decides what factors do where they are applied."""
    digest = hashlib.sha256()
    for name, own in sorted(factors.items()):
        digest.update(f"{name} {own.scale} {own.place}".encode())
        for tensor in (own.lora_a, own.lora_b, own.bias, own.gain):
            wide = None if tensor is None else tensor.float().contiguous()
            digest.update(b"none" if wide is None else str(tuple(wide.shape)).encode() + wide.numpy().tobytes())
    return digest.hexdigest()


def _squared_norm(factors: Mapping[str, Factors]) -> float:
    """Σ‖X‖² over modules."""
    return sum(each.scale**2 * squared_norm(each.lora_b, each.lora_a) for each in factors.values())


def _record(method: Method, auto: StrengthRecord | None) -> MethodRecord:
    return MethodRecord(method.name, str(method.family), method.summary, method.symbol, method.default, auto)


def _provenance(report: CompareReport) -> dict[str, Any]:
    document = report.to_dict()
    return {key: document[key] for key in ("version", "inputs", "settings")}


def _write_json(folder: Path, document: Mapping[str, Any]) -> None:
    (folder / writer.REPORT_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
