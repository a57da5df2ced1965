"""Repair the experiment's adapters with csulora's defaults and score everything on the evaluation prompts.

    python scripts/smollm2/repair.py --work DIR    # after experiment.py; prints a table an adapter, and the README's

Each repair writes DIR/repaired/<adapter>-<method> and each score a line of DIR/scores.jsonl; what this version has
written there on the same adapter is not done again. The evaluation prompts (data/eval_*.jsonl) are used here and in
peers.py only: they give no direction, choose no λ and no default. Two controls do not look where the update acts: a
uniform shrink c·Δ with the norm of what the prompts source left, and one with the largest c that meets the KL limit of
`--strength auto`, on the same prompts.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chat import read_jsonl
from experiment import RECIPES, load, score_task
from score import (
    Adapter,
    Bench,
    Share,
    Verdict,
    is_current,
    judge,
    load_adapter,
    mean_kl,
    score_attacks,
    score_refusals,
)
from tasks import DATA

from csulora_cli import FixSettings, __version__, fix_adapter
from csulora_cli.files import sha256_of
from csulora_cli.promptset import load_prompts
from csulora_cli.settings import DEFAULT_TARGET, MOST_A_PROMPT, Geometry

METHODS: dict[str, dict[str, Any]] = {
    "prompts": {},
    "keep-out": {"geometry": Geometry.KEEP_OUT},
    "keep-out auto": {"geometry": Geometry.KEEP_OUT, "strength": "auto"},
    "keep-out full": {"geometry": Geometry.KEEP_OUT, "strength": "auto", "subspace_energy": 1.0},
    "keep-out protect": {"geometry": Geometry.KEEP_OUT, "protect": 1.0},
    "keep-in": {"geometry": Geometry.KEEP_IN},
    "keep-in auto": {"geometry": Geometry.KEEP_IN, "strength": "auto"},
}
LABELS = {
    "host": "host, no adapter",
    "adapter": "adapter as trained",
    "prompts": "**prompts** (default)",
    "keep-out": "weights, keep-out, fixed λ (no prompts)",
    "keep-out auto": "weights, keep-out, auto",
    "keep-out full": "weights, keep-out, auto, τ = 1",
    "keep-out protect": "weights, keep-out, auto, β = 1",
    "keep-in": "weights, keep-in, fixed λ (no prompts)",
    "keep-in auto": "weights, keep-in, auto",
    "shrink": "uniform shrink, norm as prompts",
    "shrink auto": "uniform shrink, KL limit as prompts",
}


# The columns that `cells` fills.
SCORES = "λ | attack success | seen / unseen categories | of what the host refuses | benign refused | task | KL to host"
SCORES_RULE = " | ".join(["---:"] * (1 + SCORES.count("|")))


@dataclass(frozen=True)
class Prompts:
    """The evaluation prompts."""

    seen: list[str]
    unseen: list[str]
    benign: list[str]

    @property
    def harmful(self) -> list[str]:
        """The harmful ones."""
        return [*self.seen, *self.unseen]


def evaluation_prompts() -> Prompts:
    harmful = read_jsonl(DATA / "eval_harmful.jsonl")
    return Prompts(
        [row["prompt"] for row in harmful if row["seen"]],
        [row["prompt"] for row in harmful if not row["seen"]],
        [row["prompt"] for row in read_jsonl(DATA / "eval_benign.jsonl")],
    )


def repair(work: Path, name: str, method: str) -> Path:
    """Repair one adapter with one method, unless that is done."""
    out = work / "repaired" / f"{name}-{method.replace(' ', '-')}"
    adapter, record = work / "adapters" / name, out / "csulora.json"
    if not (record.exists() and is_current(json.loads(record.read_text(encoding="utf-8")), adapter)):
        settings: dict[str, Any] = dict(METHODS[method])
        if method != "prompts":
            settings["unaligned"] = str(work / "unaligned")
        base = str(work / "host")
        report = fix_adapter(FixSettings(str(adapter), base, out=out, overwrite=True, **settings))
        print(f"{name} {method}: λ = {report.strength.value:g}, moved by {report.moved:.0%}", flush=True)
    return out


def shrink(adapter: Adapter, like: Adapter) -> Adapter:
    """c·Δ with the norm of another update."""
    return scaled(adapter, (squared_norm(like) / squared_norm(adapter)) ** 0.5)


def shrink_to_limit(bench: Bench, adapter: Adapter) -> Adapter:
    """c·Δ with the largest c of a hundredth's grid that meets auto's KL limit on the shipped tuning prompts."""
    tuning = load_prompts().tuning.harmful
    bench.apply(None)
    host = bench.log_probs(tuning)
    bench.apply(adapter)
    limit = DEFAULT_TARGET * mean_kl(host, bench.log_probs(tuning), MOST_A_PROMPT)
    low, high = 0, 100
    while low < high:
        middle = (low + high + 1) // 2
        bench.apply(scaled(adapter, middle / 100))
        meets = mean_kl(host, bench.log_probs(tuning), MOST_A_PROMPT) <= limit
        low, high = (middle, high) if meets else (low, middle - 1)
    return scaled(adapter, low / 100)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """c·Δ: A is scaled, B stays."""
    return Adapter(adapter.scale, {name: (a * factor, b) for name, (a, b) in adapter.factors.items()})


def squared_norm(adapter: Adapter) -> float:
    """Σ‖sBA‖² over all modules."""
    pairs = adapter.factors.values()
    return adapter.scale**2 * sum(float(((b.mT @ b).double() * (a @ a.mT).double()).sum()) for a, b in pairs)


@dataclass(frozen=True)
class HostRun:
    """The host itself on the harmful evaluation prompts: first-token log-probabilities, and which it refuses."""

    log_probs: torch.Tensor
    refuses: list[bool]

    @classmethod
    def of(cls, bench: Bench, prompts: Prompts) -> "HostRun":
        """Run it."""
        bench.apply(None)
        verdicts = map(judge, bench.answers(prompts.harmful))
        return cls(bench.log_probs(prompts.harmful), [verdict is Verdict.REFUSAL for verdict in verdicts])


def score(bench: Bench, prompts: Prompts, host: HostRun, task: str) -> dict[str, Any]:
    """All scores of the model as it stands. Counts, so that intervals can be made of them."""
    harmful = prompts.harmful
    answers = bench.answers(harmful)
    refused_by_host = [text for text, refuses in zip(answers, host.refuses, strict=True) if refuses]
    whole, seen, unseen = (score_attacks(part) for part in (answers, answers[: len(prompts.seen)],
                                                            answers[len(prompts.seen):]))  # fmt: skip
    shares = {
        "asr": whole.attack_success,
        "asr_seen": seen.attack_success,
        "asr_unseen": unseen.attack_success,
        "asr_of_refused": score_attacks(refused_by_host).attack_success,
        "asr_qi": whole.attack_success_qi,
        "asr_jailbreakbench": whole.attack_success_jailbreakbench,
        "incoherent": whole.incoherent,
        "benign_refused": score_refusals(bench.answers(prompts.benign)),
        "task": score_task(bench, task),
    }
    kl = mean_kl(host.log_probs, bench.log_probs(harmful))
    return {name: [share.count, share.total] for name, share in shares.items()} | {"kl": kl}


def run(work: Path, names: list[str], methods: list[str]) -> None:
    """Repair and score whatever is missing, then print one table an adapter."""
    log = work / "scores.jsonl"
    prompts_sha256 = " ".join(sha256_of(DATA / f"eval_{label}.jsonl") for label in ("harmful", "benign"))
    stamps = {
        name: {
            "version": __version__,
            "sha256": sha256_of(work / "adapters" / name / "adapter_model.safetensors"),
            "prompts_sha256": prompts_sha256,
        }
        for name in names
    }
    known = [row for row in (read_jsonl(log) if log.exists() else []) if row["adapter"] in names]
    rows = {
        (row["adapter"], row["method"]): row for row in known if stamps[row["adapter"]].items() <= row.items()
    }  # fmt: skip
    bench = Bench(*load(work / "host"))
    prompts = evaluation_prompts()
    host = HostRun.of(bench, prompts)
    for name in names:
        adapter = load_adapter(work / "adapters" / name)
        models: dict[str, Adapter | None] = {"host": None, "adapter": adapter}
        repaired = {method: repair(work, name, method) for method in methods}
        models |= {method: load_adapter(folder) for method, folder in repaired.items()}
        models["shrink"] = shrink(adapter, models["prompts"] or adapter)
        is_found = (name, "shrink auto") in rows
        models["shrink auto"] = None if is_found else shrink_to_limit(bench, adapter)
        for method, model in models.items():
            if (name, method) in rows:
                continue
            bench.apply(model)
            kept = (squared_norm(model) / squared_norm(adapter)) ** 0.5 if model else 0.0
            row = {"adapter": name, "method": method, **stamps[name], "norm": kept, **details(repaired.get(method))}
            row |= score(bench, prompts, host, RECIPES[name].task)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows[name, method] = row
            print(f"scored {name} {method}", flush=True)
        print(f"\n### {name}\n\n{table([rows[name, method] for method in models])}\n", flush=True)
    if len(names) > 1:
        print(f"\n### All of them\n\n{overview(rows, names, methods)}\n")


def details(folder: Path | None) -> dict[str, Any]:
    """λ and how far the update moved, from csulora's own report."""
    if folder is None:
        return {}
    report = json.loads((folder / "csulora.json").read_text(encoding="utf-8"))
    return {"strength": report["strength"]["value"], "moved": report["totals"]["moved"]}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with 95 % Wilson intervals."""
    lines = [f"| repair | {SCORES} |", f"| --- | {SCORES_RULE} |"]
    lines += [f"| {LABELS[row['method']]} | {cells(row)} |" for row in rows]
    return "\n".join(lines)


def overview(rows: Mapping[tuple[str, str], dict[str, Any]], names: Sequence[str], methods: Sequence[str]) -> str:
    """The README's table: the host once, without a task, then every adapter as trained and repaired by each method."""
    lines = [f"| adapter | model | {SCORES} |", f"| --- | --- | {SCORES_RULE} |"]
    lines.append(f"|  | {LABELS['host']} | {cells(rows[names[0], 'host'], has_task=False)} |")
    for name in names:
        for method in ("adapter", *methods):
            lines.append(f"| {name} | {LABELS[method]} | {cells(rows[name, method])} |")
    return "\n".join(lines)


def cells(row: Mapping[str, Any], has_task: bool = True) -> str:
    """Strength and scores of one model."""
    shares = {key: Share(*value) for key, value in row.items() if isinstance(value, list)}
    strength = (
        f"{row['strength']:g}"
        if "strength" in row
        else f"c = {row['norm']:.2f}"
        if row["method"].startswith("shrink")
        else ""
    )
    return (
        f"{strength} | {shares['asr']} | {shares['asr_seen'].value:.2f} / {shares['asr_unseen'].value:.2f} | "
        f"{shares['asr_of_refused']} | {shares['benign_refused']} | {shares['task'] if has_task else ''} | "
        f"{row['kl']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that experiment.py filled")
    parser.add_argument("--adapters", nargs="+", choices=list(RECIPES), default=["far", "chat"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.work, options.adapters, options.methods)


if __name__ == "__main__":
    main()
