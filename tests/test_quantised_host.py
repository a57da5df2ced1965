"""Quantised hosts: the repair keeps what it promises, and what needs a weight as numbers is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import make_adapter
from quantised_host import BITSANDBYTES, WRITTEN, reference, write_quantised_host
from safetensors.torch import load_file, save_file
from test_formats import CPU, adapted_logits, gap, logits, peft_logits
from variants import EXPERTS

from csulora_cli import model_kind
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, prompts_source
from csulora_cli.engine.host import load_host
from csulora_cli.engine.packed import check_blocks
from csulora_cli.errors import HostError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.locate import Location
from csulora_cli.report import FixReport
from csulora_cli.settings import EvalSettings, FixSettings

NF4, INT8 = "bitsandbytes, NF4", "bitsandbytes, 8 bits"
BLOCKS, INT4 = "FP8, one scale a block", "compressed-tensors, int4 with zero points"


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", 3)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantised(NF4)` is the folder of such a host; the full-precision one lies beside it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_quantised_host(name, tmp_path_factory.mktemp("host"))
        return made[name]

    return get


@pytest.fixture
def fix(quantised: Callable[[str], Path], prompts: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path, FixReport]]:
    """`fix(NF4, adapter options, settings)`: the adapter, what was written, and the report."""

    def run(name: str, made: dict[str, Any] | None = None, **settings: Any) -> tuple[Path, Path, FixReport]:
        host = quantised(name)
        adapter = make_adapter(host.parent / "plain", tmp_path / "adapter", **(made or {}))
        own = settings if "unaligned" in settings else {"prompts": prompts, "strength": 3.0, **settings}
        return adapter, tmp_path / "out", fix_adapter(
            FixSettings(str(adapter), base=str(host), out=tmp_path / "out", **own)
        )  # fmt: skip

    return run


@pytest.mark.parametrize("name", [*BITSANDBYTES, *WRITTEN])
def test_what_is_written_runs_in_peft_as_csulora_says(
    name: str, fix: Callable[..., tuple[Path, Path, FixReport]], quantised: Callable[[str], Path]
) -> None:
    _, out, report = fix(name)
    host = load_host(Location("host", quantised(name)), CPU, "auto", trust_remote_code=False)
    plain = logits(host.model)
    assert gap(adapted_logits(host, out), peft_logits(reference(quantised(name)), out), plain) < 2e-5
    assert report.moved > 0
    exact = logits(oracle.load(quantised(name).parent / "plain"))
    assert 1e-3 < float((plain - exact).norm() / exact.norm()) < 0.5  # it is the quantised model that ran


@pytest.mark.parametrize("name", [BLOCKS, INT4])
def test_the_update_on_a_dequantised_host_is_the_dense_one(
    name: str, fix: Callable[..., tuple[Path, Path, FixReport]], quantised: Callable[[str], Path], prompts: Path
) -> None:
    adapter, out, _ = fix(name)
    dense = reference(quantised(name))
    wanted = oracle.fade_on_prompts(dense, adapter, prompts, 3.0, 1.0, 3)
    for module, update in oracle.merged_updates(dense, out).items():
        assert oracle.relative_gap(update, wanted[module]) < 1e-4


@pytest.mark.parametrize("name", ["MXFP4", "compressed-tensors, int4, experts"])
def test_experts_that_were_quantised_are_adapted(
    name: str, fix: Callable[..., tuple[Path, Path, FixReport]], quantised: Callable[[str], Path]
) -> None:
    _, out, report = fix(name, {"target_modules": [], "target_parameters": EXPERTS})
    host = load_host(Location("host", quantised(name)), CPU, "auto", trust_remote_code=False)
    assert gap(adapted_logits(host, out), peft_logits(reference(quantised(name)), out), logits(host.model)) < 2e-5
    assert report.moved > 0


def test_eval_takes_a_quantised_host(
    quantised: Callable[[str], Path], prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(quantised(INT8).parent / "plain", tmp_path / "adapter")
    report = evaluate_adapters(EvalSettings((str(adapter),), str(quantised(INT8)), prompts=prompts))
    assert len(report.models) == 2
    assert "MatMul8bitLt" not in capfd.readouterr().err


@pytest.mark.parametrize("name", [NF4, BLOCKS])
def test_the_weights_source_refuses_rounded_weights(
    name: str, fix: Callable[..., Any], quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(HostError, match="the host .* is quantised"):  # noqa: RUF043
        fix(name, unaligned=str(quantised(name).parent / "plain"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "made",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    ],
    ids=["DoRA", "PiSSA", "a layer as a whole"],
)
@pytest.mark.parametrize("name", [NF4, INT8])
def test_what_needs_a_packed_weight_is_refused(
    name: str, made: dict[str, Any], fix: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(HostError, match="which is quantised in the host"):
        fix(name, made)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(fix: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_kind, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(HostError, match="quantised, and the Python package bitsandbytes that reads it") as caught:
        fix(NF4)
    assert caught.value.hint == "Run: pip install 'csulora[quantised]'"


def test_an_adapter_of_another_model_is_refused_before_the_weights_are_read(
    quantised: Callable[[str], Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("csulora_cli.opening.load_host", lambda *_: pytest.fail("the host was loaded"))
    with pytest.raises(HostError, match=r"of the host is \(64, 128\)"):
        fix_adapter(
            FixSettings(str(adapters("llama")), base=str(quantised(NF4)), out=tmp_path / "out", prompts=prompts)
        )


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("FP8, one scale a matrix", "weight_scale_inv"),
        (BLOCKS, "weight_scale_inv"),
        ("compressed-tensors, FP8, one scale a row", "weight_scale"),
        ("compressed-tensors, int8", "weight_scale"),
        ("bitsandbytes, NF4, nested", "weight.nested_absmax"),
    ],
)
def test_a_weight_that_has_lost_its_scale_is_refused(
    name: str, ending: str, quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    """transformers loads such a file without a word, and gives other weights."""
    host = Path(shutil.copytree(quantised(name), tmp_path / "host"))
    tensors = load_file(host / "model.safetensors")
    lost = f"model.layers.1.self_attn.k_proj.{ending}"
    del tensors[lost]
    save_file(tensors, host / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(quantised(name).parent / "plain", tmp_path / "adapter")
    with pytest.raises(HostError, match=f"lacks what its quantised weights are decoded with: {lost}$"):
        fix_adapter(FixSettings(str(adapter), base=str(host), prompts=prompts, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def change_tensors(host: Path, change: Callable[[str], str | None]) -> None:
    """Other names for a host's tensors; None: without it."""
    tensors = load_file(host / "model.safetensors")
    renamed = {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, host / "model.safetensors", metadata={"format": "pt"})


def refused(host: Path, plain: Path, prompts: Path, folder: Path, message: str, **options: Any) -> None:
    """A repair on the host fails for that reason and writes nothing."""
    adapter = make_adapter(plain, folder / "adapter", **options)
    with pytest.raises(HostError, match=message) as caught:
        fix_adapter(FixSettings(str(adapter), base=str(host), prompts=prompts, out=folder / "out", device="cpu"))
    assert "full-precision model" in caught.value.hint
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", [BLOCKS, "compressed-tensors, int8"])
def test_weights_without_any_scale_are_refused(
    name: str, quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    host = Path(shutil.copytree(quantised(name), tmp_path / "host"))
    change_tensors(host, lambda tensor: None if "_scale" in tensor else tensor)
    refused(host, quantised(name).parent / "plain", prompts, tmp_path, "lacks what its quantised weights are decoded")


def test_scales_that_are_not_read_are_refused(quantised: Callable[[str], Path], prompts: Path, tmp_path: Path) -> None:
    """Another tool's FP8, under transformers' name for the method."""
    name = "FP8, one scale a matrix"
    host = Path(shutil.copytree(quantised(name), tmp_path / "host"))
    change_tensors(host, lambda tensor: tensor.replace("weight_scale_inv", "weight_scale"))
    refused(host, quantised(name).parent / "plain", prompts, tmp_path, "transformers does not read what the host")


def test_scales_under_another_name_are_missed_where_one_is_lost(
    quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    host = Path(shutil.copytree(quantised(BLOCKS), tmp_path / "host"))
    change_tensors(host, lambda tensor: tensor.replace("weight_scale_inv", "scale"))
    model = load_host(Location("host", host), CPU, "auto", trust_remote_code=False).model
    assert torch.equal(logits(model), logits(load_host(Location("host", quantised(BLOCKS)), CPU, "auto", False).model))
    change_tensors(host, lambda tensor: None if tensor == "model.layers.0.mlp.up_proj.scale" else tensor)
    refused(
        host, quantised(BLOCKS).parent / "plain", prompts, tmp_path, r"are decoded with: .*layers\.0.*up_proj\.scale$"
    )


def test_blocks_that_do_not_divide_a_weight_are_refused(
    quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    host = Path(shutil.copytree(quantised(BLOCKS), tmp_path / "host"))
    config = json.loads((host / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [48, 32]  # two of them, of which the second is cut
    (host / "config.json").write_text(json.dumps(config))
    message = (
        r"blocks of 48 by 32 that do not divide 'model\.layers.*', \d+ by \d+: transformers would decode it wrongly"
    )
    refused(host, quantised(BLOCKS).parent / "plain", prompts, tmp_path, message)


@pytest.mark.parametrize("name", [NF4, INT8])
def test_full_weights_under_a_left_over_description_are_refused(
    name: str, quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    plain = quantised(name).parent / "plain"
    host = Path(shutil.copytree(quantised(name), tmp_path / "host"))
    shutil.copy(plain / "model.safetensors", host)
    refused(host, plain, prompts, tmp_path, "has quantised weights that transformers does not decode: model.layers.0")


@pytest.mark.parametrize("name", [NF4, INT8])
def test_a_packed_weight_as_a_parameter_is_refused(
    name: str, quantised: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    options = {"target_modules": [], "target_parameters": ["up_proj.weight"]}
    message = "needs or replaces 'model.layers.0.mlp.up_proj.weight', which is quantised"
    refused(quantised(name), quantised(name).parent / "plain", prompts, tmp_path, message, **options)


WIDTH = r"cannot run 'model\.layers\.0\.{} of the host .* on the CPU: blocks of 64 .* do not divide its width of {}"


@pytest.mark.parametrize("nf4", [NF4, "bitsandbytes, NF4, nested"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama", WIDTH.format(r"self_attn\.q_proj'", 32)),
        ("llama, half a block more", WIDTH.format(r"mlp\.down_proj'", 160)),
    ],
)
def test_rows_that_are_no_whole_blocks_are_refused_on_the_cpu(
    nf4: str, kind: str, message: str, prompts: Path, tmp_path: Path
) -> None:
    host = write_quantised_host(nf4, tmp_path / "host", kind)
    adapter = make_adapter(tmp_path / "host" / "plain", tmp_path / "adapter")
    with pytest.raises(HostError, match=message) as caught:
        fix_adapter(FixSettings(str(adapter), base=str(host), prompts=prompts, out=tmp_path / "out", device="cpu"))
    assert caught.value.hint == "Give the full-precision model that it was made from, or run it on a GPU."
    assert not (tmp_path / "out").exists()
    with pytest.raises(HostError, match=message):
        evaluate_adapters(EvalSettings((str(adapter),), str(host), prompts=prompts, device="cpu"))


def test_rows_by_32_are_wanted_where_the_cpu_packs_them_so(tmp_path: Path) -> None:
    import transformers

    host = write_quantised_host(NF4, tmp_path, "llama, few rows")
    model = transformers.AutoModelForCausalLM.from_pretrained(host)
    location = Location("few\x1b", host)
    for is_packing in (False, True):
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = is_packing
        if not is_packing:
            check_blocks(model, CPU, location, "host")
            continue
        message = r"k_proj' of the host few\\x1b on the CPU: its 16 rows are no multiple of 32"
        with pytest.raises(HostError, match=message):
            check_blocks(model, CPU, location, "host")


@pytest.mark.parametrize("kind", ["llama", "llama, half a block more"])
def test_8_bits_have_no_blocks(kind: str, tmp_path: Path, prompts: Path) -> None:
    host = write_quantised_host(INT8, tmp_path / "host", kind)
    adapter = make_adapter(tmp_path / "host" / "plain", tmp_path / "adapter")
    settings = FixSettings(str(adapter), base=str(host), prompts=prompts, out=tmp_path / "out", strength=3.0)
    assert fix_adapter(settings).moved > 0
