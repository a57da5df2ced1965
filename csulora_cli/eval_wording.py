"""An evaluation in words and tables, for people. Plain text, no colour, no torch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from csulora_cli.eval_report import SUMMARY_FORMULA, EvalReport, EvaluatedModel, Role
from csulora_cli.refusals import RefusalTest
from csulora_cli.report import InputRecord
from csulora_cli.scores import LEAST_EXACT_GAIN, LEAST_KL, LEAST_NLL_GAIN, RetentionKind, TaskScore
from csulora_cli.stats import Count, PairedTest
from csulora_cli.text import number, printable
from csulora_cli.wording import Table, share

NOT_DEFINED = "n/a"
CHANGE_LEGEND = (
    "fewer, more: prompts on which it happens under one of the two models only",
    "p: exact McNemar test, two-sided",
)
_Cell = Callable[[EvaluatedModel], str]


def head(report: EvalReport) -> list[tuple[str, str]]:
    """What was measured, on what and how, as labels and lines."""
    rows = [(key, printable(report.inputs[key].name, 64)) for key in _model_keys(report)]
    rows += scored_prompts(report.inputs, report.prompt_counts)
    if "judge" in report.inputs:
        judge = printable(report.inputs["judge"].name, 64)
        rows += [("judge", judge), ("", printable(report.settings["judge"], 64))]
    return [*rows, decoding(report.settings)]


def scored_prompts(inputs: Mapping[str, InputRecord], counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """How many prompts of which files are scored, as labels and lines."""
    benign = f"{counts['lookalikes']} look-alike and {counts['general']} general benign ones"
    if not counts["general"]:
        benign = f"{counts['lookalikes']} benign ones of no kind"
    rows = [
        ("prompts", f"{printable(inputs['prompts'].name, 40)}, its report split"),
        ("", f"{counts['harmful']} harmful, {benign}"),
    ]
    if "task" in inputs:
        examples = "1 example" if counts["task"] == 1 else f"{counts['task']} examples"
        rows.append(("task", f"{printable(inputs['task'].name, 40)}, {examples}"))
    return rows


def decoding(used: Mapping[str, Any]) -> tuple[str, str]:
    """How answers are made, as a label and a line."""
    tokens = f"{used['answer_tokens']} new tokens"
    if used["task_tokens"]:
        tokens += f", {used['task_tokens']} for the task"
    return "decoding", f"greedy, so without a seed; {tokens}"


def _model_keys(report: EvalReport) -> list[str]:
    return [model.key for model in report.models]


def score_tables(report: EvalReport, width: int = 3) -> Iterator[Table]:
    """All metrics, `width` models side by side in one table; 80 columns hold 3."""
    rows = _rows(report)
    for start in range(0, len(report.models), width):
        models = report.models[start : start + width]
        yield Table(
            ("", *(model.key for model in models)),
            tuple((label, *(cell(model) for model in models)) for label, cell in rows),
        )


def _rows(report: EvalReport) -> list[tuple[str, _Cell]]:
    rows: list[tuple[str, _Cell]] = [
        ("attack success", lambda m: share(m.score.attack_success)),
        ("  by Qi's list", lambda m: share(m.score.harmful.answers[RefusalTest.QI].answered)),
        ("  by JailbreakBench's", lambda m: share(m.score.harmful.answers[RefusalTest.JAILBREAKBENCH].answered)),
    ]
    if "judge" in report.inputs:
        rows += [
            ("  by the judge", lambda m: share(m.judge.harmful) if m.judge else NOT_DEFINED),
            ("  judge agrees", lambda m: share(m.judge.agreement.same) if m.judge else NOT_DEFINED),
            ("  Cohen's kappa", lambda m: optional(m.judge.agreement.kappa if m.judge else None)),
        ]
        if any(model.judge and model.judge.unread for model in report.models):
            rows.append(("  judge unreadable", lambda m: str(m.judge.unread) if m.judge else NOT_DEFINED))
    rows += [
        ("harmful, incoherent", lambda m: share(m.score.harmful.strict.incoherent)),
        ("KL to host, harmful", lambda m: number(m.score.harmful.kl_to_host)),
    ]
    rows.append((f"{_lookalikes(report)} refused", lambda m: share(m.score.over_refusal)))
    if report.prompt_counts["general"]:
        rows.append(("general refused", lambda m: share(m.score.general.strict.refused)))
    rows += [
        (f"KL to host, {general_kind(report.prompt_counts)}", lambda m: number(m.score.general.kl_to_host)),
        (f"KL to adapter, {general_kind(report.prompt_counts)}", lambda m: number(m.score.general.kl_to_adapter)),
    ]
    if report.prompt_counts["task"]:
        rows += [
            ("task, exact match", _of_task(lambda task: share(task.exact_match))),
            ("task, NLL a token", _of_task(lambda task: number(task.nll))),
            ("kept, exact match", _of_task(lambda task: optional(task.exact_retention))),
            ("kept, NLL", _of_task(lambda task: optional(task.nll_retention))),
        ]
    else:
        rows.append(("kept, by KL", lambda m: optional(m.score.retention.value)))
    rows.append(("summary score", lambda m: optional(m.score.summary)))
    return rows


def _of_task(cell: Callable[[TaskScore], str]) -> _Cell:
    return lambda model: cell(model.score.task) if model.score.task else NOT_DEFINED


def optional(value: float | None) -> str:
    """Two decimals, or what stands for a value that is not defined."""
    return NOT_DEFINED if value is None else f"{value:.2f}"


def legend(report: EvalReport) -> list[str]:
    """What the rows are, one entry each, of any length."""
    lines = [
        "attack success: a coherent answer that does not begin with a refusal; by a list: that has none of its strings "
        "anywhere; 95% Wilson intervals",
        "KL: of the first answer token, nats",
    ]
    if report.prompt_counts["task"]:
        lines.append(
            "kept: (model − host)/(adapter − host), of exact match and of −NLL; n/a where the adapter gained less than "
            f"{LEAST_EXACT_GAIN:g}, or {LEAST_NLL_GAIN:g} nats"
        )
    else:
        lines.append(
            f"kept: 1 − KL(adapter ‖ model)/KL(adapter ‖ host), {general_kind(report.prompt_counts)} prompts; n/a "
            f"where adapter and host are less than {LEAST_KL:g} nats apart"
        )
    if "judge" in report.inputs:
        lines.append(
            "judge agrees: of the coherent answers that have its verdict, those that are harmful to it and no refusal "
            "to us, or neither"
        )
    lines.append(f"summary: {SUMMARY_FORMULA}; retention is “{_retention_words(report)}”")
    return lines


def _retention_words(report: EvalReport) -> str:
    return {
        RetentionKind.EXACT_MATCH: "kept, exact match",
        RetentionKind.NLL: "kept, NLL",
        RetentionKind.GENERAL_KL: "kept, by KL",
    }[report.models[0].score.retention.kind]


def change_table(report: EvalReport) -> Table | None:
    """Every repaired adapter against the adapter, prompt by prompt; None if there is none."""
    rows = []
    for model in report.models:
        if model.change is not None:
            attack = model.change.attack_success[RefusalTest.STRICT]
            refusal = model.change.over_refusal[RefusalTest.STRICT]
            rows.append((f"{model.key}: attack success", *_change_cells(attack)))
            rows.append((f"{model.key}: {_lookalikes(report)} refused", *_change_cells(refusal)))
            if model.change.task is not None:
                rows.append((f"{model.key}: task, exact match", *_change_cells(model.change.task)))
    return Table(("against the adapter", "fewer", "more", "p"), tuple(rows)) if rows else None


def _lookalikes(report: EvalReport) -> str:
    return "look-alikes" if report.prompt_counts["general"] else "benign"


def general_kind(prompt_counts: Mapping[str, int]) -> str:
    """What the prompts are called on which KL tells what is kept: all benign ones, where general ones are not told."""
    return "general" if prompt_counts["general"] else "benign"


def _change_cells(test: PairedTest) -> tuple[str, str, str]:
    return str(test.only_first), str(test.only_second), number(test.p_value)


def verdict(report: EvalReport) -> list[str]:
    """What came out, in sentences; only what was measured."""
    lines = [f"Read with care: {gate}." for gate in report.failed_gates]
    found = [f"{_of(model.score.attack_success)} with {_with(model)}" for model in report.models]
    lines.append(f"Attack success on harmful prompts: {', '.join(found)}.")
    return lines


def _of(count: Count) -> str:
    return f"{count.count} of {count.total}"


def _with(model: EvaluatedModel) -> str:
    return {Role.HOST: "the host alone", Role.ADAPTER: "the adapter"}.get(model.role, model.key)
