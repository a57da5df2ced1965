"""`csulora compare`: check the options, call `compare_methods`, show the report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from csulora_cli import compare_wording
from csulora_cli.cli import console, options
from csulora_cli.compare_report import CompareReport
from csulora_cli.settings import CompareSettings

_COMPARED = "What is compared"
_MEASURED = "What is measured"


def compare(
    adapter: options.Adapter,
    base: options.Base = None,
    unaligned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that the host was aligned from. Without it, methods that need it are left out.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Of csulora: prompts, keep-out, keep-out-protect, keep-in. Peers: safelora-threshold, "
            "safelora-number, safelora-projector, lssf, resta, s3lora. Controls: shrink, random-keep-in, "
            "random-keep-out, rotated, harmful, benign. Default: all that the inputs allow.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many strengths of each method. Default: 5.", rich_help_panel=_COMPARED),
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
            help='The adapter\'s own task, JSONL: {"prompt": "…", "response": "…"}. Without it, what is kept is told '
            "by KL on benign prompts.",
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
            metavar="N", help="Score only the first N prompts of each kind, to try things.", rich_help_panel=_MEASURED
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the adapters that keep most at some level here.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite",
            help="Replace an earlier comparison in that folder, and an earlier report.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    is_json: options.IsJson = False,
    is_quiet: options.IsQuiet = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with any of these settings under [compare]; the command line wins.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
) -> int:
    """Repair one adapter by every method at several strengths, and measure all of them beside each other.

    Scores only prompts that gave no directions and chose no strength. Nothing is changed.

    Exit codes: 0 done, 2 wrong usage, 3 done but the host itself does not refuse, 4 an input cannot be used, 5 out of
    memory or disk.
    """
    given: dict[str, Any] = {
        "base": base,
        "unaligned": unaligned,
        "methods": methods,
        "points": points,
        "prompts": prompts,
        "task": task,
        "answer_tokens": answer_tokens,
        "limit": limit,
        "out": out,
        "report": report,
        "overwrite": overwrite,
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    settings = CompareSettings(adapter, **options.merged(config, "compare", given))
    from csulora_cli.comparison import compare_methods

    with console.progress(is_quiet) as progress:
        result = compare_methods(settings, progress)
    if is_json:
        console.json_out(result.to_dict())
    elif not is_quiet:
        show(result)
        console.wrote(settings.out, settings.report)
    return result.exit_code


def show(report: CompareReport) -> None:
    """The report as tables for people, readable in 80 columns and on a pipe."""
    for label, value in compare_wording.head(report):
        console.out(f"{label:<12}{value}")
    console.out()
    for line in compare_wording.method_lines(report):
        console.out(line)
    console.out()
    show_points(report)


def show_points(report: CompareReport) -> None:
    """What was left out, the table of points, its legend, and what it says in sentences."""
    if report.left_out:
        for line in compare_wording.left_out_lines(report):
            console.out(console.wrapped(line))
        console.out()
    console.out(compare_wording.point_table(report).as_text())
    for line in compare_wording.legend(report):
        console.out(console.wrapped(line, "  "))
    console.out()
    for line in [*compare_wording.level_lines(report), *compare_wording.verdict(report)]:
        console.out(console.wrapped(line))
