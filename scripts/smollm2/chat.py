"""Chats with a small model: reading prompts, encoding them through the chat template, greedy answers."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Example:
    """One training chat. An incomplete answer was cut off, so its end must not be learned as an end."""

    prompt: str
    answer: str
    is_complete: bool = True


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.partial")  # two adapters may be compared at the same time
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)


def render(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model sees it, up to where the answer begins."""
    chat = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of the rendered prompt; the template writes every special token itself."""
    return list(tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"])


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Stack rows of unequal length into one (N, T) tensor, padded on the given side."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for f, row in zip(fill, rows, strict=True)])


def encode_examples(tokenizer: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and next-token labels, each (N, T), padded on the right; only answer tokens carry a label."""
    ids, labels = [], []
    for example in examples:
        prompt = encode(tokenizer, example.prompt)
        answer = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
        answer += [tokenizer.eos_token_id] * example.is_complete
        ids.append(prompt + answer)
        labels.append([IGNORED] * (len(prompt) - 1) + answer + [IGNORED])
    mask = pad([[1] * len(row) for row in ids], 0, "right")
    return pad(ids, tokenizer.pad_token_id, "right"), mask, pad(labels, IGNORED, "right")


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, batch_size: int = 32
) -> list[tuple[str, bool]]:
    """Greedy answers in the order of the prompts, each with whether the model ended it by itself."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    answers: list[tuple[str, bool]] = [("", False)] * len(rows)
    for picked in batches([len(row) for row in rows], batch_size):
        ids = pad([rows[i] for i in picked], tokenizer.pad_token_id, "left")
        mask = pad([[1] * len(rows[i]) for i in picked], 0, "left")
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        for i, tokens in zip(picked, out[:, ids.shape[1] :].tolist(), strict=True):
            ended = tokenizer.eos_token_id in tokens
            kept = tokens[: tokens.index(tokenizer.eos_token_id)] if ended else tokens
            answers[i] = (tokenizer.decode(kept, skip_special_tokens=True), ended)
    return answers


@torch.inference_mode()
def first_token_log_probs(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Log-probabilities of the first answer token, (N, vocabulary), in the order of the prompts."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    log_probs: list[Tensor] = [torch.empty(0)] * len(rows)
    for picked in batches([len(row) for row in rows], batch_size):
        ids = pad([rows[i] for i in picked], tokenizer.pad_token_id, "right")
        mask = pad([[1] * len(rows[i]) for i in picked], 0, "right")
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (N, T, C)
        last = hidden[torch.arange(len(picked)), mask.sum(1) - 1]  # (N, C)
        for i, row in zip(picked, model.lm_head(last).float().log_softmax(-1), strict=True):
            log_probs[i] = row
    return torch.stack(log_probs)
