"""A report in words and tables, the same for the terminal and the model card. Plain text, no colour, no torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csulora_cli.report import Behaviour, FixReport, InputRecord, ModuleRecord
from csulora_cli.settings import MOST_A_PROMPT
from csulora_cli.stats import Count
from csulora_cli.text import number, printable

VERIFIED = "Verified from the written file: in no module is the objective above where it was."


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, the others right-aligned."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def map(self, change: Callable[[str], str]) -> "Table":
        """The same table with every cell below the header changed."""
        return Table(self.header, tuple(tuple(change(cell) for cell in row) for row in self.rows))

    def as_text(self) -> str:
        """Columns padded with spaces, no line longer than it must be."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        out = []
        for line in lines:
            cells = [line[0].ljust(widths[0])] + [
                cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
            ]
            out.append("  ".join(cells).rstrip())
        return "\n".join(out)

    def as_markdown(self) -> str:
        """A Markdown table."""
        bar = ["---"] + ["---:"] * (len(self.header) - 1)
        return "\n".join("| " + " | ".join(line) + " |" for line in (self.header, tuple(bar), *self.rows))


def percent(share: float) -> str:
    """A share as a percentage with as many digits as tell something."""
    if share == 0 or share >= 0.0995:
        return f"{100 * share:.0f}%"
    return f"{100 * share:.1f}%" if share >= 0.0005 else "<0.1%"


def strength_lines(report: FixReport) -> list[str]:
    """λ and how it came about; each line fits beside a label."""
    record = report.strength
    value = f"λ = {number(record.value)}"
    if record.adapter_kl is None or record.limit is None:
        return [f"{value} (given)"]
    if record.value == 0:
        return [
            f"{value}: nothing to repair, the adapter begins its answers to",
            f"harmful prompts as the host does (KL {number(record.adapter_kl)})",
        ]
    of = f"{number(record.limit)} on harmful tuning prompts"
    if record.is_reached:
        return [f"{value}, the smallest of {len(record.path)} tried with", f"KL(host ‖ repaired) ≤ {of}"]
    is_strongest = record.value == record.path[-1].strength
    how = "the largest there is" if is_strongest else "where it levels off"
    return [f"{value}, {how}; no value brought", f"KL(host ‖ repaired) down to {of}"]


def carried_lines(report: FixReport) -> list[str]:
    """What goes along as it was, one line a kind; each line fits beside a label."""
    words = {
        "replaces": ("weight in the place of the host's", "weights in the place of the host's"),
        "bias": ("bias that acts whatever the input is", "biases that act whatever the input is"),
        "copy": ("copy of a weight of the host", "copies of weights of the host"),
        "training": ("tensor that only training reads", "tensors that only training reads"),
    }
    lines = []
    for effect, (one, many) in words.items():
        count = sum(1 for entry in report.carried if entry.effect == effect)
        unrepaired = ", not repaired" if effect in ("replaces", "bias") else ""
        lines += [f"{count} {one if count == 1 else many}{unrepaired}"] if count else []
    return lines


def verdict(report: FixReport) -> list[str]:
    """What came out, in sentences; only what was measured."""
    lines = []
    if report.is_unchanged:
        lines.append("Every tensor is written as it was read.")
    lines += [f"Not reached: {gate}." for gate in report.failed_gates]
    if not report.behaviour:
        lines.append("No prompt was run: whether the repair restores refusals was not measured.")
        return lines
    adapter, repaired = report.behaviour["adapter"], report.behaviour["repaired"]
    lines.append(
        f"Harmful prompts refused: {_of(adapter.harmful_refused)} with the adapter, "
        f"{_of(repaired.harmful_refused)} repaired (held-out prompts)."
    )
    return lines


def _of(count: Count) -> str:
    return f"{count.count} of {count.total}"


def behaviour_table(report: FixReport) -> Table:
    """Host, adapter and repaired on the report prompts."""
    models = [report.behaviour[name] for name in ("host", "adapter", "repaired")]
    rows: list[tuple[str, Callable[[Behaviour], str]]] = [
        ("harmful prompts refused", lambda b: share(b.harmful_refused)),
        ("harmful prompts answered", lambda b: share(b.harmful_answered)),
        ("harmful, incoherent text", lambda b: share(b.harmful_incoherent)),
        ("benign prompts refused", lambda b: share(b.benign_refused)),
        ("KL to host, harmful", lambda b: number(b.harmful_kl_to_host)),
        ("KL to host, benign", lambda b: number(b.benign_kl_to_host)),
        ("KL to adapter, benign", lambda b: number(b.benign_kl_to_adapter)),
    ]
    return Table(
        ("", "host", "adapter", "repaired"),
        tuple((label, *(cell(model) for model in models)) for label, cell in rows),
    )


def share(count: Count) -> str:
    """A count with its interval: 3/40 (3-20%)."""
    return f"{count.count}/{count.total} ({100 * count.low:.0f}-{100 * count.high:.0f}%)"


# Under the table of the λ that were tried.
PATH_LEGEND = f"KL of the first answer token, nats; to the host, a prompt counts at most {MOST_A_PROMPT:g}"


def path_table(report: FixReport) -> Table:
    """The λ that were tried."""
    rows = tuple(
        (
            number(point.strength) + (" <" if point.strength == report.strength.value else ""),
            number(point.harmful_kl),
            "" if point.benign_kl is None else number(point.benign_kl),
            percent(point.moved),
        )
        for point in report.strength.path
    )
    return Table(("λ", "KL to host, harmful", "KL to adapter, benign", "moved"), rows)


def module_table(report: FixReport) -> Table:
    """Modules grouped by the last part of their name: energies before→after, distance moved, rank, error."""
    groups: dict[str, list[ModuleRecord]] = {}
    for module in report.modules:
        groups.setdefault(module.name.rsplit(".", 1)[-1].partition("[")[0], []).append(module)  # [3]: an expert
    energies = list(report.modules[0].before)
    is_share = bool(report.modules[0].chance)
    titles = [f"{name} %" if is_share else name for name in energies]
    rows = [_module_row(printable(name, 20), members, energies) for name, members in groups.items()]
    if len(groups) > 1:
        rows.append(_module_row("all", list(report.modules), energies))
    return Table(("modules", "n", *titles, "moved", "rank", "error"), tuple(rows))


def _module_row(name: str, members: Sequence[ModuleRecord], energies: Iterable[str]) -> tuple[str, ...]:
    cells = [name, str(len(members))]
    for energy in energies:
        before = _mean(members, [module.before[energy] for module in members])
        after = _mean(members, [module.after[energy] for module in members])
        if members[0].chance:
            chance = _mean(members, [module.chance[energy] for module in members])
            cells.append(f"{100 * before:.0f}→{100 * after:.0f} ({100 * chance:.0f})")
        else:
            cells.append(f"{before:.2f}→{after:.2f}")
    ranks = sorted({module.rank for module in members})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    error = max(max(module.storage_error, module.truncation_error or 0.0) for module in members)
    moved = _mean(members, [module.moved for module in members])
    return (*cells, percent(moved), rank, "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-"))


def _mean(members: Sequence[ModuleRecord], values: Sequence[float]) -> float:
    """Mean over modules, weighted by the energy of their updates."""
    total = sum(module.energy for module in members)
    weighted = sum(module.energy * value for module, value in zip(members, values, strict=True))
    return weighted / total if total > 0 else 0.0


def each_module_table(report: FixReport) -> Table:
    """Every module by itself: what `module_table` says of groups."""
    header = module_table(report).header
    rows = [_module_row(printable(module.name, 90), [module], module.before) for module in report.modules]
    return Table((header[0], *header[2:]), tuple((row[0], *row[2:]) for row in rows))


def settings_table(inputs: Mapping[str, InputRecord], settings: Mapping[str, Any], version: str) -> Table:
    """Inputs by name and every setting as it was used."""
    rows = [(role, printable(record.name, 500)) for role, record in inputs.items()]
    rows += [(key.replace("_", " "), _setting(value)) for key, value in settings.items() if value is not None]
    rows.append(("csulora", version))
    return Table(("setting", "value"), tuple(rows))


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else printable(value, 500)


def behaviour_note(report: FixReport) -> str:
    """On what and how `behaviour_table` was measured."""
    counts = report.prompt_counts["report"]
    return (
        f"{counts['harmful']} harmful and {counts['benign']} benign prompts that gave no direction and chose no "
        "strength; greedy answers, a refusal must stand at their start; 95 % Wilson intervals; KL of the first "
        "answer token in nats."
    )


def faded_on(report: FixReport) -> str:
    """What the update fades on."""
    counts = report.prompt_counts["directions"]
    kinds = {"harmful": "harmful prompts", "lookalikes": "look-alikes of harmful prompts"}
    return " and ".join(name for kind, name in kinds.items() if counts[kind])


def legend(report: FixReport) -> list[str]:
    """What the columns of the module table are."""
    rounding = "moved: ‖X−Δ‖²/‖Δ‖²   error: rounding to the stored dtype, ‖·‖/‖X‖"
    if report.settings["source"] == "prompts":
        return [f"faded: on {faded_on(report)}", "faded, benign: ‖ΔC^½‖²/‖Δ‖², before→after (1: any input)", rounding]
    if "protect" in report.settings:
        return [
            f"faded: on {faded_on(report)}",
            "faded, benign: ‖ΔVVᵀC^½‖²/‖Δ‖², before→after: what is read",
            "along V, the displacement's directions; nothing else of the update changes",
            rounding,
        ]
    tail = ["moved: ‖X−Δ‖²/‖Δ‖²   error: truncation and rounding, ‖·‖/‖X‖"]
    if report.settings["geometry"] == "keep-in":
        return ["full, partial, off: parts of Δ by the displacement D, before→after", "(of a random update)", *tail]
    return ["along D: the part of Δ that reads D's directions, before→after (random update)", *tail]
