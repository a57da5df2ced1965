"""The same repair on a CUDA device: `scripts/test -m gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from csulora_cli.api import fix_adapter
from csulora_cli.settings import FixSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("source", ["prompts", "weights", "weights with prompts"])
def test_cuda_and_cpu_find_the_same_update(
    source: str, hosts: Callable[..., Path], adapters: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if source == "prompts" else {"unaligned": str(hosts("llama", seed=7))}
    if source != "weights":
        options |= {"prompts": prompts, "protect": 1.0}
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        settings = FixSettings(
            adapter=str(adapters("llama")), base=str(hosts("llama")), strength=3.0, device=device, out=out, **options
        )
        fix_adapter(settings)
        found[device] = safetensors.torch.load_file(out / "adapter_model.safetensors")
    for name, tensor in found["cpu"].items():
        gap = (found["cuda"][name] - tensor).norm() / tensor.norm()
        assert gap < 1e-4, name
