"""Runs in vLLM's environment: greedy answers of adapters with the log-probabilities of all tokens, and refusals.

Question: {"host", "adapters": {name: folder}, "refusals": [[folder, the server's --max-lora-rank], …],
"prompts": [ids, …], "count"}.
Answer: {"answers": {name: [{"tokens", "log_probs"}, …]}, "refusals": [what vLLM says or null, …]}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

RANK = 16  # what `vllm serve` allows without --max-lora-rank


def refusal(folder: str, rank: int) -> str | None:
    """What vLLM's own check of an adapter says."""
    try:
        PEFTHelper.from_local_dir(folder, None).validate_legal(LoRAConfig(max_lora_rank=rank))
    except ValueError as problem:
        return str(problem)
    return None


def answers(question: Any) -> dict[str, list[Any]]:
    """Greedy answers to every prompt with every adapter."""
    count = question["count"]
    engine = LLM(
        model=question["host"], dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=RANK,
        max_model_len=64, max_num_seqs=4, max_logprobs=-1, seed=0,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=count, logprobs=-1, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    found = {}
    for number, (name, folder) in enumerate(question["adapters"].items(), start=1):
        outputs = engine.generate(prompts, greedy, lora_request=LoRARequest(name, number, folder), use_tqdm=False)
        found[name] = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "log_probs": [[step[token].logprob for token in sorted(step)] for step in output.outputs[0].logprobs],
            }
            for output in outputs
        ]
    return found


def main() -> None:
    question = json.loads(Path(sys.argv[1]).read_text())
    refusals = [refusal(folder, rank) for folder, rank in question["refusals"]]
    Path(sys.argv[2]).write_text(json.dumps({"answers": answers(question), "refusals": refusals}))


if __name__ == "__main__":
    main()
