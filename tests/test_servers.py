"""What csulora writes, in vLLM and in llama.cpp, against PEFT: `scripts/test -m servers`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest
import gguf
import numpy as np
import oracle
import pytest
import safetensors.torch
import server_tools
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor

from csulora_cli.api import fix_adapter
from csulora_cli.settings import FixSettings, Geometry, RankMode

# Installing vLLM takes minutes, compiling llama.cpp up to half an hour; after that the job takes minutes.
pytestmark = [pytest.mark.servers, pytest.mark.timeout(7200)]

# vLLM wants heads of 32 numbers or more, and llama.cpp's converter a vocabulary that holds every byte.
HEADS, KEY_HEADS = 4, 2
SIZES = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")

# Scales differ from 1 and 2, where a rank that grows without its alpha would go unseen.
PLAIN = {"r": 4, "lora_alpha": 12}
PATTERNS = {**PLAIN, "use_rslora": True, "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 20}}
KEEP_IN = {"geometry": Geometry.KEEP_IN, "strength": 3.0}
PROMPTS, KEEP, EXACT, PATTERNS_KEPT, PATTERNS_EXACT = "prompts", "keep", "exact", "patterns kept", "patterns exact"
REPAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the adapter's options, the repair's
    PROMPTS: (PLAIN, {"strength": 3.0}),
    KEEP: (PLAIN, {**KEEP_IN, "rank": RankMode.KEEP}),
    EXACT: (PLAIN, {**KEEP_IN, "rank": RankMode.EXACT}),
    PATTERNS_KEPT: (PATTERNS, {"strength": 3.0}),
    PATTERNS_EXACT: (PATTERNS, {**KEEP_IN, "rank": RankMode.EXACT}),
}
TOKENS = [[1, 72, 104, 260, 270, 261], [1, 285, 5, 181], [1, 100, 101, 262, 280, 281, 279, 263]]
COUNT = 4  # tokens of an answer
ERROR = 5e-4  # all compute in float32; the largest difference seen is 1.2e-4


@dataclass(frozen=True)
class Served:
    """A host and what csulora wrote for it, by name, with the adapters that it was given."""

    host: Path
    repaired: Mapping[str, Path]
    given: Mapping[str, Path]


def byte_tokenizer() -> Any:
    """A tokenizer of letters and bytes in Llama's manner."""
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = conftest.TEMPLATE
    return fast


def make_llama(folder: Path, seed: int) -> Path:
    """A tiny Llama that both servers take."""
    import transformers

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **ends, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Served:
    folder = tmp_path_factory.mktemp("served")
    host, unaligned = make_llama(folder / "host", seed=0), make_llama(folder / "unaligned", seed=1)
    repaired, given = {}, {}
    for name, (options, repair) in REPAIRS.items():
        given[name] = conftest.make_adapter(host, folder / f"{name} given", **options)
        source = {"unaligned": str(unaligned)} if "geometry" in repair else {"prompts": prompts}
        repaired[name] = folder / name
        fix_adapter(FixSettings(adapter=str(given[name]), base=str(host), out=repaired[name], **repair, **source))
    return Served(host, repaired, given)


def found_log_probs(answers: Sequence[Any]) -> Tensor:
    """What a server said, (prompts, COUNT, vocabulary)."""
    return torch.tensor([answer["log_probs"] for answer in answers], dtype=torch.float64)


def peft_log_probs(host: Path, adapter: Path, answers: Sequence[Any]) -> Tensor:
    """What PEFT says at every token of a server's answers, (prompts, COUNT, vocabulary)."""
    model = oracle.with_adapter(host, adapter)
    rows = []
    for prompt, answer in zip(TOKENS, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer["tokens"]]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.double().log_softmax(-1))
    return torch.stack(rows)


def largest_gap(host: Path, adapter: Path, answers: Sequence[Any]) -> float:
    """The largest difference between a server's log-probabilities and PEFT's."""
    found, wanted = found_log_probs(answers), peft_log_probs(host, adapter, answers)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max())


def assert_answers_of_peft(served: Served, name: str, answers: Sequence[Any]) -> None:
    """The repaired adapter is what was served, and not the one that was given: same greedy tokens, same numbers."""
    wanted = peft_log_probs(served.host, served.repaired[name], answers)
    assert [answer["tokens"] for answer in answers] == wanted.argmax(-1).tolist()
    assert largest_gap(served.host, served.repaired[name], answers) < ERROR
    assert largest_gap(served.host, served.given[name], answers) > 1000 * ERROR


def config(adapter: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return loaded


def test_the_rank_grows_where_it_is_said_to(served: Served) -> None:
    ranks = {name: (config(folder)["r"], config(folder)["lora_alpha"]) for name, folder in served.repaired.items()}
    kept = (PLAIN["r"], PLAIN["lora_alpha"])
    assert ranks == {PROMPTS: kept, KEEP: kept, EXACT: (16, 16), PATTERNS_KEPT: kept, PATTERNS_EXACT: (16, 16)}


@pytest.fixture(scope="module")
def vllm(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What vLLM answers with each repaired adapter, and what it says of others."""
    folder = tmp_path_factory.mktemp("vllm")
    python = server_tools.vllm()
    return server_tools.ask(
        python,
        "serve_vllm.py",
        {
            "host": str(served.host),
            "adapters": {name: str(path) for name, path in served.repaired.items()},
            "refusals": refusals(served, folder),
            "prompts": TOKENS,
            "count": COUNT,
        },
        folder,
    )


def refusals(served: Served, folder: Path) -> list[tuple[str, int]]:
    """Adapters for vLLM's own check, with the largest rank that the server allows."""
    host = served.host
    wide = conftest.make_adapter(host, folder / "wide", r=9, lora_alpha=27)
    full = conftest.make_adapter(host, folder / "full", **PLAIN, target_modules=["q_proj"], modules_to_save=["lm_head"])
    out = {}
    for name, adapter, rank in (("wide", wide, RankMode.EXACT), ("full", full, RankMode.KEEP)):
        out[name] = str(folder / f"{name} repaired")
        settings = FixSettings(
            adapter=str(adapter), base=str(host), unaligned=str(host.with_name("unaligned")), out=Path(out[name]),
            rank=rank, **KEEP_IN,
        )  # fmt: skip
        fix_adapter(settings)
    return [(out["wide"], 16), (out["wide"], 32), (out["full"], 16)]


@pytest.mark.parametrize("name", REPAIRS)
def test_vllm_gives_the_log_probabilities_of_peft(name: str, served: Served, vllm: Any) -> None:
    assert_answers_of_peft(served, name, vllm["answers"][name])


def test_vllm_refuses_wide_adapters_without_its_flag_and_full_weights(vllm: Any) -> None:
    too_wide, allowed, full = vllm["refusals"]
    assert "LoRA rank 32 is greater than max_lora_rank 16" in too_wide
    assert allowed is None
    assert "modules_to_save" in full


def convert(script: str, *arguments: object) -> None:
    """Run one of llama.cpp's converters, to float32."""
    sources = server_tools.llama_cpp_sources()
    python = server_tools.llama_cpp_converter()
    server_tools.run([python, sources / script, *arguments, "--outtype", "f32"], {"HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def converted(served: Served, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every repaired adapter as GGUF."""
    folder = tmp_path_factory.mktemp("gguf")
    files = {}
    for name, adapter in served.repaired.items():
        files[name] = folder / f"{name}.gguf"
        convert("convert_lora_to_gguf.py", adapter, "--base", served.host, "--outfile", files[name])
    return files


def rotated_rows(module: str, lora_b: np.ndarray) -> np.ndarray:
    """B with the rows of queries and keys in llama.cpp's order: the two halves of a head by turns."""
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(module.rpartition(".")[2])
    if heads is None:
        return lora_b
    halves = lora_b.reshape(heads, 2, -1, lora_b.shape[1])  # (heads, halves, half a head, r)
    return halves.swapaxes(1, 2).reshape(lora_b.shape)


@pytest.mark.parametrize("name", REPAIRS)
def test_llama_cpp_converts_every_factor_unchanged(name: str, served: Served, converted: Mapping[str, Path]) -> None:
    reader = gguf.GGUFReader(converted[name])
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = safetensors.torch.load_file(served.repaired[name] / "adapter_model.safetensors")
    assert reader.fields["adapter.lora.alpha"].contents() == config(served.repaired[name])["lora_alpha"]
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        assert match, key
        layer, module, factor = match.groups()
        wanted = rotated_rows(module, tensor.numpy()) if factor == "B" else tensor.numpy()
        name_there = f"blk.{layer}.{GGUF_NAMES[module]}.weight.lora_{factor.lower()}"
        np.testing.assert_array_equal(found.pop(name_there), wanted)
    assert not found


@pytest.fixture(scope="module")
def llama_cpp(served: Served, converted: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What llama.cpp answers with each repaired adapter."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    python = server_tools.llama_cpp()
    host = folder / "host.gguf"
    convert("convert_hf_to_gguf.py", served.host, "--outfile", host)
    adapters = {name: str(file) for name, file in converted.items()}
    question = {"host": str(host), "adapters": adapters, "prompts": TOKENS, "count": COUNT}
    return server_tools.ask(python, "serve_llama_cpp.py", question, folder)["answers"]


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != PATTERNS_KEPT])
def test_llama_cpp_gives_the_log_probabilities_of_peft(name: str, served: Served, llama_cpp: Any) -> None:
    assert_answers_of_peft(served, name, llama_cpp[name])


def test_llama_cpp_ignores_rslora_and_alpha_pattern_of_a_kept_layout(served: Served, llama_cpp: Any) -> None:
    """So says the README; where this fails, llama.cpp has learnt it."""
    assert largest_gap(served.host, served.repaired[PATTERNS_KEPT], llama_cpp[PATTERNS_KEPT]) > 1000 * ERROR
