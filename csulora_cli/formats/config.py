"""The fields of `adapter_config.json`: which change the update, which do not, and the rank and scale of a module.

The config is read as plain JSON, in file order. What is not known is refused unless it is empty: a field of a future
PEFT may change what an adapter does.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from csulora_cli.errors import AdapterError, UnsupportedError
from csulora_cli.patterns import first_match, matches_whole, value_for
from csulora_cli.text import printable

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 2**16
MAX_ALPHA = 1e9
EMPTY: tuple[Any, ...] = (None, False, [], {}, "")

# Fields of LoraConfig (PEFT 0.21) with which the update is no plain low-rank one, and the name that users know them by.
REFUSED_FIELDS = {
    "use_qalora": "QALoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "megatron_config": "Megatron layers",
}
# Fields that are read here, or that do not touch the update of a saved adapter.
KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_rslora",
    "velora_config",
}  # fmt: skip
# Fields of variants that differ from plain LoRA in training only.
TRAINING_FIELDS = ("velora_config", "monteclora_config")
DERIVED_INITS = ("pissa", "olora")  # PEFT computes these from the base whenever it loads the adapter
PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}
CORRECT_HINT = "Correct the config, or download the adapter again."
UNSUPPORTED_HINT = "csulora does not repair this kind of adapter; nothing was written."


def check_fields(config: Mapping[str, Any]) -> None:
    """Check every field.

    Raises:
        AdapterError: a value of a wrong type or size.
        UnsupportedError: another kind of adapter, or a field that changes the update in a way that is not repaired.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            f'{CONFIG_NAME} says peft_type {printable(json.dumps(kind))}, not "LORA"',
            "csulora repairs LoRA adapters in PEFT format.",
        )
    for field, feature in REFUSED_FIELDS.items():
        if config.get(field) not in EMPTY:
            raise UnsupportedError(f"the adapter uses {feature}: {_shown(config, field)}", UNSUPPORTED_HINT)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"{CONFIG_NAME} holds {_shown(config, 'bias')}, not none, all or lora_only", CORRECT_HINT)
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str, type(None))) or init not in (*PLAIN_INITS, *DERIVED_INITS):
        raise UnsupportedError(
            f"the adapter was trained on a modified base: {_shown(config, 'init_lora_weights')}",
            "Convert it to plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion), or give "
            "the modified base as --base and set init_lora_weights to true.",
        )
    for field, value in config.items():
        if field not in KNOWN_FIELDS and field not in REFUSED_FIELDS and value not in EMPTY:
            raise UnsupportedError(
                f"{CONFIG_NAME} has the unknown field {_shown(config, field)}",
                "It may change what the adapter does. Remove it if you know that it does not.",
            )
    _check_numbers(config)
    _check_selectors(config)
    for field in ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying", "fan_in_fan_out"):
        if not isinstance(config.get(field, False), (bool, type(None))):
            raise AdapterError(f"{CONFIG_NAME} holds {_shown(config, field)}, not true or false", CORRECT_HINT)


# Fields that select modules, and which types they may have; the entries of a list must be text (or layer numbers).
_SELECTORS: dict[str, tuple[type, ...]] = {
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "layers_to_transform": (int, list),
    "target_parameters": (list,),
    "modules_to_save": (list,),
}


def _check_selectors(config: Mapping[str, Any]) -> None:
    for field, kinds in _SELECTORS.items():
        value = config.get(field)
        entry = int if field == "layers_to_transform" else str
        entries = value if isinstance(value, list) else []
        if (value is not None and not isinstance(value, kinds)) or any(type(part) is not entry for part in entries):
            raise AdapterError(
                f"{CONFIG_NAME} holds {_shown(config, field)}, which selects nothing",
                CORRECT_HINT,
            )


def _check_numbers(config: Mapping[str, Any]) -> None:
    _check_number("r", config.get("r", 8), is_rank=True)
    _check_number("lora_alpha", config.get("lora_alpha", 8), is_rank=False)
    for field, is_rank in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{field} in {CONFIG_NAME} is not an object", CORRECT_HINT)
        for key, value in pattern.items():
            _check_number(f"{field}['{printable(key)}']", value, is_rank=is_rank)


def _check_number(field: str, value: Any, *, is_rank: bool) -> None:
    if is_rank:
        is_good = type(value) is int and 0 < value <= MAX_RANK
        wanted = f"a whole number from 1 to {MAX_RANK}"
    else:
        is_good = type(value) in (int, float) and abs(value) <= MAX_ALPHA and math.isfinite(value)
        wanted = f"a number within ±{MAX_ALPHA:.0e}"
    if not is_good:
        raise AdapterError(
            f"{field} in {CONFIG_NAME} is {printable(json.dumps(value))}, not {wanted}",
            CORRECT_HINT,
        )


def _shown(config: Mapping[str, Any], field: str) -> str:
    value = json.dumps(config[field])
    return f"{printable(field)} = {printable(value, 60)}"


def uniform(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The config of factors of one rank for all modules, with their scales in them."""
    off = {field: None for field in TRAINING_FIELDS if config.get(field) is not None}
    changes = {
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True,
    }  # fmt: skip
    return {**config, **changes, **off}


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """r of a module (or `module.parameter`), by PEFT's rules."""
    return int(value_for(config.get("rank_pattern") or {}, name, config.get("r", 8), "rank_pattern"))


def alpha_of(config: Mapping[str, Any], name: str) -> float:
    """lora_alpha of a module (or `module.parameter`), by PEFT's rules."""
    return float(value_for(config.get("alpha_pattern") or {}, name, default_alpha(config), "alpha_pattern"))


def default_alpha(config: Mapping[str, Any]) -> float:
    """lora_alpha of what no pattern names."""
    return float(config.get("lora_alpha", 8))


def scale_of(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """s = alpha/r, or alpha/sqrt(r) with rsLoRA."""
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def has_suffix(name: str, suffixes: Iterable[Any]) -> bool:
    """Whether a dotted name is one of some names, or ends with one of them."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of this name: target_modules less exclude_modules, in the layers asked for.

    Names that PEFT has to look up (no target_modules, `all-linear`) count as targeted.

    Raises:
        AdapterError: a pattern is no regular expression, or matching it takes too long.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(excluded, str) and excluded and matches_whole(excluded, module, "exclude_modules"):
        return False
    if isinstance(excluded, list) and has_suffix(module, excluded):
        return False
    if targets is None:
        return not config.get("target_parameters")
    if isinstance(targets, str):
        return targets == "all-linear" or matches_whole(targets, module, "target_modules")
    # A module's whole name holds in every layer.
    return module in targets or (has_suffix(module, targets) and _in_layers(config, module))


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers in (None, []):
        return True
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        searches = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
    else:
        searches = [r".*?\.[^.]*\.(?P<index>\d+)\."]
    index = first_match(searches, module, "index", "layers_pattern")
    return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)


def targeted_parameters(config: Mapping[str, Any], module: str, parameters: Iterable[str]) -> list[str]:
    """Which of a module's own parameters PEFT would adapt, in the order given."""
    targets = config.get("target_parameters") or []
    return [parameter for parameter in parameters if has_suffix(f"{module}.{parameter}", targets)]


def may_own_parameters(config: Mapping[str, Any], module: str) -> bool:
    """Whether target_parameters can mean parameters of this module, as far as names tell without the host."""
    for target in config.get("target_parameters") or []:
        owner, _, _ = str(target).rpartition(".")
        if not owner or has_suffix(module, [owner]):
            return True
    return False
