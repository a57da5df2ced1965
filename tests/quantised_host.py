"""Tiny quantised hosts, as transformers saves them or as models are published by other tools."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import HOSTS, make_host
from safetensors.torch import load_file, save_file
from torch import Tensor

# The CPU kernels of bitsandbytes want rows of whole blocks of 64, and some of them rows by 32; MXFP4 wants 32.
HOSTS["wide llama"] = ("LlamaConfig", {"hidden_size": 64, "intermediate_size": 128})
HOSTS["llama, half a block more"] = ("LlamaConfig", {"hidden_size": 128, "intermediate_size": 160})
HOSTS["llama, few rows"] = ("LlamaConfig", {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 1})
HOSTS["wide gpt-oss"] = ("GptOssConfig", {**HOSTS["gpt-oss"][1], "hidden_size": 64, "intermediate_size": 32})
HOSTS["wide qwen3-moe"] = ("Qwen3MoeConfig", {**HOSTS["qwen3-moe"][1], "hidden_size": 64, "moe_intermediate_size": 32})
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "bitsandbytes, NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, NF4, nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "bitsandbytes, FP4": {"load_in_4bit": True},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
}  # fmt: skip
E4M3 = torch.float8_e4m3fn
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Stored:
    """A weight that was rounded.

    Attributes:
        tensors: what the file holds, by what is put behind the name of the weight.
        dense: the weight that they stand for.
    """

    tensors: dict[str, Tensor]
    dense: Tensor


@dataclass(frozen=True)
class Written:
    """A kind of quantised host that no transformers saves here.

    Attributes:
        description: its `quantization_config`.
        store: rounds a weight, (out, in).
        host: the full-precision one.
        endings: of the names of the weights that are rounded.
    """

    description: dict[str, Any]
    store: Callable[[Tensor], Stored]
    host: str = "wide llama"
    endings: tuple[str, ...] = ("proj.weight",)


def write_quantised_host(name: str, folder: Path, kind: str = "wide llama") -> Path:
    """A host quantised in one of the ways above or below; the full-precision one lies beside it as `plain`.

    Args:
        name: the way.
        folder: where both are written.
        kind: of host, where the way does not have its own.
    """
    import transformers

    written = WRITTEN.get(name)
    plain = make_host(written.host if written else kind, folder / "plain")
    out = folder / "quantised"
    if written:
        round_weights(written, plain, out, folder / "rounded")
        return out
    shutil.copytree(plain, out)
    (out / "model.safetensors").unlink()
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[name])
    transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(out)
    return out


def reference(host: Path) -> Path:
    """The model that such a host must run as: itself in transformers, or the weights that were rounded, in full."""
    rounded = host.parent / "rounded"
    return rounded if rounded.exists() else host


def round_weights(written: Written, plain: Path, out: Path, rounded: Path) -> None:
    """Write a model as quantised, and the same with the rounded weights in full."""
    tensors, dense = {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith(written.endings):
            tensors[name] = dense[name] = weight
            continue
        stored = written.store(weight)
        tensors |= {f"{name}{ending}": tensor.contiguous() for ending, tensor in stored.tensors.items()}
        dense[name] = stored.dense.contiguous()
    for folder, own in ((out, tensors), (rounded, dense)):
        shutil.copytree(plain, folder)
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": written.description}))


def _blocks(weight: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """(blocks down, rows, blocks across, columns); None: all of them."""
    rows, columns = rows or weight.shape[0], columns or weight.shape[1]
    return weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)


def _fp8(ending: str, rows: int | None, columns: int | None) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        blocks = _blocks(weight, rows, columns)
        scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(E4M3).max
        codes = (blocks / scales).to(E4M3)
        scale = scales[:, 0, :, 0] if rows or columns else scales.flatten()[0]
        dense = (codes.float() * scales).reshape(weight.shape)
        return Stored({"": codes.reshape(weight.shape), ending: scale.clone()}, dense)

    return store


def _int8(weight: Tensor) -> Stored:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    return Stored({"": codes.to(torch.int8), "_scale": scales}, codes * scales)


def _int4(is_symmetric: bool) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        blocks = _blocks(weight, 1, 32)
        if is_symmetric:
            scales = blocks.abs().amax((1, 3), keepdim=True) / 7
            zeros = torch.zeros_like(scales)
        else:
            low, high = blocks.amin((1, 3), keepdim=True), blocks.amax((1, 3), keepdim=True)
            scales = (high - low) / 15
            zeros = (-8 - low / scales).round()
        codes = (blocks / scales + zeros).round().clamp(-8, 7)
        dense = ((codes - zeros) * scales).reshape(weight.shape)
        packed = _nibbles(codes.reshape(weight.shape) + 8).view(torch.int32)
        tensors = {
            "_packed": packed, "_scale": scales[:, 0, :, 0], "_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        if not is_symmetric:
            tensors["_zero_point"] = _nibbles((zeros[:, 0, :, 0] + 8).mT).view(torch.int32).mT
        return Stored(tensors, dense)

    return store


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first one in its low half: (..., columns / 2)."""
    whole = codes.to(torch.uint8)
    return (whole[..., ::2] | whole[..., 1::2] << 4).contiguous()


def _mxfp4(weight: Tensor) -> Stored:
    """Of a stack of experts, (experts, in, out), where blocks of 32 inputs share a power of two."""
    blocks = weight.mT.unflatten(-1, (-1, 32))  # (experts, out, in / 32, 32)
    exponents = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    values = torch.cat([FP4_VALUES, -FP4_VALUES])
    codes = (blocks / 2**exponents).unsqueeze(-1).sub(values).abs().argmin(-1)
    dense = (values[codes] * 2**exponents).flatten(-2).mT
    return Stored({"_blocks": _nibbles(codes), "_scales": (exponents[..., 0] + 127).to(torch.uint8)}, dense)


def _fp8_description(block: int | None) -> dict[str, Any]:
    return {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block] if block else None
    }  # fmt: skip


def _compressed(weights_format: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": weights_format, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"],
    }  # fmt: skip


def _by_token(kind: str) -> dict[str, Any]:
    """Inputs that a server would round: transformers does not when it dequantises."""
    return {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}


_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
WRITTEN = {
    "FP8, one scale a matrix": Written(_fp8_description(None), _fp8("_scale_inv", None, None)),
    "FP8, one scale a block": Written(_fp8_description(32), _fp8("_scale_inv", 32, 32)),
    "MXFP4": Written({"quant_method": "mxfp4"}, _mxfp4, "wide gpt-oss", ("gate_up_proj", "down_proj")),
    "compressed-tensors, FP8, one scale a row": Written(
        _compressed("float-quantized", _by_token("float"), num_bits=8, type="float", strategy="channel"),
        _fp8("_scale", 1, None),
    ),
    "compressed-tensors, FP8, one scale a block": Written(
        _compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
        _fp8("_scale", 32, 32),
    ),
    "compressed-tensors, int8": Written(
        _compressed("int-quantized", _by_token("int"), num_bits=8, type="int", strategy="channel"), _int8
    ),
    "compressed-tensors, int4": Written(_compressed("pack-quantized", **_GROUPS), _int4(True)),
    "compressed-tensors, int4 with zero points": Written(
        _compressed("pack-quantized", symmetric=False, **_GROUPS), _int4(False)
    ),
    "compressed-tensors, int4, experts": Written(
        _compressed("pack-quantized", **_GROUPS), _int4(True), "wide qwen3-moe"
    ),
}
