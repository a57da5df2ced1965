"""What kind of model a folder holds, from its small files alone; kinds that csulora cannot run are refused by name.

A weight that is quantised has other values than it had before, and its file does not have the shapes of its modules.
Whoever quantises names the method in `quantization_config` (transformers), in another key, or in a file of its own.
Methods that were seen to run in transformers are listed; every other one is refused, whatever it is called.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from csulora_cli.checkpoint import CONFIG_NAME
from csulora_cli.errors import HostError
from csulora_cli.files import is_regular, parse_json_object, read_bytes
from csulora_cli.locate import Location
from csulora_cli.text import printable

# Where a config describes its quantization: transformers, compressed-tensors before it was part of that, mlx.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
# Files that tools wrote beside a config that is silent about them, and what the method is called then.
_QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}

# How llama.cpp names the parts of a file that it has split, and what reads GGUF files for transformers.
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_GGUF_PACKAGES = ("gguf", "accelerate")
_COMPRESSED = "compressed-tensors"
# Methods that transformers runs or dequantises on any device, and the packages that it asks for.
_RUNNABLE: Mapping[str, Sequence[str]] = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "fp8": ("accelerate",),
    "mxfp4": (),
    _COMPRESSED: ("compressed_tensors",),
}
# Of its formats, those whose dequantised weights were compared.
_COMPRESSED_FORMATS = frozenset({"int-quantized", "float-quantized", "pack-quantized"})


def check_model_kind(location: Location, role: str) -> None:
    """Refuse, before anything is loaded, a model whose kind csulora cannot run.

    Args:
        location: of the model.
        role: what to call it in messages ("host", "unaligned model", "judge").

    Raises:
        HostError: it is quantised by a method that is not run, a quantised encoder-decoder model, a composite around an
            encoder-decoder model or a part of a GGUF file, its config cannot be read, or a package that reads it is
            not installed.
    """
    name = f"the {role} {printable(location.given)}"
    if location.gguf is not None:
        _check_gguf(name, location.gguf)
        return
    config = _config(location.folder)
    runnable = _runnable_method(config)
    if (packages := _RUNNABLE.get(runnable)) is not None:
        if config.get("is_encoder_decoder") is True:
            raise _quantised(name, f"{runnable}, an encoder-decoder model")
        if runnable == _COMPRESSED and (obstacle := _compressed_obstacle(config["quantization_config"])) is not None:
            raise _quantised(name, f"{runnable}, {obstacle}")
        _check_packages(f"{name} is quantised", packages, "quantised")
    elif (method := quantization(location.folder, config)) is not None:
        raise _quantised(name, method)
    if any(part.get("is_encoder_decoder") is True for part in _parts(config)):
        raise HostError(
            f"{name} has an encoder-decoder model as a part",
            "csulora runs encoder-decoder models on their own only.",
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configs of the parts of a composite model."""
    return [value for value in config.values() if isinstance(value, dict)]


def _check_gguf(name: str, file: str) -> None:
    if _GGUF_PART.search(file):
        raise HostError(
            f"{name} is one part of a GGUF file that was split: {printable(file)}",
            "Join its parts first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
    _check_packages(f"{name} is a GGUF file", _GGUF_PACKAGES, "gguf")


def _check_packages(what: str, packages: Sequence[str], extra: str) -> None:
    if missing := [package for package in packages if find_spec(package) is None]:
        raise HostError(
            f"{what}, and the Python package {missing[0]} that reads it is not installed",
            f"Run: pip install 'csulora[{extra}]'",
        )


def _quantised(name: str, method: str) -> HostError:
    return HostError(
        f"{name} is quantised ({printable(method, 40)})", "Give the full-precision model that it was made from."
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return parse_json_object(read_bytes(path, HostError), path, HostError) if path.exists() else {}


def fp8_block(location: Location) -> tuple[int, int] | None:
    """How many rows and columns of a weight share a scale, in a model that is quantised in FP8 by blocks; else None."""
    config = _config(location.folder)
    size = config["quantization_config"].get("weight_block_size") if _runnable_method(config) == "fp8" else None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(number, int) for number in size):
        return None
    return size[0], size[1]


def is_plain(location: Location) -> bool:
    """Whether nothing says that the weights on disk have other names, shapes or values than those in memory."""
    return location.gguf is None and quantization(location.folder, _config(location.folder)) is None


def check_plain(location: Location, role: str) -> None:
    """Refuse rounded weights for the weights source: the displacement would hold their rounding errors.

    Raises:
        HostError: it is a GGUF file, or quantised.
    """
    if location.gguf is not None:
        raise HostError(
            f"the {role} {printable(location.given)} is a GGUF file: the weights source would take its rounding for "
            "alignment",
            "Give both models as safetensors, or leave --unaligned out: the prompts source takes GGUF hosts.",
        )
    if (method := quantization(location.folder, _config(location.folder))) is not None:
        raise _quantised(f"the {role} {printable(location.given)}", method)


def _runnable_method(config: Mapping[str, Any]) -> str:
    """The method that the config as a whole names; empty if it names none."""
    own = config.get("quantization_config")
    return _method(own) if isinstance(own, dict) else ""


def _compressed_obstacle(own: Mapping[str, Any]) -> str | None:
    """What of a compressed-tensors description keeps transformers from dequantising it as meant; None if nothing does.

    transformers takes the first scheme for every layer outside the experts, without a word, and undoes no rotation.
    """
    groups = own.get("config_groups")
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    if len(schemes) != 1:
        return f"{len(schemes)} schemes"
    if own.get("transform_config"):
        return "rotated"
    weights_format = schemes[0].get("format") or own.get("format")
    return None if weights_format in _COMPRESSED_FORMATS else str(weights_format)


def quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    """How the weights of a model are quantised, in the words of its own files; None if nothing says that they are.

    Args:
        folder: of the model.
        config: its config; the parts of a composite model have configs of their own in it.
    """
    for part in (config, *_parts(config)):
        for key in _QUANTIZATION_KEYS:
            if part.get(key):
                return _described(part[key])
    return next((method for file, method in _QUANTIZATION_FILES.items() if is_regular(folder / file)), None)


def _described(own: Any) -> str:
    """Method and bits, as far as the description has them."""
    if not isinstance(own, dict):
        return "by an unknown method"
    method = _method(own) or "by an unknown method"
    bits = own.get("bits") or next((bits for bits in (4, 8) if own.get(f"load_in_{bits}bit")), None)
    return f"{method}, {bits} bits" if bits else str(method)


def _method(own: Mapping[str, Any]) -> str:
    is_bitsandbytes = any(own.get(f"load_in_{bits}bit") for bits in (4, 8))
    return str(own.get("quant_method") or ("bitsandbytes" if is_bitsandbytes else ""))
