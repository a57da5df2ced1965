"""Adapters with modules that no text prompt runs, of a vision tower: never a repair that was judged by nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Watcher, make_adapter
from safetensors.torch import load_file, save_file

from csulora_cli.api import fix_adapter
from csulora_cli.comparison import compare_methods
from csulora_cli.engine.attach import Factors, Update, applied
from csulora_cli.engine.host import load_host
from csulora_cli.engine.reach import reach_of
from csulora_cli.errors import HostError, UsageError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.formats.site import Place, Site
from csulora_cli.locate import MODEL_FILES, locate
from csulora_cli.settings import CompareSettings, EvalSettings, FixSettings

TOWER = r".*vision_tower.*(out_proj|fc1)"
MIXED = r".*vision_tower.*fc1|.*language_model.*(q_proj|down_proj)"
COUNTS = {TOWER: "2 of 2", MIXED: "1 of 5"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def make(hosts: Callable[..., Path], prompts: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings for an adapter of some modules of a small vision-language host; `zero`: whose B are made zero."""

    def settings(modules: str, zero: str = "", **changes: Any) -> dict[str, Any]:
        folder = make_adapter(hosts("llava"), tmp_path / "adapter", target_modules=modules)
        tensors = load_file(folder / WEIGHTS)
        for key in tensors:
            if zero and zero in key and "lora_B" in key:
                tensors[key] = torch.zeros_like(tensors[key])
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return {"base": str(hosts("llava")), "prompts": prompts, "device": "cpu", **changes}

    return settings


def test_no_strength_is_found_for_what_no_prompt_runs(
    make: Callable[..., dict[str, Any]], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    settings = make(TOWER, unaligned=str(hosts("llava", change=0.3)), strength="auto", out=tmp_path / "out")
    adapter = str(tmp_path / "adapter")
    with pytest.raises(HostError, match="2 of 2 adapted modules run on none of 8 text prompts, so that no λ") as caught:
        fix_adapter(FixSettings(adapter, **settings))
    assert caught.value.hint == "Give --strength a number."
    assert not (tmp_path / "out").exists()
    report = fix_adapter(FixSettings(adapter, **{**settings, "strength": 4.0, "prompts": None}))  # the hint holds
    assert report.moved > 0
    assert {module.after["along D"] < module.before["along D"] for module in report.modules} == {True}


@pytest.mark.parametrize("modules", [TOWER, MIXED])
def test_the_prompts_source_refuses_before_it_runs_the_adapter(
    modules: str, make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    progress, settings = Watcher(), make(modules, out=tmp_path / "out")
    with pytest.raises(HostError, match=f"{COUNTS[modules]} adapted modules run on none of 8 text prompts") as caught:
        fix_adapter(FixSettings(str(tmp_path / "adapter"), **settings), progress)
    way = "--unaligned without --protect"
    way += ", with a number for --strength" if modules is TOWER else ""
    assert caught.value.hint == f"Prompts cannot judge them; use {way}."
    assert [name for name, _ in progress.stages] == ["adapter", "models", "host"]
    assert not (tmp_path / "out").exists()


def test_the_weights_source_tells_by_which_modules_it_chose(
    make: Callable[..., dict[str, Any]], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    settings = make(MIXED, unaligned=str(hosts("llava", change=0.3)), strength="auto", out=tmp_path / "out")
    report = fix_adapter(FixSettings(str(tmp_path / "adapter"), **settings))
    (warning,) = report.warnings
    assert warning.startswith("1 of 5 adapted modules run on none of 8 text prompts; λ and all that is measured come")
    assert "model.vision_tower" in warning
    assert report.strength.value > 0
    assert all(module.moved > 0 for module in report.modules)  # those of the tower, too


def test_a_tower_that_was_not_trained_stays_and_stops_nothing(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Training on text alone leaves B of the vision tower at zero, where it began."""
    settings = make(MIXED, zero="vision_tower", out=tmp_path / "out", strength=2.0)
    report = fix_adapter(FixSettings(str(tmp_path / "adapter"), **settings))
    assert report.warnings == ()
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "out"))
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {key for key in before if "language_model" in key and "lora_A" in key}
    assert {module.name: module.moved for module in report.modules if "tower" in module.name} == {
        "model.vision_tower.encoder.layers.0.mlp.fc1": 0.0
    }


def test_an_adapter_of_nothing_but_such_a_tower_stays_as_it_is(
    make: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = make(TOWER, zero="vision_tower", out=tmp_path / "out", strength=2.0)
    assert fix_adapter(FixSettings(str(tmp_path / "adapter"), **settings)).is_unchanged
    before, after = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("adapter", "out"))
    assert before == after


def test_eval_tells_what_it_cannot_measure(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = make(TOWER, answer_tokens=2)
    report = evaluate_adapters(EvalSettings((str(tmp_path / "adapter"),), **settings))
    (warning,) = report.warnings
    assert warning.startswith("adapter: 2 of 2 adapted modules run on none of 4 text prompts, so that nothing here")


def test_compare_leaves_out_what_judges_by_prompts(
    make: Callable[..., dict[str, Any]], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    settings = make(MIXED, unaligned=str(hosts("llava", change=0.3)), points=1, answer_tokens=2)
    adapter = str(tmp_path / "adapter")
    report = compare_methods(CompareSettings(adapter, **settings))
    assert set(report.left_out) == {"prompts", "keep-out-protect", "rotated", "harmful", "benign"}
    assert set(report.left_out.values()) == {"cannot judge the adapter's modules that run on no text prompt"}
    assert report.warnings[0].startswith("1 of 5 adapted modules run on none of 8 text prompts; all that is measured")
    with pytest.raises(UsageError, match="the method prompts cannot judge the adapter's modules"):
        compare_methods(CompareSettings(adapter, **settings, methods="prompts,keep-out"))


def test_compare_leaves_out_what_cannot_follow_a_module(
    hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    """Distances of tokens are no tokens: what this embedding reads of which token cannot be told."""
    adapter = make_adapter(hosts("t5"), tmp_path / "adapter", target_modules=["relative_attention_bias", "q"])
    settings = CompareSettings(str(adapter), str(hosts("t5")), prompts=prompts, points=1, answer_tokens=2, device="cpu")
    report = compare_methods(settings)
    assert {method.name for method in report.methods} == {"s3lora", "shrink"}
    assert report.left_out["prompts"].startswith("cannot be run: 'encoder.block.0.layer.0.SelfAttention.relative_att")
    with pytest.raises(UsageError, match="the method rotated cannot be run: 'encoder"):
        compare_methods(replace(settings, methods="rotated"))


def test_compare_refuses_what_nothing_can_be_measured_of(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = make(TOWER, points=1, answer_tokens=2)
    with pytest.raises(HostError, match=r"2 of 2 .*, so that no repair can be measured"):
        compare_methods(CompareSettings(str(tmp_path / "adapter"), **settings))


def test_modules_that_share_their_layer_are_reached_together(hosts: Callable[..., Path]) -> None:
    host = load_host(locate(str(hosts("llama")), MODEL_FILES), torch.device("cpu"), "float32", False)
    layers = host.model.model.layers
    layers[1].mlp = layers[0].mlp
    sites = [
        Site(name, torch.ones(1, 32), torch.ones(48, 1), 1.0, 1.0)
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    ]
    assert reach_of(host, sites, ["how do i make w1"]).unreached == []
    assert not reach_of(host, sites, ["how do i make w1"]).is_none


@pytest.mark.parametrize(
    ("changes", "is_zero"),
    [
        ({}, False),
        ({"lora_a": torch.zeros(1, 3)}, True),
        ({"lora_b": torch.zeros(2, 1)}, True),
        ({"lora_b": torch.zeros(2, 1), "bias": torch.ones(2)}, False),
        ({"lora_b": torch.zeros(2, 1), "bias": torch.zeros(2)}, True),
        ({"scale": 0.0, "bias": torch.ones(2)}, True),
    ],
)
def test_zero_updates(changes: dict[str, Any], is_zero: bool) -> None:
    made = {"lora_a": torch.ones(1, 3), "lora_b": torch.ones(2, 1), "scale": 1.0, **changes}
    site = Site("up", alpha=1.0, place=Place("up"), **made)
    assert site.is_zero is is_zero
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(3, 2)})
    alone = model["up"](torch.ones(1, 3))
    with applied(model, Update({"up": Factors.of(site)})):
        assert torch.equal(model["up"](torch.ones(1, 3)), alone) is is_zero
