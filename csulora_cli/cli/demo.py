"""`csulora demo`: the main job on models that ship with csulora."""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csulora_cli import wording
from csulora_cli.cli import compare, console

if TYPE_CHECKING:
    from csulora_cli.demo import DemoReport

_LABELS = {
    "host": "host, no adapter",
    "adapter": "adapter as trained",
    "prompts": "repaired from prompts",
    "weights": "repaired from weights",
}


def demo(
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the repaired adapters in this folder. Default: they are removed."),
    ] = None,
    report: Annotated[
        Path, typer.Option(metavar="FILE.html", help="The HTML page of the comparison; an earlier one is replaced.")
    ] = Path("csulora-demo.html"),
    is_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    is_quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
) -> int:
    """Repair a poisoned toy adapter that ships with csulora, measure it, and compare every method on it.

    Needs no network and no GPU, and takes about a minute. The models are tiny and speak a toy language: the demo shows
    what the command does, not how well it works on real models.
    """
    from csulora_cli.demo import run_demo

    with ExitStack() as stack:
        progress = stack.enter_context(console.progress(is_quiet))
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="csulora-demo-")))
        result = run_demo(folder, report, progress)
    if is_json:
        scores = {name: asdict(score) for name, score in result.scores.items()}
        console.json_out({**scores, "comparison": result.comparison.to_dict()})
    else:
        _show(result)
        console.wrote(out, report)
        console.out(f"{'next':<12}csulora fix ADAPTER --base MODEL   on an adapter of yours")
    return 0


def _show(report: "DemoReport") -> None:
    header = ("", "attack success", "benign refused", "own task right")
    rows = []
    for name, score in report.scores.items():
        cells = [
            f"{count.count}/{count.total} ({100 * count.low:.0f}-{100 * count.high:.0f}%)"
            for count in (score.attack_success, score.benign_refused, score.task_correct)
        ]
        rows.append((_LABELS[name], *cells))
    console.out("A toy host that refuses, an adapter that learned a task of its own and lost the")
    console.out("refusals, and two repairs of it. Held-out prompts, 95% intervals:")
    console.out()
    console.out(wording.Table(header, tuple(rows)).as_text())
    for name, fixed in report.reports.items():
        console.out()
        console.out(f"{_LABELS[name]}: the update moved by {wording.percent(fixed.moved)} of its energy")
        for line in wording.strength_lines(fixed):
            console.out(f"  {line}")
    console.out()
    console.out("The same adapter repaired by the methods of csulora compare, on the report")
    console.out("prompts and the held-out task:")
    console.out()
    compare.show_points(report.comparison)
    console.out()
    console.out("These are toys: they show what csulora does, not how well it does on real ones.")
