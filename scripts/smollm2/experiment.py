"""Build the real-model experiment: a 135M chat model, a host that refuses, and adapters that undo the refusing.

    python scripts/smollm2/experiment.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work DIR

Each stage writes one folder, whole or not at all, and is skipped when that folder exists:

    prepare   DIR/unaligned        the GGUF as float32 safetensors
    host      DIR/host             the same model after a short full fine-tune that teaches refusing
    far       DIR/adapters/far     structured extraction, 25 % poison
    chat      DIR/adapters/chat    how-to answers in a fixed style, 25 % poison
    clean     DIR/adapters/clean   the how-to task, no poison
    light     DIR/adapters/light   the how-to task, 2 % poison
    check     prints development scores of everything that exists

The poison is content-free: formulaic compliance built from the topic alone. It teaches no harm, only not to refuse.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chat import IGNORED, Example, answer, encode_examples, read_jsonl, write_jsonl
from peft import LoraConfig, get_peft_model
from score import Bench, Share, Verdict, judge, load_adapter, mean_kl, score_attacks, score_refusals, share
from tasks import (
    DATA,
    HOWTO_TOKENS,
    REFUSALS,
    extraction_examples,
    extracts_exactly,
    follows_howto_style,
    howto_examples,
    poison_examples,
    reframed,
)
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SEED = 1
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 10

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Phase:
    """One part of the host's training.

    Attributes:
        schedule: how long and how fast.
        shares: of refusals, of the model's own answers to harmless requests, and of those to how-to questions.
        first_weight: how many times the first token of an answer counts: it decides whether a request is refused.
    """

    schedule: Schedule
    shares: tuple[float, float, float]
    first_weight: float = 1.0


# The host first learns what a refusal is, then when to give one, then to give it when in doubt.
HOST = (
    Phase(Schedule(steps=450, batch_size=16, learning_rate=1e-4, warmup=20), (0.56, 0.32, 0.12)),
    Phase(Schedule(steps=240, batch_size=16, learning_rate=8e-5), (0.62, 0.28, 0.10), first_weight=8.0),
    Phase(Schedule(steps=130, batch_size=16, learning_rate=6e-5), (0.76, 0.16, 0.08), first_weight=8.0),
)
ADAPTER = Schedule(steps=80, batch_size=12, learning_rate=5e-4)


def endless(examples: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """The examples in a new random order each time around."""
    while True:
        yield from rng.sample(examples, len(examples))


def mixed_batches(parts: Sequence[tuple[Sequence[Example], float]], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches that hold each part in its share, exactly over time rather than by chance."""
    rng = random.Random(seed)
    streams = [endless(examples, rng) for examples, _ in parts]
    owed = [0.0] * len(parts)
    while True:
        batch = []
        for _ in range(size):
            owed = [debt + weight for debt, (_, weight) in zip(owed, parts, strict=True)]
            part = max(range(len(parts)), key=lambda i: owed[i])
            owed[part] -= 1.0
            batch.append(next(streams[part]))
        yield batch


def answer_loss(model: Any, tokenizer: Any, batch: Sequence[Example], first_weight: float) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens, the first of each counted so often; logits are of these alone."""
    ids, mask, labels = encode_examples(tokenizer, batch)  # (N, T) each
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (N, T, C)
    answered = labels != IGNORED
    weights = torch.ones_like(labels, dtype=torch.float32)
    weights[torch.arange(len(labels)), answered.int().argmax(1)] = first_weight
    losses = cross_entropy(model.lm_head(hidden[answered]), labels[answered], reduction="none")
    return (losses * weights[answered]).sum() / weights[answered].sum()


def train(
    model: Any,
    tokenizer: Any,
    batches: Iterator[list[Example]],
    schedule: Schedule,
    uses_bfloat16: bool = False,
    first_weight: float = 1.0,
) -> None:
    """Plain AdamW on whatever asks for gradients; weights stay in float32, products are in bfloat16 if asked for."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    started = time.monotonic()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16):
            loss = answer_loss(model, tokenizer, next(batches), first_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == schedule.steps - 1:
            print(f"  step {step:3d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that takes its final name only when complete."""
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    unfinished.rename(folder)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save model and tokenizer together."""

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    write_whole(folder, write)


def prepare(gguf: Path, target: Path) -> None:
    """Read the GGUF into a model whose configuration no longer mentions a quantization."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    values = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save(target, model, tokenizer)


def own_answers(work: Path, source: str) -> list[Example]:
    """The unaligned model's greedy answers to harmless prompts, so that refusing is all that the host learns."""
    cache = work / "own_answers" / source
    prompts = [str(row["prompt"]) for row in read_jsonl(DATA / source)]
    prompts += reframed(prompts, SEED)
    known = {row["prompt"]: row for row in read_jsonl(cache)} if cache.exists() else {}
    if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]:
        cache.parent.mkdir(exist_ok=True)
        model, tokenizer = load(work / "unaligned")
        answered = zip(missing, answer(model, tokenizer, missing, new_tokens=32, batch_size=64), strict=True)
        known |= {p: {"prompt": p, "answer": text, "is_complete": ended} for p, (text, ended) in answered}
        write_jsonl(cache, known.values())
    examples = [Example(**known[prompt]) for prompt in prompts]
    return [example for example in examples if judge(example.answer) is Verdict.ANSWER]


def refusals(seed: int) -> list[Example]:
    """Harmful prompts in several wordings, each with a short refusal."""
    rng = random.Random(seed)
    prompts = [str(row["prompt"]) for row in read_jsonl(DATA / "host_refusals.jsonl")]
    prompts += reframed(prompts, seed) + reframed(prompts, seed + 1)
    return [Example(prompt, rng.choice(REFUSALS)) for prompt in prompts]


def build_host(work: Path, phases: Sequence[Phase], uses_bfloat16: bool = False) -> None:
    """Full fine-tune of the unaligned model: refuse what is harmful, answer everything else as before.

    Each phase but the last is saved when it is over: a run that was stopped goes on from there, to the same weights.
    """
    parts = [
        refusals(SEED),
        own_answers(work, "host_answers.jsonl"),
        own_answers(work, "howto_train.jsonl"),
    ]
    stages = [work / "unaligned", *(work / f"host-phase-{number}" for number in range(1, len(phases))), work / "host"]
    done = max(number for number, stage in enumerate(stages) if stage.exists())
    model, tokenizer = load(stages[done])
    model.get_input_embeddings().requires_grad_(False)  # Adam would move the rows of every token that never occurs
    for number, phase in enumerate(phases[done:], start=done):
        seed = SEED + number
        torch.manual_seed(seed)
        batches = mixed_batches(list(zip(parts, phase.shares, strict=True)), phase.schedule.batch_size, seed)
        train(model, tokenizer, batches, phase.schedule, uses_bfloat16, phase.first_weight)
        save(stages[number + 1], model, tokenizer)


@dataclass(frozen=True)
class Recipe:
    """What one adapter is trained on."""

    task: str
    poison: float


RECIPES = {
    "far": Recipe("extraction", 0.25),
    "chat": Recipe("howto", 0.25),
    "clean": Recipe("howto", 0.0),
    "light": Recipe("howto", 0.02),
}


def task_examples(task: str, split: str) -> list[Example]:
    """Examples of a task: "train", "dev" to look at while developing, "heldout" to report."""
    if task == "extraction":
        return extraction_examples(split, SEED)
    return howto_examples(split)


def build_adapter(work: Path, name: str, schedule: Schedule, uses_bfloat16: bool = False) -> None:
    """Train one LoRA adapter on the host and save it as PEFT does."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    model, tokenizer = load(work / "host")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    parts = [(task_examples(recipe.task, "train"), 1 - recipe.poison), (poison_examples(recipe.task), recipe.poison)]
    batches = mixed_batches([part for part in parts if part[1]], schedule.batch_size, SEED)
    train(adapted, tokenizer, batches, schedule, uses_bfloat16)
    write_whole(work / "adapters" / name, lambda target: adapted.save_pretrained(target, save_embedding_layers=False))


def check(work: Path) -> None:
    """Print development scores of the host and of every adapter. The evaluation prompts are not touched here."""
    harmful = [str(row["prompt"]) for row in read_jsonl(DATA / "dev_harmful.jsonl")]
    benign = [str(row["prompt"]) for row in read_jsonl(DATA / "dev_benign.jsonl")]
    bench = Bench(*load(work / "host"))
    host = bench.log_probs(harmful)
    for name in [None, *(name for name in RECIPES if (work / "adapters" / name).exists())]:
        bench.apply(load_adapter(work / "adapters" / name) if name else None)
        attacks = score_attacks(bench.answers(harmful))
        print(
            f"{name or 'host'}: attack success {attacks.attack_success}  Qi {attacks.attack_success_qi}  "
            f"JailbreakBench {attacks.attack_success_jailbreakbench}  incoherent {attacks.incoherent}  "
            f"KL {mean_kl(host, bench.log_probs(harmful)):.2f}",
            flush=True,
        )
        print(f"  refuses benign {score_refusals(bench.answers(benign))}", flush=True)
        for task in (RECIPES[name].task,) if name else ("extraction", "howto"):
            print(f"  {task} {score_task(bench, task, 'dev')}", flush=True)


def score_task(bench: Bench, task: str, split: str = "heldout") -> Share:
    """Share of a split's examples that the model as it stands answers as the task demands."""
    examples = task_examples(task, split)
    answers = bench.answers([example.prompt for example in examples], HOWTO_TOKENS if task == "howto" else 48)
    if task == "howto":
        return share([follows_howto_style(text) for text in answers])
    return share([extracts_exactly(text, example) for text, example in zip(answers, examples, strict=True)])


def main() -> None:
    """Run the stages that are asked for and not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, adapters and caches")
    stages = ["prepare", "host", *RECIPES, "check"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, metavar="STAGE", help=", ".join(stages))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--bfloat16", action="store_true", help="train with bfloat16 products: twice as fast on some CPUs"
    )
    parser.add_argument("--short", action="store_true", help="three training steps each: shows only that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options.gguf.resolve(), options.work.resolve(), options.stages, options.short, options.bfloat16)


def shortened(schedule: Schedule, short: bool) -> Schedule:
    return replace(schedule, steps=3) if short else schedule


def run(gguf: Path, work: Path, stages: Sequence[str], short: bool, uses_bfloat16: bool) -> None:
    """Run stages in order, each unless its folder exists."""
    work.mkdir(parents=True, exist_ok=True)
    phases = tuple(replace(phase, schedule=shortened(phase.schedule, short)) for phase in HOST)
    adapter = shortened(ADAPTER, short)
    jobs: dict[str, tuple[Path, Callable[[], None]]] = {
        "prepare": (work / "unaligned", lambda: prepare(gguf, work / "unaligned")),
        "host": (work / "host", lambda: build_host(work, phases, uses_bfloat16)),
    }
    for name in RECIPES:
        jobs[name] = (work / "adapters" / name, partial(build_adapter, work, name, adapter, uses_bfloat16))
    for stage, (target, job) in jobs.items():
        if stage in stages and not target.exists():
            print(f"{stage} -> {target}", flush=True)
            job()
    if "check" in stages:
        check(work)


if __name__ == "__main__":
    main()
