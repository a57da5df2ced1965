"""Other spellings of PEFT's names: what old versions, wrappers and other trainers write, as canonical names.

Two tables. `KEY_RULES` rewrite whole keys and need no host; they are used only on files with keys that are not
canonical. `MODULE_RULES` rewrite module names; they are tried where a host lacks the adapter's modules, and one is
taken only if it alone puts every key on a module of the host with the right shape. Nothing is guessed beyond these.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from csulora_cli.errors import UnsupportedError
from csulora_cli.formats.config import alpha_of, is_targeted, rank_of
from csulora_cli.formats.names import PREFIX, Role, parse_name
from csulora_cli.text import printable

Value = TypeVar("Value")


@dataclass(frozen=True)
class Rule:
    """One spelling: what it is, and how a key or a module's name is rewritten (unchanged where it does not apply)."""

    name: str
    rewrite: Callable[[str], str]


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector)\.(?P<name>\w+)\.(weight|bias)$|\.(lora_embedding_[AB])\.(?P<other>\w+)$"
)
_SAVED = re.compile(r"\.modules_to_save\.(\w+\.)?(?=\w+$)")


def _without_wrappers(key: str) -> str:
    return _WRAPPERS.sub("", key)


def _without_adapter_name(key: str) -> str:
    return _SAVED.sub(".", _ADAPTER_NAME.sub(_without_name, key))


def _without_name(match: re.Match[str]) -> str:
    return f".{match[4]}" if match[4] else f".{match[1]}.{match[3]}"


def _with_weight(key: str) -> str:
    return f"{key}.weight" if key.endswith((".lora_A", ".lora_B")) else key


def _down_and_up(key: str) -> str:
    return key.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")


KEY_RULES = (
    Rule("without the names of wrappers", _without_wrappers),
    Rule("without the adapter's name in each key", _without_adapter_name),
    Rule("with .weight behind lora_A and lora_B", _with_weight),
    Rule("lora.down and lora.up as lora_A and lora_B", _down_and_up),
)


def canonical_keys(tensors: Mapping[str, Value]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The same tensors under canonical keys, and the rules that were needed, in words.

    Keys that no rule makes canonical are left as they are; whoever reads them says so.

    Raises:
        UnsupportedError: two keys would become one, or only some of them begin as PEFT's do.
    """
    if all(_is_canonical(key) for key in tensors):
        return dict(tensors), ()
    names = {key: key for key in tensors}
    used = []
    for rule in KEY_RULES:
        rewritten = {key: rule.rewrite(name) for key, name in names.items()}
        if rewritten != names:
            used.append(rule.name)
        names = rewritten
    if prefix := _prefix_of(names.values()):
        names = {key: PREFIX + name.removeprefix(prefix) for key, name in names.items()}
        used.append(f"with the prefix {PREFIX}")
    elif prefix == "":
        names = {key: PREFIX + name for key, name in names.items()}
        used.append(f"with the prefix {PREFIX}")
    if not all(_is_canonical(name) for name in names.values()):
        return dict(tensors), ()
    if len(set(names.values())) < len(names):
        raise UnsupportedError(
            "two tensors of the file have the same name in PEFT's spelling",
            "Save the adapter again with PEFT's save_pretrained.",
        )
    return {names[key]: tensor for key, tensor in tensors.items()}, tuple(f"keys {rule}" for rule in used)


def _is_canonical(key: str) -> bool:
    name = parse_name(key)
    is_known = name is not None and name.role is not Role.OTHER
    return is_known and not _SAVED.search(key) and _down_and_up(key) == key


def _prefix_of(keys: Iterable[str]) -> str | None:
    """What all keys begin with in the place of PEFT's prefix: `base_model.`, nothing, or None where it stands there."""
    keys = list(keys)
    if any(key.startswith(PREFIX) for key in keys):
        return None
    return "base_model." if all(key.startswith("base_model.") for key in keys) else ""


# Names under which transformers, vLLM and trainers have put the language model of the same checkpoint.
_STEMS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.", "transformer.")


def _moved(old: str, new: str) -> Callable[[str], str]:
    def rewrite(module: str) -> str:
        if module in ("lm_head", "language_model.lm_head"):
            return "lm_head"
        return new + module.removeprefix(old) if module.startswith(old) else module

    return rewrite


def _without_linear(module: str) -> str:
    return module.removesuffix(".linear")


def _with_linear(module: str) -> str:
    return f"{module}.linear"


MODULE_RULES = (
    Rule("without the names of wrappers", _without_wrappers),
    Rule("layers without .linear", _without_linear),
    Rule("layers with .linear", _with_linear),
    *(
        Rule(f"{new or 'nothing'} in the place of {old or 'nothing'} before the layers", _moved(old, new))
        for old in _STEMS
        for new in _STEMS
        if old != new
    ),
)


def respellings(modules: Iterable[str], known: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rules that put all modules of an adapter on modules of the host, each with the new names.

    Rules that come to the same names count once.
    """
    modules, known = list(modules), set(known)
    seen: list[dict[str, str]] = []
    for rule in MODULE_RULES:
        names = {module: rule.rewrite(module) for module in modules}
        if set(names.values()) <= known and len(set(names.values())) == len(names) and names not in seen:
            seen.append(names)
            yield f"modules: {rule.name}", names


def renamed_tensors(tensors: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """The same tensors with other module names in their keys."""
    result = {}
    for key, tensor in tensors.items():
        name = parse_name(key)
        if name is None:
            raise UnsupportedError(f"tensor '{printable(key)}' is not named as PEFT names tensors")
        rest = key.removeprefix(PREFIX + name.module)
        result[f"{PREFIX}{names[name.module]}{rest}"] = tensor
    return result


def renamed_config(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A config that gives each module under its new name what the old one gave it under the old.

    Args:
        config: of the adapter.
        names: old name -> new name, of the modules with low-rank updates.
    """
    result = dict(config)
    for field, value_of in (("rank_pattern", rank_of), ("alpha_pattern", alpha_of)):
        if any(value_of(config, old) != value_of(config, new) for old, new in names.items()):
            result[field] = {new: value_of(config, old) for old, new in names.items()}
    if not all(is_targeted(config, new) for new in names.values()):
        selectors = ("exclude_modules", "layers_to_transform", "layers_pattern")
        result |= {field: None for field in selectors if config.get(field) is not None}
        result["target_modules"] = sorted(names.values())
    return result
