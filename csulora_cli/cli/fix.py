"""`csulora fix`: check the options, call `fix_adapter`, show the report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from csulora_cli import wording
from csulora_cli.cli import console, options
from csulora_cli.report import FixReport
from csulora_cli.settings import DoraMode, FixSettings, Geometry, RankMode, Source
from csulora_cli.text import printable

_DIRECTIONS = "Where the directions come from"
_STRENGTH = "How strong"
VLLM_MAX_RANK = 16  # what vLLM accepts without --max-lora-rank


def fix(
    adapter: options.Adapter,
    base: options.Base = None,
    unaligned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that the host was aligned from: take the directions from weights, not from prompts.",
            rich_help_panel=_DIRECTIONS,
        ),
    ] = None,
    source: Annotated[
        Source | None,
        typer.Option(help="Default: weights with --unaligned, else prompts.", rich_help_panel=_DIRECTIONS),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Own prompts, JSONL: {"prompt": "…", "label": "harmful" or "benign"}. Default: a built-in set.',
            rich_help_panel=_DIRECTIONS,
        ),
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(
            help="Weights source: keep the update in the directions of alignment, or out of them. Default: keep-out.",
            rich_help_panel=_DIRECTIONS,
        ),
    ] = None,
    subspace_energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Weights source: how much of the displacement the directions must hold. Default: 0.9.",
            rich_help_panel=_DIRECTIONS,
        ),
    ] = None,
    subspace_rank: Annotated[
        int | None,
        typer.Option(metavar="K", help="Weights source: take K directions instead.", rich_help_panel=_DIRECTIONS),
    ] = None,
    strength: Annotated[
        str | None,
        typer.Option(
            metavar="auto|FLOAT",
            help="λ. auto: the smallest at which answers to harmful prompts begin as the host's. 0: change nothing. "
            "Default: auto; with --unaligned alone a fixed value that runs no model.",
            rich_help_panel=_STRENGTH,
        ),
    ] = None,
    protect: Annotated[
        float | None,
        typer.Option(
            metavar="FLOAT",
            help="β: how much to hold on to what the adapter does on benign prompts. With keep-out, prompts then tell "
            "which directions fade. Default: 1; with --unaligned 0, which is keep-out alone.",
            rich_help_panel=_STRENGTH,
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="auto: how much of KL(host ‖ adapter) may stay, 0 to 1. Default: 0.06.",
            rich_help_panel=_STRENGTH,
        ),
    ] = None,
    rank: Annotated[
        RankMode | None,
        typer.Option(
            help="keep-in: truncate to the adapter's rank, or write the exact update at twice the rank. Default: keep.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write. Default: ./NAME-csulora.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    report: options.Report = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite", help="Replace an adapter in the output folder, and a report.", rich_help_panel=options.OUTPUT
        ),
    ] = None,
    dora: Annotated[
        DoraMode | None,
        typer.Option(
            help="DoRA: keep the gain of each row and repair the update beside it, merge both into plain LoRA of the "
            "same rank, or refuse. Default: keep.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict",
            help="Refuse an adapter that carries full weights or biases, which a repair leaves as they are.",
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
            help="TOML file with any of these settings; the command line wins.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
) -> int:
    """Repair one adapter: write the closest safe update beside it, verified and measured.

    Exit codes: 0 done and verified, 2 wrong usage, 3 written but a gate failed (strength not reached, or a host that
    does not refuse), 4 an input cannot be used, 5 out of memory or disk.
    """
    given: dict[str, Any] = {
        "adapter": adapter,
        "base": base,
        "unaligned": unaligned,
        "source": source,
        "prompts": prompts,
        "geometry": geometry,
        "subspace_energy": subspace_energy,
        "subspace_rank": subspace_rank,
        "strength": _strength(strength),
        "protect": protect,
        "target": target,
        "rank": rank,
        "out": out,
        "report": report,
        "overwrite": overwrite,
        "dora": dora,
        "strict": strict,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    settings = FixSettings(**options.merged(config, "fix", given))
    from csulora_cli.api import fix_adapter

    with console.progress(is_quiet) as progress:
        result = fix_adapter(settings, progress)
    if is_json:
        console.json_out(result.to_dict())
    elif not is_quiet:
        show(result, settings)
    return result.exit_code


def _strength(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        return text  # FixSettings says what is wrong with it


def show(report: FixReport, settings: FixSettings) -> None:
    """The report as tables for people, readable in 80 columns and on a pipe."""
    for label, value in _head(report):
        console.out(f"{label:<10}{value}")
    console.out()
    console.out(wording.module_table(report).as_text())
    for line in wording.legend(report):
        console.out(f"  {line}")
    if report.strength.path:
        console.out()
        console.out(wording.path_table(report).as_text())
        console.out(f"  {wording.PATH_LEGEND}")
    if report.behaviour:
        counts = report.prompt_counts["report"]
        console.out()
        console.out(wording.behaviour_table(report).as_text())
        console.out(
            f"  on {counts['harmful']} harmful and {counts['benign']} benign prompts that gave no direction and chose "
            "no λ;\n  95% intervals; KL of the first answer token, nats"
        )
    console.out()
    for line in [*wording.verdict(report), wording.VERIFIED]:
        console.out(console.wrapped(line))
    console.out()
    folder = console.word(report.out)
    console.out(f"wrote     {folder}")
    if settings.report is not None:
        console.out(f"          {console.word(str(settings.report))}")
    console.out(f"next      {_next_command(report, settings, folder)}")


def _head(report: FixReport) -> list[tuple[str, str]]:
    names = {role: printable(record.name, 60) for role, record in report.inputs.items()}
    rows = [("adapter", names["adapter"]), ("", printable(report.adapter_summary)), ("host", names["host"])]
    if "unaligned" in names:
        rows.append(("unaligned", names["unaligned"]))
    rows += [("" if place else "rewritten", line) for place, line in enumerate(report.conversions)]
    rows += [("carried" if not place else "", line) for place, line in enumerate(wording.carried_lines(report))]
    source, *more = _source_lines(report)
    rows += [("source", source), *(("", line) for line in more)]
    first, *more = wording.strength_lines(report)
    rows += [("strength", first), *(("", line) for line in more)]
    rows.append(("moved", f"by {wording.percent(report.moved)} of the update's energy, ‖X−Δ‖²/‖Δ‖²"))
    return rows


def _source_lines(report: FixReport) -> list[str]:
    used = report.settings
    lines = []
    if used["source"] == "weights":
        directions = [module.directions or 0 for module in report.modules]
        held = f"k = {min(directions)} to {max(directions)}"
        lines.append(f"weights, {used['geometry']}, {held} directions a module")
    if "protect" in used:
        counts = report.prompt_counts["directions"]
        kinds = {"harmful": "harmful", "lookalikes": "look-alikes"}
        faded = ", ".join(f"{counts[kind]} {name}" for kind, name in kinds.items() if counts[kind])
        lines.append(f"prompts, {faded} and {counts['benign']} benign, β = {used['protect']:g}")
    return lines


def _next_command(report: FixReport, settings: FixSettings, folder: str) -> str:
    base = console.word(settings.base or report.inputs["host"].name)
    if not report.behaviour:  # nothing was measured yet
        adapter, unaligned = console.word(settings.adapter), console.word(settings.unaligned or "")
        out = f" --out {folder}" if settings.out else ""
        return f"csulora fix {adapter} --base {base} --unaligned {unaligned} --strength auto{out} --overwrite"
    # Servers of GGUF files take an adapter that was converted for them.
    if any(name.endswith(".gguf") for name in report.inputs["host"].sha256):
        return f"csulora eval {console.word(settings.adapter)} {folder} --base {base}"
    if report.library == "mlx":
        return f"mlx_lm.generate --model {base} --adapter-path {folder} --prompt 'Hello'"
    if "decoder_prefix" in report.settings:  # vLLM serves no encoder-decoder models
        return f"csulora eval {console.word(settings.adapter)} {folder} --base {base}"
    rank = max(module.rank for module in report.modules)
    ranks = f" --max-lora-rank {rank}" if rank > VLLM_MAX_RANK else ""
    return f"vllm serve {base} --enable-lora{ranks} --lora-modules repaired={folder}"
