"""Report pages: one self-contained HTML text that opens from disk, without a script and without a request.

Pure: reports in, text out; nothing is read but csulora's own templates, nothing is written. Every value passes
`text.printable` and is escaped by the template engine, wherever it stands: names of tensors, prompts and paths are
hostile. The same report gives the same bytes.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from csulora_cli import compare_wording, eval_wording, pictures, wording
from csulora_cli.compare_report import CompareReport
from csulora_cli.eval_report import EvalReport
from csulora_cli.report import FixReport, InputRecord
from csulora_cli.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

# In the head of every page, and of no other: this is how a report is told from a file of somebody else's.
MARK = '<meta name="generator" content="csulora report">'
_LONGEST = 2000  # characters of a value; longer ones lose their middle


def fix_page(report: FixReport) -> str:
    """The page of one repair: verdict, before and after, the search of λ, what changed in the modules, all hashes."""
    return _render(
        "fix",
        report,
        subtitle=f"{report.adapter_summary}; host {report.inputs['host'].name}; written to {report.out}",
        status="Finished, but a gate failed" if report.failed_gates else "Done and verified",
        tone="bad" if report.failed_gates else "good",
        verdict=[*wording.verdict(report), wording.VERIFIED],
        behaviour=wording.behaviour_table(report) if report.behaviour else None,
        behaviour_note=wording.behaviour_note(report) if report.behaviour else "",
        behaviour_pictures=pictures.behaviour_pictures(report.behaviour),
        strength=wording.strength_lines(report),
        path=wording.path_table(report) if report.strength.path else None,
        path_note=wording.PATH_LEGEND,
        path_pictures=pictures.path_pictures(report.strength),
        module_pictures=pictures.module_pictures(report.modules),
        groups=wording.module_table(report),
        legend=wording.legend(report),
        modules=wording.each_module_table(report),
        hashes=_hash_table(report.inputs, report.files),
    )


def eval_page(report: EvalReport) -> str:
    """The page of one evaluation: all models side by side, and every repair against the adapter prompt by prompt."""
    return _render(
        "eval",
        report,
        subtitle=f"{len(report.models)} models; host {report.inputs['host'].name}",
        status="Measured; read with care" if report.failed_gates else "Measured",
        tone="bad" if report.failed_gates else "plain",
        verdict=eval_wording.verdict(report),
        shares=pictures.score_pictures(report.models),
        scores=next(eval_wording.score_tables(report, width=len(report.models))),
        legend=eval_wording.legend(report),
        changes=eval_wording.change_table(report),
        changes_legend=eval_wording.CHANGE_LEGEND,
        head=wording.Table((), tuple(eval_wording.head(report))),
        hashes=_hash_table(report.inputs),
    )


def compare_page(report: CompareReport) -> str:
    """The page of one comparison: who keeps most at which level of safety, as sentences, picture and table."""
    traces = pictures.traces_of(report)
    return _render(
        "compare",
        report,
        subtitle=f"{len(report.methods)} methods, {len(report.points)} points; host {report.inputs['host'].name}",
        status="Compared; read with care" if report.failed_gates else "Compared",
        tone="bad" if report.failed_gates else "plain",
        verdict=[*compare_wording.level_lines(report), *compare_wording.verdict(report)],
        plane=pictures.plane(report, traces),
        plane_legend=pictures.plane_legend(traces),
        plane_notes=pictures.PLANE_NOTES,
        points=compare_wording.point_table(report),
        legend=compare_wording.legend(report),
        methods=wording.Table(
            ("method", "family", "strength", "what it does"),
            tuple((method.name, method.family, method.symbol, method.summary) for method in report.methods),
        ),
        left_out=compare_wording.left_out_lines(report),
        head=wording.Table((), tuple(compare_wording.head(report))),
        hashes=_hash_table(report.inputs),
    )


def _render(command: str, report: FixReport | EvalReport | CompareReport, **values: Any) -> str:
    """The template of a command with what is on every page and what is on its own."""
    from markupsafe import Markup

    return (
        _environment()
        .get_template(f"{command}.html")
        .render(
            command=command,
            mark=Markup(MARK),
            report=report,
            adapter=report.inputs["adapter"].name,
            settings=wording.settings_table(report.inputs, report.settings, report.version),
            **values,
        )
    )


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def fit(value: object) -> object:
        """What the engine escapes next; markup is our own, made by a macro or a picture."""
        return value if isinstance(value, Markup) else printable(value, _LONGEST)

    return Environment(
        loader=PackageLoader("csulora_cli", "templates"),
        autoescape=True,
        finalize=fit,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hash_table(inputs: Mapping[str, InputRecord], written: Mapping[str, str] | None = None) -> wording.Table:
    """Every file that was read or written, by role, with its SHA-256; a commit stands before its files."""
    rows: list[tuple[str, str, str]] = []
    for role, record in inputs.items():
        if record.commit:
            rows.append((role, "commit", record.commit))
        rows += [(role, name, digest) for name, digest in record.sha256.items()]
    rows += [("written", name, digest) for name, digest in (written or {}).items()]
    return wording.Table(("", "file", "SHA-256"), tuple(rows))
