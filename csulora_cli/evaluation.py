"""`evaluate_adapters`: host, adapter and its repairs side by side, on prompts that no repair has used."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csulora_cli import html
from csulora_cli.adapter import read_adapter
from csulora_cli.engine.attach import Update
from csulora_cli.engine.host import Host, choose_device
from csulora_cli.engine.judge import JudgePlan, load_judge, plan_judge
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.reach import reach_of
from csulora_cli.engine.scoring import (
    KINDS,
    MAX_TASK_TOKENS,
    EncodedScoring,
    ModelRun,
    References,
    ScoringPrompts,
    encode_scoring,
    run_model,
    score_run,
)
from csulora_cli.errors import InputError, PromptsError, UsageError
from csulora_cli.eval_report import Change, EvalReport, EvaluatedModel, JudgeScore, Role
from csulora_cli.files import check_new_file, read_json_object, staged_file, write_whole
from csulora_cli.locate import ADAPTER_FILES, Location, locate
from csulora_cli.model_kind import check_model_kind
from csulora_cli.opening import (
    Recorder,
    check_report,
    check_unchanged,
    locate_host,
    model_files,
    model_record,
    open_host,
    run_on_device,
    stamps_of,
)
from csulora_cli.promptset import PromptSet, load_prompts
from csulora_cli.refusals import Answer, RefusalTest, classify, is_coherent
from csulora_cli.report import InputRecord
from csulora_cli.scores import ModelScore
from csulora_cli.settings import EvalSettings
from csulora_cli.stats import Agreement, Count, PairedTest
from csulora_cli.taskset import TaskSet, load_task
from csulora_cli.text import printable
from csulora_cli.version import __version__
from csulora_cli.writer import REPORT_NAME

_ANSWERS_MARK = '{"model": '  # how a file of answers begins


def evaluate_adapters(settings: EvalSettings, progress: Progress | None = None) -> EvalReport:
    """Score the host, an adapter and its repairs on prompts that gave no directions and chose no λ.

    Args:
        settings: what to do.
        progress: receives stages, steps and warnings; nothing is printed here.

    Returns:
        What was measured. The file of answers and the page, where asked for, are complete when this returns.

    Raises:
        CsuloraError: see `errors`; nothing is left behind.
    """
    return run_on_device(lambda settings, recorder: _Evaluation(settings, recorder).run(), settings, progress)


@dataclass(frozen=True)
class _Scored:
    """One model: what was measured, its answers by kind of prompt ("task" where there is one), and which are right."""

    key: str
    role: Role
    name: str
    score: ModelScore
    answers: Mapping[str, tuple[str, ...]]
    task_right: tuple[bool, ...]


class _Evaluation:
    """One run of `evaluate_adapters`, stage by stage."""

    def __init__(self, settings: EvalSettings, progress: Recorder) -> None:
        self.settings = settings
        self.progress = progress

    def run(self) -> EvalReport:
        settings = self.settings
        _check_answers_file(settings)
        check_report(settings.report, settings.overwrite)
        self.progress.stage("adapter")
        self.adapters_at = [locate(given, ADAPTER_FILES) for given in settings.adapters]
        self.stamps = stamps_of(ADAPTER_FILES, *self.adapters_at)
        self.adapters = [read_adapter(location.folder) for location in self.adapters_at]
        self.device = choose_device(settings.device)
        self.prompt_set = load_prompts(settings.prompts)
        self.task = load_task(settings.task) if settings.task else None
        self.prompts = self._scoring_prompts()
        self.progress.stage("models")
        files = model_files(settings.trust_remote_code)
        self.host_at = locate_host(self.adapters[0], settings.base, files, self.progress)
        check_model_kind(self.host_at, "host")
        self.judge = self._plan_judge(files)
        self.stamps += stamps_of(files, self.host_at, self.judge.location if self.judge else None)
        scored, used = self._score_models()  # the host's memory is free again when the judge is loaded
        opinions = self._judge(scored)
        models = [_evaluated(each, scored[1], opinions.get(each.key)) for each in scored]
        self.progress.stage("report")
        report = EvalReport(
            version=__version__,
            inputs=self._inputs(),
            settings=used,
            prompt_counts=self._counts(),
            models=models,
            answers_file=str(settings.save_answers) if settings.save_answers else None,
            warnings=tuple(self.progress.warnings),
        )
        page = html.eval_page(report) if settings.report is not None else ""
        check_unchanged(self.stamps)
        if settings.save_answers is not None:
            self._save(settings.save_answers, scored, opinions)
        if settings.report is not None:
            write_whole(settings.report, page)
        return report

    # Prompts

    def _scoring_prompts(self) -> ScoringPrompts:
        """The report split, the task, and neither what gave directions nor what chose λ in any of the adapters."""
        prompts = ScoringPrompts.of(self.prompt_set.report, self.task.examples if self.task else ())
        kept = prompts.without(self._used())
        if dropped := prompts.count_beyond(kept):
            self.progress.warn(
                f"{dropped} prompts are not scored: they gave directions or chose λ in a repair, or chose a winner"
            )
        if not kept.lacks_nothing_of(prompts):
            raise PromptsError("no prompts are left that no repair has used", "Give others as --prompts or --task.")
        return kept.first(self.settings.limit)

    def _used(self) -> set[str]:
        """The prompts that are known to be used by a repair; warns of repairs that were made with unknown ones.

        Used are direction and tuning prompts; for the winners of a comparison, which were chosen by their scores, also
        what they were scored on.
        """
        sets = {self.prompt_set.sha256: self.prompt_set}
        if self.settings.prompts is not None:
            built_in = load_prompts()
            sets.setdefault(built_in.sha256, built_in)
        used = _prompts_of(self.prompt_set, is_winner=False)
        for location in self.adapters_at:
            made = provenance_of(location.folder)
            if known := sets.get(made.prompts_sha256 or ""):
                used |= _prompts_of(known, made.is_winner)
            elif made.prompts is not None:
                self.progress.warn(
                    f"{printable(location.label)} was repaired with other prompts ({printable(made.prompts, 60)}); "
                    "those that gave its directions or chose its λ may be among the scored ones"
                )
            if self.task is None or not made.is_winner or made.task_sha256 is None:
                continue
            if made.task_sha256 == self.task.sha256:
                used |= {example.prompt for example in self.task.examples}
            else:
                self.progress.warn(
                    f"{printable(location.label)} was chosen by a comparison on another task file; its examples may be "
                    "among the scored ones"
                )
        return used

    def _counts(self) -> dict[str, int]:
        prompts = self.prompts
        return {
            "harmful": len(prompts.harmful),
            "lookalikes": len(prompts.lookalikes),
            "general": len(prompts.general) if prompts.has_general else 0,
            "task": len(prompts.task),
        }

    # Models

    def _score_models(self) -> tuple[list[_Scored], dict[str, Any]]:
        settings = self.settings
        host, self.adapters = open_host(
            self.host_at,
            self.adapters,
            self.device,
            settings.dtype,
            settings.trust_remote_code,
            self.progress,
        )
        self._tell_unreached(host)
        encoded = encode_scoring(host, self.prompts, settings.answer_tokens)
        if encoded.task and encoded.task.longest > MAX_TASK_TOKENS:
            self.progress.warn(
                f"the longest response has {encoded.task.longest} tokens; only {MAX_TASK_TOKENS} are generated, so "
                "that it cannot be matched"
            )
        self.progress.stage("measure", (1 + len(self.adapters)) * encoded.steps)

        def run(update: Update) -> ModelRun:
            return run_model(host, encoded, update, self.progress.advance)

        first, *others = (Update.of(adapter) for adapter in self.adapters)
        references = References(run(Update()), run(first))
        scored = [
            _scored("host", Role.HOST, self.host_at, references.host, references),
            _scored("adapter", Role.ADAPTER, self.adapters_at[0], references.adapter, references),
        ]
        for key, location, update in zip(self._keys, self.adapters_at[1:], others, strict=True):
            scored.append(_scored(key, Role.REPAIRED, location, run(update), references))
        return scored, self._settings_used(host, encoded)

    def _tell_unreached(self, host: Host) -> None:
        """Warn of adapters of which some modules do not run on text: no prompt tells what these do."""
        for location, adapter in zip(self.adapters_at, self.adapters, strict=True):
            reach = reach_of(host, adapter.sites, self.prompts.harmful)
            if reach.unreached:
                self.progress.warn(
                    f"{printable(location.label)}: {reach}, so that nothing here measures what they do: {reach.names}"
                )

    @property
    def _keys(self) -> list[str]:
        """What the repaired adapters are called in tables and records."""
        count = len(self.adapters_at) - 1
        return ["repaired"] if count == 1 else [f"repaired {index}" for index in range(1, count + 1)]

    def _settings_used(self, host: Host, encoded: EncodedScoring) -> dict[str, Any]:
        return {
            "decoding": "greedy",
            "seed": None,
            "answer_tokens": encoded.answer_tokens,
            "task_tokens": encoded.task.new_tokens if encoded.task else None,
            "limit": self.settings.limit,
            "judge": self.judge.description if self.judge else None,
            **host.settings,
        }

    # The judge

    def _plan_judge(self, files: Sequence[str]) -> JudgePlan | None:
        if self.settings.judge is None:
            return None
        location = locate(self.settings.judge, files)
        return plan_judge(location, self.settings.judge_label, self.settings.trust_remote_code)

    def _judge(self, scored: Sequence[_Scored]) -> dict[str, list[bool | None]]:
        """The judge's verdicts on the answers to harmful prompts, by model; None on incoherent and unread ones."""
        if self.judge is None:
            return {}
        settings = self.settings
        self.progress.stage("judge")
        judge = load_judge(self.judge, self.device, settings.dtype, settings.trust_remote_code)
        coherent = {each.key: [is_coherent(answer) for answer in each.answers["harmful"]] for each in scored}
        self.progress.stage("judging", sum(map(sum, coherent.values())))
        opinions = {}
        for each in scored:
            pairs = zip(self.prompts.harmful, each.answers["harmful"], strict=True)
            asked = [pair for pair, is_asked in zip(pairs, coherent[each.key], strict=True) if is_asked]
            verdicts = iter(judge.judge(asked, self.progress.advance))
            opinions[each.key] = [next(verdicts) if is_asked else None for is_asked in coherent[each.key]]
        return opinions

    # What comes out

    def _inputs(self) -> dict[str, InputRecord]:
        trust = self.settings.trust_remote_code
        inputs = {"host": model_record(self.host_at, "host", is_run=True, trust_remote_code=trust)}
        for key, location, adapter in zip(("adapter", *self._keys), self.adapters_at, self.adapters, strict=True):
            inputs[key] = InputRecord(location.label, location.commit, adapter.sha256)
        inputs["prompts"] = _file_record(self.prompt_set)
        if self.task is not None:
            inputs["task"] = _file_record(self.task)
        if self.judge is not None:
            inputs["judge"] = model_record(self.judge.location, "judge", is_run=True, trust_remote_code=trust)
        return inputs

    def _save(self, path: Path, scored: Sequence[_Scored], opinions: Mapping[str, Sequence[bool | None]]) -> None:
        with staged_file(path) as staging, staging.open("w", encoding="utf-8") as file:
            for each in scored:
                for line in self._lines(each, opinions.get(each.key)):
                    file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def _lines(self, scored: _Scored, opinions: Sequence[bool | None] | None) -> Iterator[dict[str, Any]]:
        """One model's answers, each with its prompt and what was made of it."""
        model = {"model": scored.key, "name": scored.name}
        kinds = KINDS if self.prompts.has_general else KINDS[:2]
        for kind in kinds:
            for index, (prompt, answer) in enumerate(
                zip(getattr(self.prompts, kind), scored.answers[kind], strict=True)
            ):
                line = {**model, "kind": kind, "prompt": prompt, "answer": answer}
                line["verdicts"] = {str(test): str(classify(answer, test)) for test in RefusalTest}
                if kind == "harmful" and opinions is not None:
                    line["is_harmful_to_judge"] = opinions[index]
                yield line
        answered = zip(self.prompts.task, scored.answers["task"], scored.task_right, strict=True)
        for example, answer, is_right in answered:
            yield {
                **model, "kind": "task", "prompt": example.prompt, "response": example.response, "answer": answer,
                "is_right": is_right,
            }  # fmt: skip


def _prompts_of(prompt_set: PromptSet, is_winner: bool) -> set[str]:
    """What a repair with these prompts has used."""
    splits = [prompt_set.directions, prompt_set.tuning, *([prompt_set.report] if is_winner else [])]
    return {prompt for split in splits for prompt in split.everything}


def _check_answers_file(settings: EvalSettings) -> None:
    """Check early that the answers can be written and nothing of value would be lost."""
    path = settings.save_answers
    if path is None:
        return
    others = (("--prompts", settings.prompts), ("--task", settings.task), ("--report", settings.report))
    for option, given in others:
        if given is not None and given.resolve() == path.resolve():
            raise UsageError(f"--save-answers and {option} are the same file", "Give another name as --save-answers.")
    check_new_file(path, "--save-answers", settings.overwrite, _ANSWERS_MARK)


def _file_record(source: PromptSet | TaskSet) -> InputRecord:
    return InputRecord(source.name, None, {source.name: source.sha256})


@dataclass(frozen=True)
class Provenance:
    """What an adapter was made with, as far as its `csulora.json` tells.

    Attributes:
        prompts, prompts_sha256: name and hash of the prompts file; None for an adapter that is no repair, or was
            repaired without prompts.
        task_sha256: of the task file that it was scored on, if any.
        is_winner: it is what `csulora compare` kept, by its scores on the report split and the task.
    """

    prompts: str | None = None
    prompts_sha256: str | None = None
    task_sha256: str | None = None
    is_winner: bool = False


def provenance_of(folder: Path) -> Provenance:
    """Where an adapter comes from; a record that cannot be read counts as one with "unknown" prompts."""
    path = folder / REPORT_NAME
    if not path.exists():
        return Provenance()
    try:
        document = read_json_object(path, InputError)
        inputs = document.get("inputs", {})
        digests = {}
        for name in ("prompts", "task"):
            if inputs.get(name) is not None:
                (digest,) = inputs[name]["sha256"].values()
                digests[name] = str(digest)
        named = str(inputs["prompts"]["name"]) if "prompts" in digests else None
        return Provenance(named, digests.get("prompts"), digests.get("task"), "method" in document)
    except (InputError, AttributeError, KeyError, TypeError, ValueError):
        return Provenance("unknown")


def _scored(key: str, role: Role, location: Location, run: ModelRun, references: References) -> _Scored:
    answers = {kind: getattr(run, kind).answers for kind in KINDS}
    answers["task"] = run.task.answers if run.task else ()
    task_right = tuple(run.task.is_right) if run.task else ()
    return _Scored(key, role, location.label, score_run(run, references), answers, task_right)


def _evaluated(scored: _Scored, adapter: _Scored, opinions: Sequence[bool | None] | None) -> EvaluatedModel:
    return EvaluatedModel(
        key=scored.key,
        role=scored.role,
        name=scored.name,
        score=scored.score,
        change=_change(adapter, scored) if scored.role is Role.REPAIRED else None,
        judge=None if opinions is None else judge_score(scored.answers["harmful"], opinions),
    )


def _change(adapter: _Scored, repaired: _Scored) -> Change:
    both = adapter, repaired

    def paired(kind: str, event: Answer) -> dict[RefusalTest, PairedTest]:
        return {
            test: PairedTest.of(*([classify(text, test) is event for text in of.answers[kind]] for of in both))
            for test in RefusalTest
        }

    task = PairedTest.of(*(of.task_right for of in both)) if adapter.task_right else None
    return Change(paired("harmful", Answer.ANSWER), paired("lookalikes", Answer.REFUSAL), task)


def judge_score(answers: Sequence[str], opinions: Sequence[bool | None]) -> JudgeScore:
    """A judge's verdicts on answers to harmful prompts (None: not asked or not read) beside our own strict test."""
    read = [(text, verdict) for text, verdict in zip(answers, opinions, strict=True) if verdict is not None]
    ours = [classify(text) is Answer.ANSWER for text, _ in read]
    theirs = [verdict for _, verdict in read]
    unread = sum(map(is_coherent, answers)) - len(read)
    return JudgeScore(Count.of(sum(theirs), len(answers)), unread, Agreement.of(ours, theirs))
