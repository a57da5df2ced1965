"""Runs in llama.cpp's environment: greedy answers of adapters with the log-probabilities of all tokens.

Question: {"host": GGUF file, "adapters": {name: GGUF file}, "prompts": [ids, …], "count"}.
Answer: {"answers": {name: [{"tokens", "log_probs"}, …]}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

FLOAT32 = 0  # ggml's number of the type


def answer(model: Llama, prompt: list[int], count: int) -> Any:
    """One greedy answer."""
    model.reset()
    model.eval(prompt)
    tokens, rows = [], []
    for _ in range(count):
        logits = np.array(model.scores[model.n_tokens - 1], dtype=np.float64)
        shifted = logits - logits.max()
        rows.append((shifted - np.log(np.exp(shifted).sum())).tolist())
        tokens.append(int(logits.argmax()))
        model.eval(tokens[-1:])
    return {"tokens": tokens, "log_probs": rows}


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, file in question["adapters"].items():
        model = Llama(
            question["host"], lora_path=file, logits_all=True, n_ctx=64, n_threads=1, n_threads_batch=1,
            type_k=FLOAT32, type_v=FLOAT32, verbose=False,
        )  # fmt: skip
        found[name] = [answer(model, prompt, question["count"]) for prompt in question["prompts"]]
    Path(sys.argv[2]).write_text(json.dumps({"answers": found}))


if __name__ == "__main__":
    main()
