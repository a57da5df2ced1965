"""GGUF files as hosts: what csulora makes of one is what PEFT makes of the same model, dequantised."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import Ran, make_adapter, make_tokenizer
from gguf_host import dequantised, write_gguf_host
from test_formats import adapted_logits, gap, logits, peft_logits

from csulora_cli import model_kind
from csulora_cli.api import fix_adapter
from csulora_cli.comparison import compare_methods
from csulora_cli.engine import behaviour, prompts_source
from csulora_cli.engine.host import Host, load_host
from csulora_cli.errors import HostError, InputError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.files import sha256_of
from csulora_cli.locate import Location
from csulora_cli.settings import CompareSettings, DoraMode, EvalSettings, FixSettings

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"
STORED = ["F32", "F16", "Q8_0", "Q4_0"]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`models("Q8_0")`: a GGUF file alone in its folder, and the folder of the same model dequantised."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(weights: str = "Q8_0") -> tuple[Path, Path]:
        if weights not in made:
            folder = tmp_path_factory.mktemp("gguf")
            (folder / "file").mkdir()
            file = write_gguf_host(folder / "file" / f"tiny-{weights}.gguf", weights)
            made[weights] = file, dequantised(file, folder / "dequantised")
        return made[weights]

    return get


@pytest.fixture(scope="module")
def adapter(models: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(models()[1], tmp_path_factory.mktemp("adapters") / "my-adapter")


def opened(file: Path, dtype: str = "auto") -> Host:
    return load_host(Location(str(file), file.parent, gguf=file.name), CPU, dtype, trust_remote_code=False)


@pytest.mark.parametrize("weights", STORED)
def test_the_host_and_the_adapter_on_it_are_those_of_peft(
    weights: str, models: Callable[..., tuple[Path, Path]], adapter: Path
) -> None:
    file, folder = models(weights)
    ours = opened(file)
    plain = oracle.load(folder)
    assert ours.model.dtype == torch.float32
    assert torch.equal(logits(ours.model), logits(plain))
    assert gap(adapted_logits(ours, adapter), peft_logits(folder, adapter), logits(plain)) < 2e-6
    assert ours.encode("how do w1") == oracle.chat_ids(ours.tokenizer, "how do w1")
    assert ours.encode("how do w1") == list(oracle.prompt_ids(folder, ["how do w1"])[0])


def test_weights_are_rounded_as_the_file_says(models: Callable[..., tuple[Path, Path]]) -> None:
    exact = logits(oracle.load(models("F32")[1]))
    errors = [float((logits(oracle.load(models(weights)[1])) - exact).norm() / exact.norm()) for weights in STORED]
    assert errors[0] == 0 < errors[1] < errors[2] < errors[3] < 0.3


def test_a_gguf_host_runs_in_the_dtype_that_is_asked_for(models: Callable[..., tuple[Path, Path]]) -> None:
    assert opened(models()[0], "bfloat16").model.dtype == torch.bfloat16


def test_the_repair_is_the_one_on_the_dequantised_host(
    models: Callable[..., tuple[Path, Path]], adapter: Path, prompts: Path, tmp_path: Path
) -> None:
    file, folder = models()
    reports = [
        fix_adapter(FixSettings(str(adapter), base=str(base), out=tmp_path / out, prompts=prompts, strength=3.0))
        for base, out in ((file, "of file"), (file.parent, "of folder"), (folder, "of safetensors"))
    ]
    written = [(tmp_path / out / WEIGHTS).read_bytes() for out in ("of file", "of folder", "of safetensors")]
    assert written[0] == written[1] == written[2] != (adapter / WEIGHTS).read_bytes()
    wanted = oracle.fade_on_prompts(folder, adapter, prompts, 3.0, 1.0, 3)
    for name, update in oracle.merged_updates(folder, tmp_path / "of file").items():
        assert oracle.relative_gap(update, wanted[name]) < 1e-4
    record = reports[0].inputs["host"]
    assert (record.name, record.sha256) == ("tiny-Q8_0", {file.name: sha256_of(file)})


def test_eval_and_compare_take_a_gguf_host(
    models: Callable[..., tuple[Path, Path]], adapter: Path, prompts: Path, tmp_path: Path
) -> None:
    file, folder = models()
    scores = [evaluate_adapters(EvalSettings((str(adapter),), str(base), prompts=prompts)) for base in (file, folder)]
    assert [model.score for model in scores[0].models] == [model.score for model in scores[1].models]
    settings = CompareSettings(
        str(adapter), str(file), prompts=prompts, methods="prompts,shrink", points=1, out=tmp_path / "winners"
    )
    report = compare_methods(settings)
    assert report.inputs["host"].sha256 == {file.name: sha256_of(file)}


def test_dora_takes_the_weights_of_the_file(
    models: Callable[..., tuple[Path, Path]], prompts: Path, tmp_path: Path
) -> None:
    file, folder = models()
    made = make_adapter(folder, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    for base, out in ((file, "file"), (folder, "folder")):
        fix_adapter(
            FixSettings(
                str(made), base=str(base), out=tmp_path / out, prompts=prompts, strength=3.0, dora=DoraMode.KEEP
            )
        )
    assert (tmp_path / "file" / WEIGHTS).read_bytes() == (tmp_path / "folder" / WEIGHTS).read_bytes()


def test_nothing_beside_the_file_counts(
    models: Callable[..., tuple[Path, Path]],
    hosts: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, folder = models()
    shutil.copytree(hosts("qwen2"), tmp_path / "mixed")
    make_tokenizer(None).save_pretrained(tmp_path / "mixed")
    mixed = shutil.copy(file, tmp_path / "mixed")
    (tmp_path / "cwd").mkdir()
    write_gguf_host(tmp_path / "cwd" / file.name, seed=9)
    monkeypatch.chdir(tmp_path / "cwd")
    ours = opened(Path(mixed))
    assert ours.has_template
    assert torch.equal(logits(ours.model), logits(oracle.load(folder)))


# Refusals


def fixed(adapter: Path, base: Path, out: Path, **settings: Any) -> None:
    fix_adapter(FixSettings(str(adapter), base=str(base), out=out, **settings))


def test_the_weights_source_refuses_gguf_by_name(
    models: Callable[..., tuple[Path, Path]], adapter: Path, tmp_path: Path
) -> None:
    file, folder = models()
    with pytest.raises(HostError, match=r"the host .* is a GGUF file: the weights source would take its rounding"):
        fixed(adapter, file, tmp_path / "out", unaligned=str(folder))
    with pytest.raises(HostError, match=r"the unaligned model .* is a GGUF file"):
        fixed(adapter, folder, tmp_path / "out", unaligned=str(file))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused_before_the_weights_are_read(
    models: Callable[..., tuple[Path, Path]],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("csulora_cli.opening.load_host", lambda *_: pytest.fail("the host was loaded"))
    with pytest.raises(HostError, match="adapted modules are not in the host"):
        fixed(adapters("gpt2"), models()[0], tmp_path / "out", prompts=prompts)
    with pytest.raises(HostError, match=r"down_proj.weight' of the host is \(32, 64\)"):
        fixed(adapters("llama"), models()[0], tmp_path / "out", prompts=prompts)


def test_a_file_that_lacks_a_weight_or_is_none_is_a_host_error(adapter: Path, prompts: Path, tmp_path: Path) -> None:
    lacking = write_gguf_host(tmp_path / "lacking.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(HostError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        fixed(adapter, lacking, tmp_path / "out", prompts=prompts)
    whole = write_gguf_host(tmp_path / "whole.gguf").read_bytes()
    broken = {"no GGUF": b"PK\3\4" + whole[4:], "cut": whole[:4000], "cut in the weights": whole[:-4000], "empty": b""}
    for name, data in broken.items():
        (tmp_path / "broken.gguf").write_bytes(data)
        with pytest.raises(HostError) as caught:
            fixed(adapter, tmp_path / "broken.gguf", tmp_path / "out", prompts=prompts)
        assert "broken.gguf" in caught.value.message, name
        assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_folder_of_several_files_asks_for_one(
    models: Callable[..., tuple[Path, Path]],
    adapter: Path,
    prompts: Path,
    csulora: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("model-Q4.gguf", "model-Q8.gguf"):
        shutil.copy(models()[0], folder / name)
    run = ("fix", adapter, "--prompts", prompts, "--strength", "0", "--out", tmp_path / "out", "--base")
    ran = csulora(*run, folder)
    assert ran.code == 4
    assert ran.error == f"the host {folder} has 2 GGUF files and no safetensors: model-Q4.gguf, model-Q8.gguf"
    assert ran.hint == f"Name one of them: {folder}/model-Q4.gguf"
    ran = csulora(*run, folder / "model-Q4.gguf")
    assert ran.code in (0, 3)
    assert "host      model-Q4\n" in ran.out
    assert "csulora eval" in ran.out.splitlines()[-1]
    assert "it/s" not in ran.err  # transformers' own bar


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(
    package: str,
    models: Callable[..., tuple[Path, Path]],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_kind, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(HostError, match=f"the Python package {package} that reads it is not installed") as caught:
        fixed(adapter, models()[0], tmp_path / "out")
    assert caught.value.hint == "Run: pip install 'csulora[gguf]'"


def test_an_adapter_as_gguf_is_still_refused(models: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a GGUF file"):
        fixed(models()[0], models()[1], tmp_path / "out")


def test_an_encoder_decoder_file_is_refused_by_its_config(
    models: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    original = transformers.AutoConfig.from_pretrained

    def encoder_decoder(*args: Any, **options: Any) -> Any:
        config = original(*args, **options)
        config.is_encoder_decoder = True
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", encoder_decoder)
    with pytest.raises(HostError, match="is an encoder-decoder model in a GGUF file"):
        opened(models()[0])
