"""Variants of adapters, good ones and kinds that are refused: what `docs/formats.md` lists.

Good ones are what PEFT is asked to make on some tiny host. Refused ones are kinds of adapters, not damaged files: those
are in `test_adapter.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from conftest import make_adapter
from safetensors.torch import load_file, save_file

QV = ["q_proj", "v_proj"]
VELORA = peft.tuners.lora.config.VeloraConfig()
MONTECLORA = peft.tuners.lora.config.MontecloraConfig()
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Variant:
    """One adapter.

    Attributes:
        group: the heading that it stands under.
        host: of `conftest.make_host`.
        options: of `conftest.make_adapter`.
        change: what is done to the saved folder.
    """

    group: str
    host: str
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], None] | None = None


def _variants(group: str, host: str, cases: dict[str, dict[str, Any]], **common: Any) -> dict[str, Variant]:
    return {f"{name} ({host})": Variant(group, host, {**common, **options}) for name, options in cases.items()}


_SELECTION = {
    "one module": {"target_modules": ["q_proj"]},
    "several modules": {"target_modules": [*QV, "down_proj"]},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "excluded by regex": {"target_modules": r".*_proj", "exclude_modules": r".*\.0\..*"},
    "one layer": {"target_modules": QV, "layers_to_transform": 1},
    "a list of layers": {"target_modules": QV, "layers_to_transform": [0, 1]},
    "layers by pattern": {"target_modules": QV, "layers_to_transform": [0], "layers_pattern": "layers"},
    "layers by two patterns": {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "output layer": {"target_modules": ["lm_head"]},
}
_SCALES = {
    "rank 1": {"r": 1},
    "rank 3, alpha 9": {"r": 3, "lora_alpha": 9},
    "rank above the width": {"r": 40, "lora_alpha": 40},
    "alpha a fraction": {"lora_alpha": 2.5},
    "alpha below zero": {"lora_alpha": -4},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, rank 5, alpha 3": {"use_rslora": True, "r": 5, "lora_alpha": 3},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "rank_pattern by regex": {"rank_pattern": {r"layers\.1\..*": 6}},
    "rank_pattern anchored": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 1}},
    "alpha_pattern, two keys fit": {"alpha_pattern": {"layers.0.self_attn.q_proj": 20, "q_proj": 3}},
    "both patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.0\..*": 5}},
    "both patterns, rsLoRA": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 30}},
}
_STORED = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "float8_e5m2": {"dtype": torch.float8_e5m2},
}
_INITS = {
    f"init {name}": {"init_lora_weights": name}
    for name in (False, None, "gaussian", "orthogonal", "mica", "pissa", "olora")
} | {
    "init pissa, rsLoRA, patterns": {
        "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
    "init olora, alpha 9": {"init_lora_weights": "olora", "lora_alpha": 9},
}  # fmt: skip
_EMBEDDINGS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and layers": {"target_modules": ["embed_tokens", *QV]},
    "embedding and output layer": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding, rsLoRA, own rank": {
        "target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "rank_pattern": {"embed_tokens": 7},
    },
    "embedding, own alpha": {"target_modules": ["embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
}  # fmt: skip
_TIED = {
    "tied embedding": {"target_modules": ["embed_tokens"]},
    "tied embedding, trained apart from the output layer": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tied output layer": {"target_modules": ["lm_head", "v_proj"]},
    "ensure_weight_tying without either": {"target_modules": QV, "ensure_weight_tying": True},
}
_KEPT_EQUAL = {
    "kept equal": {"target_modules": ["embed_tokens", "q_proj"]},
    "kept equal, by the output layer": {"target_modules": ["lm_head"]},
    "kept equal, by regex": {"target_modules": r".*(embed_tokens|q_proj)"},
    "kept equal, one layer": {"target_modules": ["embed_tokens", "q_proj"], "layers_to_transform": [1]},
    "kept equal, rsLoRA, own rank": {
        "target_modules": ["embed_tokens"], "use_rslora": True, "rank_pattern": {"embed_tokens": 7},
    },
    "kept equal, own alpha": {"target_modules": ["embed_tokens"], "alpha_pattern": {"lm_head": 3}},
    "kept equal, bfloat16": {"target_modules": ["embed_tokens"], "dtype": torch.bfloat16},
}  # fmt: skip
_CONVOLUTIONS = {
    "convolution": {"target_modules": ["mix"]},
    "convolution, rsLoRA": {"target_modules": ["mix"], "use_rslora": True, "r": 3},
    "convolution, own rank and alpha": {
        "target_modules": ["mix", "out"], "rank_pattern": {"mix": 7}, "alpha_pattern": {"mix": 2},
    },
    "convolution, linear and embedding": {"target_modules": ["mix", "out", "embed"]},
    "convolution with a LoRA bias": {"target_modules": ["mix"], "lora_bias": True},
    "depthwise convolution": {"target_modules": ["depthwise"], "r": 32},
    "convolution with groups": {"target_modules": ["grouped", "mix"], "rank_pattern": {"grouped": 8}},
    "convolution with groups and a LoRA bias": {"target_modules": ["grouped"], "lora_bias": True, "use_rslora": True},
    "convolution that pads with its edges": {"target_modules": ["edges"]},
}  # fmt: skip
_PARAMETERS = {
    "experts, first parameter": {"target_parameters": EXPERTS[:1]},
    "experts, second parameter": {"target_parameters": EXPERTS[1:]},
    "experts, both": {"target_parameters": EXPERTS},
    "experts, other order": {"target_parameters": EXPERTS[::-1]},
    "experts and layers": {"target_modules": QV, "target_parameters": EXPERTS},
    "experts, rsLoRA": {"target_parameters": EXPERTS, "use_rslora": True},
    "experts, own rank and alpha": {
        "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 6}, "alpha_pattern": {"gate_up_proj": 3},
    },
}  # fmt: skip
_REPEATED = {
    "layers repeated": {"layer_replication": [[0, 2], [1, 2], [0, 1]]},
    "layers repeated, in parts": {"layer_replication": [[0, 2], [0, 2]], "layers_to_transform": [1, 2]},
    "fewer layers": {"layer_replication": [[1, 2]]},
    "layers repeated, DoRA": {"layer_replication": [[0, 2], [1, 2]], "use_dora": True},
    "layers repeated, norms": {"layer_replication": [[0, 2], [1, 2]], "modules_to_save": ["norm"]},
}
_CARRIED = {
    "modules_to_save, output layer": {"modules_to_save": ["lm_head"]},
    "modules_to_save, embedding": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save, norms": {"modules_to_save": ["norm"]},
    "trained tokens": {"trainable_token_indices": [3, 5, 40]},
    "trained tokens by module": {"trainable_token_indices": {"embed_tokens": [7]}},
    "trained tokens and lm_head": {"trainable_token_indices": [3], "modules_to_save": ["lm_head"]},
    "VeLoRA": {"velora_config": VELORA},
    "MonteCLoRA": {"monteclora_config": MONTECLORA},
}
_BLOCKS = {
    "BD-LoRA, blocks in A": {"target_modules_bd_a": QV},
    "BD-LoRA, blocks in B": {"target_modules_bd_b": QV},
    "BD-LoRA, blocks in both": {"target_modules_bd_a": ["v_proj"], "target_modules_bd_b": ["q_proj"]},
}
_DORA = {
    "DoRA": {},
    "DoRA, rsLoRA, own rank": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "DoRA in bfloat16": {"dtype": torch.bfloat16},
}
_BIASES = {
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "LoRA biases": {"lora_bias": True},
    "LoRA biases, rsLoRA": {"lora_bias": True, "use_rslora": True},
}
_ROUTERS = {
    "mixtral": {"router": {"target_parameters": ["mlp.gate.weight"]}},
    "qwen3-moe": {"router and experts": {"target_parameters": ["mlp.gate.weight", *EXPERTS]}},
    "gpt-oss": {"router": {"target_parameters": ["mlp.router.weight"]}},
}


def changing(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Puts other tensors in the place of those of a saved adapter, by their names, or leaves them out."""

    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        changed = {key: change(key, tensor) for key, tensor in load_file(path).items()}
        save_file({key: tensor for key, tensor in changed.items() if tensor is not None}, path)

    return rewrite


GOOD: dict[str, Variant] = {
    **_variants("Linear layers: which", "llama", _SELECTION),
    **_variants("Linear layers: rank and scale", "llama", _SCALES, target_modules=QV),
    **_variants("Linear layers: how stored", "llama", _STORED, target_modules=QV),
    **_variants("Linear layers: how begun", "llama", _INITS, target_modules=QV),
    **_variants("Other hosts", "qwen2", {"all-linear": {}, "rsLoRA": {"use_rslora": True}}),
    **_variants("Other hosts", "gemma3", {"all-linear": {}, "alpha_pattern": {"alpha_pattern": {"q_proj": 1}}}),
    **_variants("Other hosts", "gpt2", {
        "Conv1D": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        "Conv1D, init pissa": {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"},
        "Conv1D, rank_pattern": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {r"h\.1.*": 2}},
        "Conv1D and embedding": {"target_modules": ["c_attn", "wte"]},
        "output layer": {"target_modules": ["lm_head", "c_attn"]},
    }),
    **_variants("Other hosts", "mixtral", {"attention": {"target_modules": QV}}),
    **_variants("Encoder-decoder hosts", "t5", {
        "q and v": {"target_modules": ["q", "v"]},
        "all-linear": {},
        "encoder alone": {"target_modules": r"encoder\..*\.(q|wi)"},
        "decoder alone": {"target_modules": r"decoder\..*\.(q|wo)"},
        "cross-attention alone": {"target_modules": r".*\.EncDecAttention\.(q|k|v|o)"},
        "a rank that fits both sides": {"target_modules": ["q"], "rank_pattern": {"layer.0.SelfAttention.q": 2}},
        "embeddings": {"target_modules": ["embed_tokens", "k"]},
        "output layer": {"target_modules": ["lm_head", "wo"]},
        "DoRA": {"target_modules": ["q", "v"], "use_dora": True},
        "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    }),
    **_variants("Encoder-decoder hosts", "bart", {
        "q and v": {"target_modules": QV},
        "all-linear": {},
        "rsLoRA, own rank": {"target_modules": [*QV, "fc1"], "use_rslora": True, "rank_pattern": {"fc1": 7}},
        "LoRA biases": {"target_modules": QV, "lora_bias": True},
        "scaled embeddings": {"target_modules": ["embed_tokens"]},
        "tied output layer": {"target_modules": ["lm_head", "k_proj"]},
    }),
    **_variants("Encoder-decoder hosts", "longt5", {"what reads tokens alone": {"target_modules": ["q", "o"]}}),
    **_variants("Encoder-decoder hosts", "switch", {"attention and router": {"target_modules": ["v", "classifier"]}}),
    **_variants("Vision-language hosts", "llava", {
        "language model by regex": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
        "names that both towers have": {"target_modules": ["gate_proj", "up_proj"]},
        "output layer": {"target_modules": ["lm_head", "o_proj"]},
        "towers excluded": {"target_modules": QV, "exclude_modules": r".*vision_tower.*"},
        "embedding": {"target_modules": ["embed_tokens"]},
    }),
    **_variants("Vision-language hosts", "qwen3.5", {
        "language model by regex": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
        "output layer": {"target_modules": ["lm_head", "o_proj"]},
    }),
    **_variants("Embeddings and output layers", "llama", _EMBEDDINGS),
    **_variants("Embeddings and output layers", "llama-tied", _TIED),
    **_variants("Embeddings and output layers", "llama-tied", _KEPT_EQUAL, ensure_weight_tying=True),
    "kept equal, but different in the file (llama-tied)": Variant(
        "Embeddings and output layers", "llama-tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        changing(lambda key, tensor: tensor * 3 if "lm_head.lora" in key else tensor),
    ),
    **_variants("Embeddings and output layers", "gemma3", {"scaled embedding": {"target_modules": ["embed_tokens"]}}),
    **_variants("Convolutions", "convolution", _CONVOLUTIONS),
    **_variants("Parameters", "mixtral", _PARAMETERS, target_modules=[]),
    **_variants("Parameters", "qwen3-moe", {"experts, both": _PARAMETERS["experts, both"]}, target_modules=[]),
    **_variants("Parameters", "gpt-oss", {
        name: _PARAMETERS[name] for name in ("experts, first parameter", "experts, both", "experts, own rank and alpha")
    }, target_modules=[]),
    **{name: variant for host, cases in _ROUTERS.items()
       for name, variant in _variants("Parameters", host, cases, target_modules=[]).items()},
    **_variants("Repeated layers", "llama", _REPEATED, target_modules=QV),
    **_variants("Repeated layers", "mixtral", {"layers repeated, experts": {
        "target_modules": [], "target_parameters": EXPERTS, "layer_replication": [[0, 2], [1, 2]],
    }}),
    **_variants("DoRA", "llama", _DORA, target_modules=QV, use_dora=True),
    **_variants("DoRA", "qwen2", {"DoRA beside biases": {"target_modules": QV, "use_dora": True}}),
    **_variants("DoRA", "gpt2", {"DoRA on Conv1D": {"target_modules": ["c_attn", "c_fc"], "use_dora": True}}),
    **_variants("Carried along", "llama", _CARRIED, target_modules=QV),
    **_variants("Carried along", "llama-tied", {
        "trained tokens, tied": {"trainable_token_indices": [3, 9]},
        "modules_to_save, tied embedding": {"modules_to_save": ["embed_tokens"]},
        "modules_to_save, both ends tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    }, target_modules=QV),
    **_variants("Carried along", "qwen2", _BIASES, target_modules=QV),
    **{name: variant for case, blocks in _BLOCKS.items() for name, variant in _variants(
        "Rewritten as plain LoRA", "llama",
        {case: {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(**blocks, nblocks=2)}}, target_modules=QV).items()},
}  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """One kind of adapter that is refused.

    Attributes:
        message: what the refusal says.
        host: of `conftest.make_host`.
        options: of `conftest.make_adapter`.
        config: what is written into the saved config.
        rename: how keys of the saved file are changed.
    """

    message: str
    host: str = "llama"
    options: dict[str, Any] = field(default_factory=lambda: {"target_modules": QV})
    config: dict[str, Any] = field(default_factory=dict)
    rename: Callable[[str], str] = str

    def make(self, host: Path, folder: Path) -> Path:
        """Write it."""
        make_adapter(host, folder, **self.options)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | self.config))
        weights = folder / "adapter_model.safetensors"
        save_file({self.rename(key): tensor for key, tensor in load_file(weights).items()}, weights)
        return folder


REFUSED: dict[str, Refused] = {
    "aLoRA": Refused("aLoRA", config={"alora_invocation_tokens": [5, 6]}),
    "Arrow": Refused("Arrow", config={"arrow_config": {"arrow_top_k": 2}}),
    "KaSA": Refused("KaSA", config={"kasa_config": {"beta": 1e-4}}),
    "KaSA, by its tensors": Refused("KaSA", rename=lambda key: key.replace("lora_A.weight", "lora_diag")),
    "QALoRA": Refused("QALoRA", config={"use_qalora": True, "qalora_group_size": 16}),
    "repeated layers that the host lacks": Refused("the host has 2 layers", config={"layer_replication": [[0, 3]]}),
    "repeated layers, no ranges": Refused("layer_replication", config={"layer_replication": [[0, -1]]}),
    "repeated layers of types": Refused("gives each layer a type", "qwen2", config={"layer_replication": [[0, 2]]}),
    "repeated layers where PEFT finds none": Refused(
        "no list of layers", "gpt2", {"target_modules": ["c_attn"]}, config={"layer_replication": [[0, 2]]}
    ),
    "repeated layers and init pissa": Refused(
        "repeats layers", options={"target_modules": QV, "init_lora_weights": "pissa"},
        config={"layer_replication": [[0, 2]]},
    ),
    "Megatron": Refused("Megatron", config={"megatron_config": {"hidden_size": 8}}),
    "init corda": Refused('base: init_lora_weights = "corda"', config={"init_lora_weights": "corda"}),
    "init loftq": Refused('base: init_lora_weights = "loftq"', config={"init_lora_weights": "loftq"}),
    "init lora_ga": Refused('base: init_lora_weights = "lora_ga"', config={"init_lora_weights": "lora_ga"}),
    "init pissa_niter": Refused(
        'base: init_lora_weights = "pissa_niter_4"', config={"init_lora_weights": "pissa_niter_4"}
    ),
    "init pissa, scale below zero": Refused("scale of -2", config={"init_lora_weights": "pissa", "lora_alpha": -8}),
    "init pissa on an embedding": Refused(
        "no linear layer", options={"target_modules": ["embed_tokens"]}, config={"init_lora_weights": "pissa"}
    ),
    "DoRA on an embedding": Refused("DoRA", options={"target_modules": ["embed_tokens"], "use_dora": True}),
    "DoRA on a convolution": Refused("DoRA", "convolution", {"target_modules": ["mix"], "use_dora": True}),
    "tied output layer, excluded": Refused(
        "exclude_modules", "llama-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        config={"exclude_modules": ["lm_head"]},
    ),
    "convolution with dilation": Refused("dilation", "convolution", {"target_modules": ["wide"]}),
    "convolution of other groups": Refused(
        "a convolution of 4 groups", "convolution", {"target_modules": ["mix"]},
        rename=lambda key: key.replace("mix", "grouped"), config={"target_modules": ["grouped"]},
    ),
    "updates of a vision tower": Refused("adapted modules run on none of 8 text prompts", "llava"),
    "a convolution over images": Refused(
        "1 of 3 adapted modules run on none of 8 text prompts: model.vision_tower.embeddings.patch_embedding", "llava",
        {"target_modules": r".*patch_embedding|.*language_model.*q_proj"},
    ),
    "a parameter whose memory another layer shares": Refused(
        "how 'model.embed_tokens.weight' is multiplied cannot be seen", "llama-tied",
        {"target_modules": ["v_proj"], "target_parameters": ["embed_tokens.weight"]},
    ),
    "encoder-decoder, a parameter": Refused(
        "is a parameter of an encoder-decoder model", "t5", {"target_modules": [], "target_parameters": ["wi.weight"]}
    ),
    "encoder-decoder, experts": Refused(
        "what it reads of which token cannot be told", "switch", {"target_modules": r"encoder\..*experts.*\.wi"}
    ),
    "encoder-decoder, keys of tokens and of blocks": Refused("cannot be told", "longt5", {"target_modules": ["k"]}),
    "encoder-decoder, distances of tokens": Refused(
        "reads an input of shape", "t5", {"target_modules": ["relative_attention_bias"]}
    ),
    "encoder-decoder, positions": Refused(
        "is an embedding of something else", "bart", {"target_modules": r".*decoder\.embed_positions"}
    ),
    "encoder-decoder, an embedding called with no ids": Refused(
        "not called with numbers of rows", "bart", {"target_modules": r".*encoder\.embed_positions"}
    ),
    "encoder-decoder, the shared table itself": Refused("run on none", "t5", {"target_modules": ["shared"]}),
    "other kinds of PEFT": Refused('not "LORA"', config={"peft_type": "LOHA"}),
    "a field of a newer PEFT that is on": Refused("unknown field use_new_idea", config={"use_new_idea": True}),
    "modules that the config does not target": Refused("does not target", config={"target_modules": ["q_proj"]}),
    "experts, one by one": Refused(
        "not in the host", "mixtral", config={"target_modules": ["w1", "v_proj"]},
        rename=lambda key: key.replace("self_attn.q_proj", "block_sparse_moe.experts.9.w1"),
    ),
    "experts of which one parameter is missing": Refused(
        "targets 2 parameters", "mixtral", {"target_modules": [], "target_parameters": EXPERTS[:1]},
        config={"target_parameters": EXPERTS},
    ),
    "factors under another name": Refused("no LoRA factors", rename=lambda key: key.replace("lora_", "lokr_")),
}  # fmt: skip
