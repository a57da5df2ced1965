"""`csulora eval`: check the options, call `evaluate_adapters`, show the report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from csulora_cli import eval_wording
from csulora_cli.cli import console, options
from csulora_cli.eval_report import EvalReport
from csulora_cli.settings import EvalSettings

_MEASURED = "What is measured"


def evaluate(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER",
            help="The adapter as trained, then any number of repairs of it: folders or Hub ids (org/name, "
            "org/name@revision).",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The host: the model that the adapter was trained on. Default: what the first adapter names.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Own prompts, JSONL as for csulora fix; only their report split is scored. Default: a built-in set.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='The adapter\'s own task, JSONL: {"prompt": "…", "response": "…"}. Exact match and NLL, and how much '
            "of both a repair keeps.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A second opinion on answers to harmful prompts: a text classifier, or a guard like Llama Guard.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    judge_label: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="The classifier's label for harmful. Default: found by its name.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Generate so many tokens of each answer. Default: 24, as csulora fix does.",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Only the first N prompts of each kind, to try things.", rich_help_panel=_MEASURED
        ),
    ] = None,
    save_answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every answer with its verdicts, JSONL.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite", help="Replace earlier answers and an earlier report.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    is_json: options.IsJson = False,
    is_quiet: options.IsQuiet = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with any of these settings under [eval]; the command line wins.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
) -> int:
    """Measure an adapter and its repairs beside the host: refusals, over-refusals, and what was kept.

    Scores only prompts that gave no directions and chose no strength. Nothing is changed.

    Exit codes: 0 done, 2 wrong usage, 3 done but the host itself does not refuse, 4 an input cannot be used, 5 out of
    memory or disk.
    """
    given: dict[str, Any] = {
        "base": base,
        "prompts": prompts,
        "task": task,
        "judge": judge,
        "judge_label": judge_label,
        "answer_tokens": answer_tokens,
        "limit": limit,
        "save_answers": save_answers,
        "report": report,
        "overwrite": overwrite,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    settings = EvalSettings(tuple(adapters), **options.merged(config, "eval", given))
    from csulora_cli.evaluation import evaluate_adapters

    with console.progress(is_quiet) as progress:
        result = evaluate_adapters(settings, progress)
    if is_json:
        console.json_out(result.to_dict())
    elif not is_quiet:
        show(result)
        console.wrote(settings.save_answers, settings.report)
    return result.exit_code


def show(report: EvalReport) -> None:
    """The report as tables for people, readable in 80 columns and on a pipe."""
    for label, value in eval_wording.head(report):
        console.out(f"{label:<12}{value}")
    for table in eval_wording.score_tables(report):
        console.out()
        console.out(table.as_text())
    console.out()
    for line in eval_wording.legend(report):
        console.out(console.wrapped(line, "  "))
    if (changes := eval_wording.change_table(report)) is not None:
        console.out()
        console.out(changes.as_text())
        for line in eval_wording.CHANGE_LEGEND:
            console.out(console.wrapped(line, "  "))
    console.out()
    for line in eval_wording.verdict(report):
        console.out(console.wrapped(line))
