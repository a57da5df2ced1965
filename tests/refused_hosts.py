"""Folders of models that no command runs, by kind: what is in them, and what is said of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RefusedHost:
    """A model folder without any weights that can be read, so that loading it would fail in another way.

    Attributes:
        message: what the error says.
        config: what its config has beside the type of the model.
        files: its other files.
    """

    message: str
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **self.config}))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder


def quantised(message: str, **description: Any) -> RefusedHost:
    return RefusedHost(f"is quantised ({message})", {"quantization_config": description})


def compressed(obstacle: str, *schemes: dict[str, Any], **description: Any) -> RefusedHost:
    groups = {f"group_{index}": scheme for index, scheme in enumerate(schemes)}
    return quantised(
        f"compressed-tensors, {obstacle}", quant_method="compressed-tensors", config_groups=groups, **description
    )


REFUSED_HOSTS = {
    "GPTQ": quantised("gptq, 4 bits", quant_method="gptq", bits=4, group_size=128),
    "AWQ": quantised("awq, 4 bits", quant_method="awq", bits=4, version="gemm"),
    "compressed-tensors, NVFP4": compressed("nvfp4-pack-quantized", {"format": "nvfp4-pack-quantized"}),
    "compressed-tensors, several schemes": compressed("2 schemes", {}, {}, format="pack-quantized"),
    "compressed-tensors, no scheme": compressed("0 schemes", format="pack-quantized"),
    "compressed-tensors, rotated": compressed(
        "rotated", {}, format="pack-quantized", transform_config={"config_groups": {"u": {"type": "hadamard"}}}
    ),
    "a method that is not named": quantised("by an unknown method", group_size=64),
    "quantised, the language model of a composite": RefusedHost(
        "is quantised (awq, 4 bits)", {"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}
    ),
    "compressed-tensors, older": RefusedHost(
        "is quantised (compressed-tensors)", {"compression_config": {"quant_method": "compressed-tensors"}}
    ),
    "mlx, 4 bits": RefusedHost(
        "is quantised (by an unknown method, 4 bits)", {"quantization": {"group_size": 64, "bits": 4}}
    ),
    "GPTQ, told by a file": RefusedHost("is quantised (gptq)", files={"quantize_config.json": b'{"bits": 4}'}),
    "AWQ, told by a file": RefusedHost("is quantised (awq)", files={"quant_config.json": b'{"w_bit": 4}'}),
    "ModelOpt, told by a file": RefusedHost("is quantised (modelopt)", files={"hf_quant_config.json": b"{}"}),
    "several GGUF files": RefusedHost(
        "has 2 GGUF files and no safetensors: model-q4.gguf, model-q8.gguf",
        files={"model-q8.gguf": b"GGUF", "model-q4.gguf": b"GGUF"},
    ),
    "a part of a GGUF file": RefusedHost(
        "is one part of a GGUF file that was split: model-00001-of-00003.gguf",
        files={"model-00001-of-00003.gguf": b"GGUF"},
    ),
    "encoder-decoder, a part of a composite": RefusedHost(
        "has an encoder-decoder model as a part", {"text_config": {"is_encoder_decoder": True}}
    ),
    "encoder-decoder, quantised": RefusedHost(
        "is quantised (bitsandbytes, an encoder-decoder model)",
        {"is_encoder_decoder": True, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ),
}
