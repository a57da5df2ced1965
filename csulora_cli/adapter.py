"""Read a LoRA adapter folder: config, factors, and the exact rank, alpha and scale of every module.

Nothing is ever unpickled, and `adapter_config.json` is read as plain JSON: PEFT's own config class imports optional
packages and forgives unknown fields. What an adapter may hold beyond plain LoRA factors is refused by name.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csulora_cli.errors import AdapterError, UnsupportedError
from csulora_cli.files import MAX_JSON_BYTES, leaves_folder, parse_json_object, read_bytes
from csulora_cli.patterns import time_limit, value_for
from csulora_cli.solver.lowrank import squared_norm
from csulora_cli.tensorfile import read_tensor_file
from csulora_cli.text import number, printable, some

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_RANK = 2**16

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<letter>[AB])\.weight", re.DOTALL)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Fields of LoraConfig (PEFT 0.21) that change the update or add tensors, with the name that users know them by.
_UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA",
    "target_parameters": "LoRA on raw parameters (target_parameters)",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "lora_bias": "LoRA biases (lora_bias)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "megatron_config": "Megatron layers",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}
# Fields that do not touch the update of a saved adapter (how it was made, what it was made for, what selects modules).
_HARMLESS_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# What else the fields that are read may be; null is what PEFT writes for "not set".
_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "rank_pattern": (dict,), "alpha_pattern": (dict,), "use_rslora": (bool,), "fan_in_fan_out": (bool,),
    "target_modules": (str, list), "exclude_modules": (str, list),
}  # fmt: skip
_JSON_NAMES = {dict: "an object", bool: "true or false", str: "text", list: "a list"}
_PLAIN_INITS = {True, False, "gaussian", "eva", "orthogonal", "mica"}
_EXTRA_TENSORS = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_A": "LoRA on embeddings",
    ".lora_embedding_B": "LoRA on embeddings",
    ".lora_B.bias": "LoRA biases (lora_bias)",
    ".lora_diag": "KaSA",
    ".trainable_tokens": "trainable tokens",
    ".lora_velora": "VeLoRA",
    ".lora_monteclora": "MonteCLoRA",
    ".lora_A.default.weight": "keys of an old PEFT (.default.)",
    ".lora_B.default.weight": "keys of an old PEFT (.default.)",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: its factors as stored, and what multiplies them.

    Attributes:
        name: the module's name in the host.
        lora_a: A, (r, in), in the stored dtype.
        lora_b: B, (out, r), in the stored dtype.
        alpha: lora_alpha of this module, after alpha_pattern.
        scale: s = alpha/r, or alpha/sqrt(r) with rsLoRA; the update is s·B·A.
    """

    name: str
    lora_a: Tensor
    lora_b: Tensor
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return self.lora_a.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the module's input."""
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the module's output."""
        return self.lora_b.shape[0]

    @property
    def key_a(self) -> str:
        """The tensor name of A in the file."""
        return f"{_PREFIX}{self.name}.lora_A.weight"

    @property
    def key_b(self) -> str:
        """The tensor name of B in the file."""
        return f"{_PREFIX}{self.name}.lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as read from its folder.

    Attributes:
        folder: where it lies.
        config: `adapter_config.json` as parsed, nothing added or left out.
        modules: sorted by name.
        sha256: hexadecimal digests of the two files that were read, by file name.
    """

    folder: Path
    config: dict[str, Any]
    modules: tuple[LoraModule, ...]
    sha256: Mapping[str, str]

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`, or None. Untrusted text."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes, without the `torch.` in front."""
        return sorted({str(t.dtype).removeprefix("torch.") for m in self.modules for t in (m.lora_a, m.lora_b)})

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({module.rank for module in self.modules})


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder and check everything that can be checked without the host.

    Raises:
        AdapterError: a file is missing, unreadable, malformed, or holds values that are no adapter.
        UnsupportedError: the adapter uses a feature that is not repaired.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        _check_link(folder / name)
    if not os.path.lexists(folder / CONFIG_NAME):
        raise AdapterError(f"{CONFIG_NAME} is missing in {printable(folder)}", _FOLDER_HINT)
    config_bytes = read_bytes(folder / CONFIG_NAME, AdapterError, MAX_JSON_BYTES)
    config = parse_json_object(config_bytes, folder / CONFIG_NAME, AdapterError)
    with naming(CONFIG_NAME), time_limit():
        _check_fields(config)
    if not os.path.lexists(folder / WEIGHTS_NAME):
        _raise_no_weights(folder)
    weights = read_tensor_file(folder / WEIGHTS_NAME, AdapterError)
    with naming(WEIGHTS_NAME), time_limit():
        modules = modules_from(config, weights.tensors)
    return Adapter(folder, config, modules, {CONFIG_NAME: _digest(config_bytes), WEIGHTS_NAME: weights.sha256})


def _check_link(path: Path) -> None:
    if leaves_folder(path):
        raise AdapterError(
            f"{printable(path)} is a link that leaves the folder",
            "Put a copy of the file there: a downloaded link could name any file of this machine.",
        )


def _check_size(name: str, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    """Where ‖s·B·A‖_F fits the stored dtype, no entry of the update and no norm of it overflows."""
    largest = min(torch.finfo(tensor.dtype).max for tensor in (lora_a, lora_b))
    norm = abs(scale) * math.sqrt(squared_norm(lora_b, lora_a))
    if not norm <= largest:
        raise AdapterError(
            f"the update of '{printable(name)}', lora_B times lora_A, overflows (norm {norm:.1g})",
            "Training diverged or the file is damaged: use another checkpoint.",
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the file that was read in front of refusals that name none."""
    try:
        yield
    except AdapterError as problem:
        if CONFIG_NAME in problem.message or WEIGHTS_NAME in problem.message:
            raise
        raise type(problem)(f"{name}: {problem.message}", problem.hint) from None


def modules_from(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoraModule, ...]:
    """Pair the factors and give each module its scale, as PEFT does.

    Raises:
        AdapterError: unpaired or ill-shaped factors, wrong rank, NaN or Inf.
        UnsupportedError: a tensor that is no plain LoRA factor.
    """
    if not tensors:
        raise AdapterError(
            f"{WEIGHTS_NAME} holds no tensors",
            "Save the adapter again; ZeRO-3 training needs stage3_gather_16bit_weights_on_model_save.",
        )
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise _unknown_tensor(key)
        factors.setdefault(match["module"], {})[match["letter"]] = tensor
    return tuple(_module(config, name, factors[name]) for name in sorted(factors))


def _module(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor]) -> LoraModule:
    for letter in "AB":
        if letter not in pair:
            raise AdapterError(
                f"module '{printable(name)}' has no lora_{letter}", "Save or download the adapter again."
            )
    lora_a, lora_b = pair["A"], pair["B"]
    for letter, tensor in pair.items():
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(
                f"lora_{letter} of '{printable(name)}' is stored as {str(tensor.dtype).removeprefix('torch.')}",
                "csulora repairs float32, float16 and bfloat16 adapters.",
            )
        if tensor.ndim in (3, 4, 5):
            raise UnsupportedError(
                f"lora_{letter} of '{printable(name)}' has {tensor.ndim} dimensions: LoRA on a convolution",
                "csulora repairs LoRA on Linear and Conv1D modules.",
            )
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterError(
                f"lora_{letter} of '{printable(name)}' has shape {printable(tuple(tensor.shape), 60)}, "
                "not two sizes above zero",
                "A sharded training run may have saved an unfinished adapter; save it again.",
            )
    rank = value_for(config.get("rank_pattern") or {}, name, config.get("r", 8), "rank_pattern")
    if lora_a.shape[0] != lora_b.shape[1] or lora_a.shape[0] != rank:
        raise AdapterError(
            f"module '{printable(name)}' should have rank {rank} by {CONFIG_NAME}, but lora_A is "
            f"{tuple(lora_a.shape)} and lora_B is {tuple(lora_b.shape)}",
            "The config and the weights do not belong together; download both again.",
        )
    for letter, tensor in pair.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"lora_{letter} of '{printable(name)}' holds NaN or Inf",
                "Training diverged or the file is damaged: use another checkpoint.",
            )
    alpha = value_for(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8), "alpha_pattern")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    _check_size(name, lora_a, lora_b, scale)
    return LoraModule(name, lora_a, lora_b, float(alpha), scale)


def _check_fields(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f'{CONFIG_NAME} says peft_type {printable(json.dumps(kind))}, not "LORA"',
            "csulora repairs LoRA adapters in PEFT format.",
        )
    for field, feature in _UNSUPPORTED_FIELDS.items():
        if config.get(field) not in (None, False, [], {}):
            raise UnsupportedError(f"the adapter uses {feature}: {_shown(config, field)}", _UNSUPPORTED_HINT)
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"the adapter carries trained biases: {_shown(config, 'bias')}", _UNSUPPORTED_HINT)
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or init not in _PLAIN_INITS:
        raise UnsupportedError(
            f"the adapter was trained on a modified base: {_shown(config, 'init_lora_weights')}",
            "Convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion).",
        )
    for field, value in config.items():
        if field not in _HARMLESS_FIELDS and field not in _UNSUPPORTED_FIELDS and value not in (None, False, [], {}):
            raise UnsupportedError(
                f"{CONFIG_NAME} has the unknown field {_shown(config, field)}",
                "It may change what the adapter does. Remove it if you know that it does not.",
            )
    _check_number(config, "r", config.get("r", 8), is_rank=True)
    _check_number(config, "lora_alpha", config.get("lora_alpha", 8), is_rank=False)
    for field, types in _FIELD_TYPES.items():
        if not isinstance(config.get(field), (*types, type(None))):
            names = " or ".join(_JSON_NAMES[kind] for kind in types)
            raise AdapterError(f"in {CONFIG_NAME} {_shown(config, field)} is not {names}", _CORRECT_HINT)
    for field, is_rank in (("rank_pattern", True), ("alpha_pattern", False)):
        for key, value in (config.get(field) or {}).items():
            _check_number(config, f"{field}['{printable(key)}']", value, is_rank=is_rank)


def _check_number(config: Mapping[str, Any], field: str, value: Any, *, is_rank: bool) -> None:
    if is_rank:
        is_good = type(value) is int and 0 < value <= MAX_RANK
        wanted = f"a whole number from 1 to {MAX_RANK}"
    else:
        is_good = type(value) in (int, float) and abs(value) <= 1e9 and math.isfinite(value)
        wanted = "a number"
    if not is_good:
        raise AdapterError(f"{field} in {CONFIG_NAME} is {printable(json.dumps(value))}, not {wanted}", _CORRECT_HINT)


def _shown(config: Mapping[str, Any], field: str) -> str:
    value = json.dumps(config[field])
    return f"{printable(field)} = {printable(value, 60)}"


_FOLDER_HINT = f"An adapter folder holds {CONFIG_NAME} and {WEIGHTS_NAME}, each in one piece."
_CORRECT_HINT = "Correct the config, or download the adapter again."
_UNSUPPORTED_HINT = "csulora repairs plain LoRA on Linear and Conv1D modules; nothing was written."


def _raise_no_weights(folder: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_ENDINGS)]:
        raise AdapterError(
            f"{printable(folder)} has only {some(pickles, 2)}, a pickle, which can run code when it is opened",
            "Convert it on a machine you can lose: load it in PEFT and call "
            "save_pretrained(..., safe_serialization=True).",
        )
    others = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    found = f"; there is {some(others, 2)}" if others else ""
    raise AdapterError(
        f"{WEIGHTS_NAME} is missing in {printable(folder)}{found}",
        _FOLDER_HINT,
    )


def _unknown_tensor(key: str) -> UnsupportedError:
    for part, feature in _EXTRA_TENSORS.items():
        if part in key:
            return UnsupportedError(f"the adapter uses {feature}: tensor '{printable(key)}'", _UNSUPPORTED_HINT)
    if ".lora_" not in key:
        return UnsupportedError(
            f"tensor '{printable(key)}' is a full weight, not a LoRA factor: PEFT would overwrite the base with it",
            _UNSUPPORTED_HINT,
        )
    return UnsupportedError(
        f"tensor '{printable(key)}' is not named as PEFT names LoRA factors",
        f"Expected names like {_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight.",
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def describe(adapter: Adapter) -> str:
    """One line for people: rank, alpha or its spread, dtype, number of modules."""
    ranks = "/".join(str(rank) for rank in adapter.ranks)
    scales = sorted({module.scale for module in adapter.modules})
    scale = number(scales[0]) if len(scales) == 1 else f"{number(scales[0])} to {number(scales[-1])}"
    return f"LoRA rank {ranks}, scale {scale}, {some(adapter.dtypes)}, {len(adapter.modules)} modules"
