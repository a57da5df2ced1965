"""Tiny quantised hosts, as transformers saves them or as FP8 models are published."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import HOSTS, make_host
from safetensors.torch import load_file, save_file

# The CPU kernels of bitsandbytes want rows of whole blocks of 64, and some of them rows by 32.
HOSTS["wide llama"] = ("LlamaConfig", {"hidden_size": 64, "intermediate_size": 128})
HOSTS["llama, half a block more"] = ("LlamaConfig", {"hidden_size": 128, "intermediate_size": 160})
HOSTS["llama, few rows"] = ("LlamaConfig", {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 1})
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "bitsandbytes, NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, NF4, nested": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "bitsandbytes, FP4": {"load_in_4bit": True},
    "bitsandbytes, 8 bits": {"load_in_8bit": True},
}  # fmt: skip
FP8: dict[str, int | None] = {"FP8, one scale a matrix": None, "FP8, one scale a block": 32}


def write_quantised_host(name: str, folder: Path, kind: str = "wide llama") -> Path:
    """A host quantised in one of the ways above."""
    import transformers

    plain = make_host(kind, folder / "plain")
    out = folder / "quantised"
    shutil.copytree(plain, out)
    if name in FP8:
        _write_fp8(plain, out, FP8[name])
        return out
    (out / "model.safetensors").unlink()
    config = transformers.BitsAndBytesConfig(**BITSANDBYTES[name])
    transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(out)
    return out


def _write_fp8(plain: Path, out: Path, block: int | None) -> None:
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        rows, columns = (block, block) if block else weight.shape
        blocks = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        scales = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (blocks / scales).reshape(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0] if block else scales.flatten()[0].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block] if block else None
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
