"""Tiny random hosts with real tokenizers, and adapters that peft makes on them."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on matrices this small threads only wait for one another

import convolution_host
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from csulora_cli.cli.main import main


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/formats.md from what the tests measure")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GUARD_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPTS = Path(__file__).parent / "data" / "prompts.jsonl"


def make_tokenizer(template: str | None = TEMPLATE, more_words: str = "") -> Any:
    """A word tokenizer that knows the words of the built-in prompts well enough: unknown words hash to a few ids."""
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "User", "Assistant", ":", "?", ".", "'"]
    words += "how do i make a the to of in for my without your an with".split()
    words += "and is can you write explain give me tell".split()
    words += more_words.split()
    words += [f"w{index}" for index in range(64 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
# What each kind of host is: its config class, and what differs from the common sizes.
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "gemma3": ("Gemma3TextConfig", {"tie_word_embeddings": True, "head_dim": 8, "sliding_window": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
    }),
    "gpt-oss": ("GptOssConfig", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 64,
    }),
    "hrm-text": ("HrmTextConfig", {"num_layers_per_stack": 1, "num_hidden_layers": 8, "head_dim": 8}),
    "llava": ("LlavaConfig", {
        "image_token_index": 63, "text_config": {"model_type": "llama"},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 16,
        },
    }),
    "qwen3-vl-moe": ("Qwen3VLMoeConfig", {
        "text_config": {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    }),
    "qwen3.5": ("Qwen3_5Config", {  # transformers also has a class without its vision tower
        "text_config": {
            "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0,
            },
        },
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 8, "num_position_embeddings": 16,
        },
    }),
    "t5": ("T5Config", T5_SIZES),
    "bart": ("BartConfig", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
        "scale_embedding": True, "tie_word_embeddings": True,
    }),
    "longt5": ("LongT5Config", {
        **T5_SIZES, "encoder_attention_type": "transient-global", "local_radius": 4, "global_block_size": 2,
    }),
    "switch": ("SwitchTransformersConfig", {
        **T5_SIZES, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    }),
}  # fmt: skip
ENCODER_DECODERS = ("t5", "bart", "longt5", "switch")
VISION_LANGUAGE = ("llava", "qwen3-vl-moe", "qwen3.5")
AUTO_CLASSES = {
    **dict.fromkeys(VISION_LANGUAGE, "AutoModelForImageTextToText"),
    **dict.fromkeys(ENCODER_DECODERS, "AutoModelForSeq2SeqLM"),
}
FORCED_BOS = {"bart": 1}


def make_host(
    kind: str, folder: Path, seed: int = 0, shard: str = "5GB", template: str | None = TEMPLATE, change: float = 0.0
) -> Path:
    """A tiny random language model of some architecture, saved with its tokenizer.

    With another seed it is an unrelated model; with a change, the same one trained a little.
    """
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common)
    elif kind == "convolution":
        config = convolution_host.config(**common)
    else:
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, **common,
        }  # fmt: skip
        name, own = HOSTS[kind][0], dict(HOSTS[kind][1])
        if kind in VISION_LANGUAGE:
            sizes = {"text_config": {**sizes, **own.pop("text_config")}, "pad_token_id": 0}
        config = getattr(transformers, name)(**{"tie_word_embeddings": False, **sizes, **own})
    model = getattr(transformers, AUTO_CLASSES.get(kind, "AutoModelForCausalLM")).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at constants: move them too
            parameter.add_(0.05 * torch.randn_like(parameter))
        if change:
            for parameter in model.parameters():
                parameter.add_(change * parameter.std(correction=0) * torch.randn_like(parameter))
    model.generation_config.forced_bos_token_id = FORCED_BOS.get(kind)
    model.save_pretrained(folder, max_shard_size=shard)
    if kind == "qwen3-vl-moe":
        _transpose_experts(folder / "model.safetensors")
    make_tokenizer(template).save_pretrained(folder)
    return folder


def _transpose_experts(file: Path) -> None:
    """Experts as (experts, in, out), as such models are published; transformers turns them when it loads them."""
    tensors = load_file(file)
    turned = {name: tensor.mT.contiguous() for name, tensor in tensors.items() if ".experts." in name}
    save_file(tensors | turned, file, metadata={"format": "pt"})


def _last_word_model(kind: str, template: str | None, folder: Path, **options: Any) -> Any:
    """A model without layers: what it gives depends on the last token only, as its output weights say."""
    import transformers

    tokenizer = make_tokenizer(template, more_words="safe unsafe")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 0}
    config = transformers.LlamaConfig(
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes, **options
    )
    model = getattr(transformers, kind).from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(64))
    tokenizer.save_pretrained(folder)
    return model, tokenizer.convert_tokens_to_ids


def make_guard(folder: Path, harmful: str = "w9") -> Path:
    """A causal guard that says "unsafe" after an exchange that ends with a word, else "safe"."""
    model, id_of = _last_word_model("AutoModelForCausalLM", GUARD_TEMPLATE, folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[id_of("safe")] = 1.0
        model.lm_head.weight[id_of("unsafe"), id_of(harmful)] = 2.0
        model.lm_head.weight[id_of("</s>"), id_of(["safe", "unsafe"])] = 3.0
    model.save_pretrained(folder)
    return folder


def make_classifier(folder: Path, labels: tuple[str, ...] = ("harmless", "harmful"), harmful: str = "w9") -> Path:
    """A text classifier that gives the last of its labels to texts that end with a word, else the first."""
    id2label = dict(enumerate(labels))
    model, id_of = _last_word_model("AutoModelForSequenceClassification", TEMPLATE, folder, id2label=id2label)
    with torch.no_grad():
        model.score.weight.zero_()
        model.score.weight[0] = 1.0
        model.score.weight[-1] = -1.0
        model.score.weight[-1, id_of(harmful)] = 2.0
    model.save_pretrained(folder)
    return folder


def make_adapter(host: Path, folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """An adapter that peft makes on a host, with random factors, saved by peft."""
    import peft

    model = oracle.load(host)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": task, **options}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif parameter.requires_grad:  # trained as a whole: weights, biases, rows of an embedding
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped = wrapped.to(dtype)
    wrapped.save_pretrained(folder)
    return folder


class Watcher:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.warnings: list[str] = []
        self.steps = 0

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total))

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def write_prompts(path: Path, per_label: int = 16) -> Path:
    """A small prompts file in words that the tiny tokenizer knows."""
    lines = []
    for index in range(per_label):
        for label, word in (("harmful", "without"), ("benign", "with")):
            text = f"how do i make w{index} {word} w{index + 3} in the w{(7 * index) % 23}"
            lines.append(json.dumps({"prompt": text, "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


def tell_kinds(rows: Iterable[dict[str, Any]], every: int = 2) -> None:
    """Make one of so many benign rows of a prompts file a look-alike, from the first on, and the others general."""
    for index, row in enumerate(row for row in rows if row["label"] == "benign"):
        row["kind"] = "general" if index % every else "lookalike"


def with_kinds(prompts: Path, file: Path, every: int = 2) -> Path:
    """A copy of a prompts file whose benign prompts are of both kinds."""
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    tell_kinds(rows, every)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`hosts("llama")` is the folder of a tiny host; each (kind, seed, …) is made once."""
    made: dict[Any, Path] = {}

    def get(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = make_host(kind, tmp_path_factory.mktemp("hosts") / kind, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prompts file."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of very different lengths, so that every batch has padding."""
    path = tmp_path_factory.mktemp("uneven") / "prompts.jsonl"
    lines = []
    for index in range(16):
        for label, word in (("harmful", "without"), ("benign", "with")):
            tail = " ".join(f"w{(index * step) % 31}" for step in range(1, 2 + (index * 5) % 9))
            lines.append(json.dumps({"prompt": f"explain w{index} {word} {tail}", "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, hosts: Callable[..., Path]) -> Callable[..., Path]:
    """`adapters("llama", r=3)` is the folder of an adapter on that tiny host."""
    made: dict[Any, Path] = {}

    def get(kind: str = "llama", **options: Any) -> Path:
        key = (kind, repr(sorted(options.items())))
        if key not in made:
            made[key] = make_adapter(hosts(kind), tmp_path_factory.mktemp("adapters") / "my-adapter", **options)
        return made[key]

    return get


@dataclass(frozen=True)
class Ran:
    """What one run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("error: ")

    @property
    def hint(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("hint: ")]
        assert len(lines) <= 1, self.err
        return lines[0].removeprefix("hint: ") if lines else ""


@pytest.fixture
def clean_surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variables that change what the command line prints; signal handlers as they were afterwards."""
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "CSULORA_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    formers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in formers:  # in the background one may be ignored
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, former in formers.items():
        signal.signal(number, former)


@pytest.fixture
def csulora(
    clean_surroundings: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """`csulora("fix", …)` runs the command line in this process."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["csulora", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Ran(int(stopped.value.code or 0), captured.out, captured.err)

    return run
