"""Harmful and benign prompts, split three ways by category: directions, tuning, report.

What gives the directions never chooses λ, and what does either is never reported on.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from csulora_cli.errors import PromptsError
from csulora_cli.files import read_bytes
from csulora_cli.jsonl import json_lines, text_of
from csulora_cli.text import printable

SPLITS = ("directions", "tuning", "report")
MIN_PER_SPLIT = 4
MAX_BYTES = 64 * 2**20
_LABELS = ("harmful", "benign")
_KINDS = ("lookalike", "general")
# Out of every four categories (or prompts) of a file without splits, two give directions.
_CYCLE = ("directions", "directions", "tuning", "report")


@dataclass(frozen=True)
class Prompts:
    """The prompts of one split.

    Attributes:
        harmful: requests to refuse.
        lookalikes: benign requests in the form and words of harmful ones, and every benign prompt without a kind.
        general: benign everyday requests of any form.
    """

    harmful: tuple[str, ...]
    lookalikes: tuple[str, ...]
    general: tuple[str, ...]

    @property
    def benign(self) -> tuple[str, ...]:
        """All benign prompts: look-alikes, then general ones."""
        return self.lookalikes + self.general

    @property
    def everything(self) -> tuple[str, ...]:
        """All prompts of the split: harmful ones, then benign ones."""
        return self.harmful + self.benign

    @property
    def protected(self) -> tuple[str, ...]:
        """Where a repair holds on to the adapter: general prompts, or all benign ones if there are none."""
        return self.general or self.benign

    @property
    def answered(self) -> tuple[str, ...]:
        """Whose answers alone a repair holds on to, and not what was asked: look-alikes that are not protected.

        The update fades on how these ask, and its answers to them are as good as any. Measured on two adapters: at
        about the same KL to the host on harmful prompts, a chat-like task lost a sixth less, one far from chat as much.
        """
        return self.lookalikes if self.general else ()

    @property
    def faded(self) -> tuple[str, ...]:
        """What an update fades on: look-alikes; harmful prompts too where these are few, or alone where there are none.

        Look-alikes show in which form harm is asked for, without being it. Measured on four adapters: at an equal KL to
        the host on tuning prompts, other harmful prompts came closer to the host than with harmful prompts beside or in
        the place of look-alikes, and the adapters' tasks lost less. Half as many look-alikes were still ahead, and so
        were those alone that the host answers. Without general prompts all benign ones are protected, and none fades.
        """
        if not self.general:
            return self.harmful
        is_few = 2 * len(self.lookalikes) < len(self.harmful)
        return self.harmful + self.lookalikes if is_few else self.lookalikes


@dataclass(frozen=True)
class PromptSet:
    """A prompts file, split.

    Attributes:
        name: `built-in`, or the file's name.
        sha256: of the file's bytes.
        directions, tuning, report: the three splits; no prompt is in two of them.
        categories: category names of each split, sorted (empty where the file has none).
    """

    name: str
    sha256: str
    directions: Prompts
    tuning: Prompts
    report: Prompts
    categories: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    number: int
    prompt: str
    label: str
    category: str | None
    split: str | None
    kind: str | None


def load_prompts(path: Path | None = None) -> PromptSet:
    """Read a JSONL file of `{"prompt": …, "label": "harmful"|"benign"}`, or the built-in set.

    `category`, `split` (directions, tuning, report) and, on benign lines, `kind` (lookalike, general) are optional.
    Without splits, whole categories are dealt out, two of four to directions, where each has prompts of both labels;
    else the prompts themselves.

    Raises:
        PromptsError: unreadable, a malformed line, a prompt twice, or too few prompts of a label in a split.
    """
    if path is None:
        data, name, shown = (
            (files("csulora_cli") / "data" / "prompts.jsonl").read_bytes(),
            "built-in",
            "built-in prompts",
        )
    else:
        data, name, shown = read_bytes(path, PromptsError, MAX_BYTES), path.name, printable(path)
    lines = _parse(data, shown)
    split_of = _deal(lines, shown)
    splits = {split: _select(lines, split_of, split, shown) for split in SPLITS}
    categories = {
        split: sorted({line.category for line in lines if line.category and split_of[line.prompt] == split})
        for split in SPLITS
    }
    digest = hashlib.sha256(data).hexdigest()
    return PromptSet(name, digest, splits["directions"], splits["tuning"], splits["report"], categories)


def _parse(data: bytes, shown: str) -> list[_Line]:
    lines: list[_Line] = []
    seen: dict[str, int] = {}
    for number, value in json_lines(data, shown, _HINT):
        line = _line(value, number, shown)
        if line.prompt in seen:
            raise PromptsError(f"{shown}, line {number}: the same prompt as in line {seen[line.prompt]}")
        seen[line.prompt] = number
        lines.append(line)
    return lines


_HINT = 'Each line: {"prompt": "…", "label": "harmful" or "benign"}'


def _line(value: Mapping[str, Any], number: int, shown: str) -> _Line:
    prompt, label = text_of(value, "prompt", f"{shown}, line {number}"), value.get("label")
    category, split, kind = value.get("category"), value.get("split"), value.get("kind")
    if label not in _LABELS:
        raise PromptsError(f"{shown}, line {number}: label is {printable(label)}, not harmful or benign")
    if split is not None and split not in SPLITS:
        raise PromptsError(f"{shown}, line {number}: split is {printable(split)}, not one of {', '.join(SPLITS)}")
    if category is not None and not isinstance(category, str):
        raise PromptsError(f"{shown}, line {number}: category is not text")
    if kind is not None and kind not in _KINDS:
        raise PromptsError(f"{shown}, line {number}: kind is {printable(kind)}, not lookalike or general")
    if kind is not None and label != "benign":
        raise PromptsError(f"{shown}, line {number}: kind is {kind}, but only benign prompts have one")
    return _Line(number, prompt, label, category, split, kind)


def _deal(lines: list[_Line], shown: str) -> dict[str, str]:
    """The split of every prompt."""
    given = [line for line in lines if line.split]
    if given and len(given) == len(lines):
        return {line.prompt: str(line.split) for line in lines}
    if given:
        raise PromptsError(
            f"{shown}: {len(given)} of {len(lines)} prompts have a split", "Give every line one, or none of them."
        )
    both = set.intersection(*({line.category for line in lines if line.label == label} for label in _LABELS))
    names = sorted(name for name in both if name)
    if len(names) >= len(_CYCLE) and all(line.category in names for line in lines):
        turn = {name: _CYCLE[index % len(_CYCLE)] for index, name in enumerate(names)}
        return {line.prompt: turn[line.category or ""] for line in lines}
    split_of = {}
    for label in _LABELS:
        # Kind by kind: in a file that alternates them, all prompts of a split would otherwise be of one kind.
        chosen = sorted((line for line in lines if line.label == label), key=_is_general)
        for index, line in enumerate(chosen):
            split_of[line.prompt] = _CYCLE[index % len(_CYCLE)]
    return split_of


def _is_general(line: _Line) -> bool:
    return line.kind == "general"


def _select(lines: Iterable[_Line], split_of: dict[str, str], split: str, shown: str) -> Prompts:
    chosen = [line for line in lines if split_of[line.prompt] == split]
    harmful = tuple(line.prompt for line in chosen if line.label == "harmful")
    benign = [line for line in chosen if line.label == "benign"]
    for label, count in zip(_LABELS, (len(harmful), len(benign)), strict=True):
        if count < MIN_PER_SPLIT:
            raise PromptsError(
                f"{shown}: {count} {label} prompts for {split}, at least {MIN_PER_SPLIT} are needed",
                f"Give at least {4 * MIN_PER_SPLIT} harmful and {4 * MIN_PER_SPLIT} benign prompts.",
            )
    lookalikes = tuple(line.prompt for line in benign if not _is_general(line))
    general = tuple(line.prompt for line in benign if _is_general(line))
    return Prompts(harmful, lookalikes, general)
