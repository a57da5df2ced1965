"""Adapters of mlx-lm: read by its own formula, repaired, and written in its layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from csulora_cli.adapter import bind, read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, prompts_source
from csulora_cli.engine.attach import Update
from csulora_cli.engine.host import load_host
from csulora_cli.errors import AdapterError, HostError, InputError
from csulora_cli.formats.structure import structure_of
from csulora_cli.locate import Location
from csulora_cli.settings import FixSettings, Geometry, RankMode

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
MODULES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.1.mlp.down_proj": (48, 32),
    "model.embed_tokens": (64, 32),
}
SETTINGS = {
    "fine_tune_type": "lora", "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0}, "num_layers": 16,
    "model": "org/host", "iters": 100, "train": True, "seed": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", 3)


def tensors(rank: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (inputs, outputs) in MODULES.items():
        found[f"{name}.lora_a"] = (0.1 * torch.randn(inputs, rank, generator=generator)).to(dtype)
        found[f"{name}.lora_b"] = (0.1 * torch.randn(rank, outputs, generator=generator)).to(dtype)
    return found


def write(folder: Path, config: Any = SETTINGS, values: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors() if values is None else values, folder / WEIGHTS)
    return folder


def updates(folder: Path) -> dict[str, Tensor]:
    """(scale · lora_a @ lora_b)ᵀ of every module, (out, in), as mlx-lm computes it."""
    scale = json.loads((folder / CONFIG).read_text())["lora_parameters"]["scale"]
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    return {name: scale * (stored[f"{name}.lora_a"] @ stored[f"{name}.lora_b"]).mT for name in MODULES}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([[1, 5, 9, 33, 12, 7]])).logits
    return found


def merged_logits(host: Path, folder: Path) -> Tensor:
    model = load_host(Location("host", host), torch.device("cpu"), "float32", trust_remote_code=False).model
    for name, update in updates(folder).items():
        weight = model.get_submodule(name).weight.data
        weight += update.mT if name.endswith("embed_tokens") else update
    return logits(model)


def adapted_logits(host: Path, folder: Path) -> Tensor:
    opened = load_host(Location("host", host), torch.device("cpu"), "float32", trust_remote_code=False)
    with opened.adapted(Update.of(bind(read_adapter(folder), structure_of(opened.model)))):
        return logits(opened.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_repaired_in_its_own_layout(
    dtype: torch.dtype, hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    host, values = hosts("llama"), tensors(dtype=dtype)
    adapter, out = write(tmp_path / "my-adapter", values=values), tmp_path / "out"
    report = fix_adapter(FixSettings(str(adapter), base=str(host), out=out, prompts=prompts, strength=3.0))
    assert report.library == "mlx"
    assert not any("llama.cpp" in warning for warning in report.warnings)  # it reads no adapters of mlx-lm
    assert report.tensors == {"changed": 3, "unchanged": 3, "carried": 0, "dropped": 0, "total": 6}
    written = safetensors.torch.load_file(out / WEIGHTS)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in written.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in values.items()
    }
    assert all(torch.equal(written[key], values[key]) for key in values if key.endswith("lora_b"))
    assert (out / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert "library_name: mlx" in (out / "README.md").read_text()
    limit = 1e-3 if dtype is torch.float32 else 0.1
    for folder in (adapter, out):
        torch.testing.assert_close(adapted_logits(host, folder), merged_logits(host, folder), rtol=1e-3, atol=limit)


def test_a_rank_that_grows_is_written_into_the_config(hosts: Callable[..., Path], tmp_path: Path) -> None:
    host = hosts("llama")
    adapter, out = write(tmp_path / "my-adapter"), tmp_path / "out"
    fix_adapter(
        FixSettings(
            str(adapter), base=str(host), out=out, unaligned=str(hosts("llama", seed=7)), strength=3.0,
            geometry=Geometry.KEEP_IN, rank=RankMode.EXACT,
        )
    )  # fmt: skip
    config = json.loads((out / CONFIG).read_text())
    assert config == {**SETTINGS, "lora_parameters": {"rank": 16, "dropout": 0.0, "scale": 1.0}}
    assert {
        tensor.shape[1] for key, tensor in safetensors.torch.load_file(out / WEIGHTS).items() if key.endswith("_a")
    } == {16}
    torch.testing.assert_close(adapted_logits(host, out), merged_logits(host, out), rtol=1e-3, atol=1e-3)


BAD: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "DoRA": ({**SETTINGS, "fine_tune_type": "dora"}, lambda _: None, "fine_tune_type"),
    "full": ({**SETTINGS, "fine_tune_type": "full"}, lambda _: None, "fine_tune_type"),
    "no scale": ({**SETTINGS, "lora_parameters": {"rank": 4}}, lambda _: None, "no scale"),
    "a scale in words": ({**SETTINGS, "lora_parameters": {"scale": "20"}}, lambda _: None, "no scale"),
    "a scale of true": ({**SETTINGS, "lora_parameters": {"scale": True}}, lambda _: None, "no scale"),
    "no parameters": ({**SETTINGS, "lora_parameters": None}, lambda _: None, "no scale"),
    "a magnitude": (SETTINGS, lambda t: t.update({"model.layers.0.self_attn.q_proj.m": torch.ones(32)}), "not named"),
    "no partner": (SETTINGS, lambda t: t.pop("model.embed_tokens.lora_b"), "no lora_b"),
    "experts": (SETTINGS, lambda t: t.update({f"x.lora_{c}": torch.ones(2, 4, 4) for c in "ab"}), "no update of one"),
    "NaN": (SETTINGS, lambda t: t["model.embed_tokens.lora_a"].fill_(float("nan")), "NaN"),
    "nothing": (SETTINGS, lambda t: t.clear(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused(name: str, tmp_path: Path) -> None:
    config, spoil, message = BAD[name]
    values = tensors()
    spoil(values)
    with pytest.raises(AdapterError, match=message):
        read_adapter(write(tmp_path / "my-adapter", config, values))


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.q_proj", "model.norm", "model.layers.0.self_attn.k_proj"])
def test_modules_that_the_host_has_not_or_otherwise_are_refused(
    name: str, hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    values = {**tensors(), f"{name}.lora_a": torch.ones(32, 4), f"{name}.lora_b": torch.ones(4, 32)}
    adapter = write(tmp_path / "my-adapter", values=values)
    with pytest.raises((HostError, InputError)):
        fix_adapter(FixSettings(str(adapter), base=str(hosts("llama")), out=tmp_path / "out", prompts=prompts))
