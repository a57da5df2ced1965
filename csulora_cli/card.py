"""The model card of a repaired adapter: what was done and what was measured, and no claim beyond it."""

import json
import re

from csulora_cli import wording
from csulora_cli.adapter import Adapter
from csulora_cli.locate import Location, looks_like_hub_id
from csulora_cli.report import FixReport
from csulora_cli.text import printable


def model_card(report: FixReport, adapter: Adapter, host: Location) -> str:
    """The text of README.md. The base model stands in it only as a Hub id, never as a path."""
    parts = [
        _front_matter(adapter, host),
        "# " + _plain(f"{report.inputs['adapter'].name}, repaired with csulora"),
        "csulora looked for the update closest to the original adapter's that pays for what it does on "
        + _paid_for(report)
        + ". Keys and layout are the original's, and load where it does. The numbers below are "
        "measurements on the stated prompts; they do not show that the adapter is safe.",
        "## What was measured",
        *_measured(report),
        "## What was done",
        wording.settings_table(report.inputs, report.settings, report.version).map(_plain).as_markdown(),
        wording.module_table(report).map(_plain).as_markdown(),
        _plain_text(wording.legend(report)),
        "Hashes of all inputs, every setting and the table of all modules are in `csulora.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _paid_for(report: FixReport) -> str:
    along = "the directions of safety alignment"
    if "protect" not in report.settings:
        return along
    on = wording.faded_on(report)
    return on if report.settings["source"] == "prompts" else f"{on}, along {along}"


def _measured(report: FixReport) -> list[str]:
    text = [_plain_text(wording.verdict(report))]
    if report.behaviour:
        text.append(wording.behaviour_table(report).as_markdown())
        text.append(wording.behaviour_note(report))
    return text


def _front_matter(adapter: Adapter, host: Location) -> str:
    lines = ["---"]
    base = host.repo_id or (adapter.base if adapter.base and looks_like_hub_id(adapter.base) else None)
    if base:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    return "\n".join([*lines, f"library_name: {adapter.dialect.name}", "tags:", "- csulora", "- lora", "---"])


def _plain_text(lines: list[str]) -> str:
    return "  \n".join(_plain(line) for line in lines)


def _plain(value: object) -> str:
    """Text that Markdown and HTML leave alone."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", printable(value, 500))
