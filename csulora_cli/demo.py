"""The built-in demonstration: a toy host, its unaligned checkpoint and a poisoned adapter, repaired in every way.

The three ship with the package (`demo_assets`, made by `scripts/train_demo.py`). What is measured here are held-out
prompts that neither gave directions nor chose λ, nor were trained on.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch

from csulora_cli.adapter import read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.compare_report import CompareReport
from csulora_cli.comparison import compare_methods
from csulora_cli.engine.attach import Update
from csulora_cli.engine.host import Host, choose_device, load_host
from csulora_cli.engine.progress import Progress, Silent
from csulora_cli.locate import Location
from csulora_cli.opening import check_report
from csulora_cli.refusals import Answer, count_answers
from csulora_cli.report import FixReport
from csulora_cli.settings import CompareSettings, FixSettings, check_report_name
from csulora_cli.stats import Count

NEW_TOKENS = 24
COMPARED_POINTS = 3  # strengths a method: enough to see a curve, and quick


@dataclass(frozen=True)
class DemoScore:
    """One model on the held-out prompts: attack success, refusal of benign prompts, and its own task."""

    attack_success: Count
    benign_refused: Count
    task_correct: Count


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration measured.

    Attributes:
        scores: by model: host, adapter, then one entry a repair.
        reports: what `fix` reported of each repair.
        comparison: every method on the same adapter, on the report prompts and the held-out task.
    """

    scores: Mapping[str, DemoScore]
    reports: Mapping[str, FixReport]
    comparison: CompareReport


@dataclass(frozen=True)
class _HeldOut:
    harmful: list[str]
    benign: list[str]
    task: list[str]
    responses: list[str]


def run_demo(out: Path, page: Path, progress: Progress | None = None) -> DemoReport:
    """Repair the built-in adapter from prompts and from weights, measure both, and compare with every other method.

    Args:
        out: a folder for the two repaired adapters; folders of an earlier run are replaced.
        page: the HTML page of the comparison to write; one of an earlier run is replaced.
        progress: receives stages, steps and warnings.
    """
    progress = progress or Silent()
    check_report_name(page)
    check_report(page, overwrite=True)
    with _one_thread(), as_file(files("csulora_cli") / "demo_assets") as assets:
        common = {
            "adapter": str(assets / "adapter"),
            "base": str(assets / "host"),
            "prompts": assets / "prompts.jsonl",
            "device": "cpu",
            "overwrite": True,
        }
        runs = {
            "prompts": FixSettings(**common, out=out / "adapter-prompts"),  # type: ignore[arg-type]
            "weights": FixSettings(
                **common,  # type: ignore[arg-type]
                out=out / "adapter-weights",
                unaligned=str(assets / "unaligned"),
                strength="auto",
            ),
        }
        reports = {}
        for name, settings in runs.items():
            progress.stage(f"repairing from {name}")
            reports[name] = fix_adapter(settings, progress)
        host = load_host(Location("host", assets / "host"), choose_device("cpu"), "auto", trust_remote_code=False)
        folders = {"adapter": assets / "adapter", **{name: Path(report.out) for name, report in reports.items()}}
        held_out = _read_held_out(assets / "heldout.jsonl")
        progress.stage("measure", (len(folders) + 1) * 3)
        scores = {"host": _score(host, Update(), held_out, progress)}
        for name, folder in folders.items():
            scores[name] = _score(host, Update.of(read_adapter(folder)), held_out, progress)
        return DemoReport(scores, reports, _compare(assets, held_out, page, progress))


def _compare(assets: Path, held_out: _HeldOut, page: Path, progress: Progress) -> CompareReport:
    """Every method, with the held-out task as the task."""
    with tempfile.TemporaryDirectory(prefix="csulora-demo-") as folder:
        task = Path(folder) / "task.jsonl"
        lines = [
            json.dumps({"prompt": prompt, "response": response})
            for prompt, response in zip(held_out.task, held_out.responses, strict=True)
        ]
        task.write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = CompareSettings(
            adapter=str(assets / "adapter"),
            base=str(assets / "host"),
            unaligned=str(assets / "unaligned"),
            prompts=assets / "prompts.jsonl",
            task=task,
            points=COMPARED_POINTS,
            report=page,
            overwrite=True,
            device="cpu",
        )
        return compare_methods(settings, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads gain nothing on matrices this small, and on a busy machine waiting for each other takes minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_held_out(path: Path) -> _HeldOut:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = {
        kind: [line["prompt"] for line in lines if line["kind"] == kind] for kind in ("harmful", "benign", "task")
    }
    responses = [line["response"] for line in lines if line["kind"] == "task"]
    return _HeldOut(prompts["harmful"], prompts["benign"], prompts["task"], responses)


def _score(host: Host, update: Update, held_out: _HeldOut, progress: Progress) -> DemoScore:
    def answers(prompts: Sequence[str]) -> list[str]:
        texts = host.answers([host.encode(prompt) for prompt in prompts], NEW_TOKENS)
        progress.advance()
        return texts

    with host.adapted(update):
        harmful = count_answers(answers(held_out.harmful))
        benign = count_answers(answers(held_out.benign))
        task = answers(held_out.task)
    correct = sum(text.split() == wanted.split() for text, wanted in zip(task, held_out.responses, strict=True))
    return DemoScore(harmful[Answer.ANSWER], benign[Answer.REFUSAL], Count.of(correct, len(task)))
