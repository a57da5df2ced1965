"""Spellings in the wild: each comes out as PEFT writes it, and repaired as the adapter that PEFT wrote is."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from conftest import make_adapter
from torch import Tensor

from csulora_cli.adapter import bind, read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, prompts_source
from csulora_cli.errors import InputError
from csulora_cli.formats.spelling import canonical_keys
from csulora_cli.formats.structure import Structure, read_structure
from csulora_cli.locate import Location
from csulora_cli.settings import FixSettings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
QV = ("q_proj", "v_proj")
LAYERS = [f"layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in QV]


@dataclass(frozen=True)
class Wild:
    """One spelling: how each key is written, and what else stands in the config."""

    spell: Callable[[str], str]
    config: Mapping[str, Any] = field(default_factory=dict)


def _inside(old: str, new: str) -> Callable[[str], str]:
    return lambda key: PREFIX + key.removeprefix(PREFIX).replace(old, new)


def _named(stem: str) -> dict[str, Any]:
    """A config that names every module in full, and gives one of them its rank and alpha by its name."""
    names = [f"{stem}{layer}" for layer in LAYERS]
    return {"target_modules": names, "r": 9, "lora_alpha": 1,
            "rank_pattern": dict.fromkeys(names, 4), "alpha_pattern": dict.fromkeys(names, 8)}  # fmt: skip


WILD: dict[str, Wild] = {
    "old PEFT, adapter's name in the key": Wild(lambda key: key.replace(".weight", ".default.weight")),
    "an adapter's own name in the key": Wild(lambda key: key.replace(".weight", ".my_task.weight")),
    "no prefix": Wild(lambda key: key.removeprefix(PREFIX)),
    "half of the prefix": Wild(lambda key: "base_model." + key.removeprefix(PREFIX)),
    "no prefix and no model": Wild(lambda key: key.removeprefix(PREFIX + "model.")),
    "data parallel outside": Wild(lambda key: "module." + key),
    "data parallel inside": Wild(_inside("model.layers", "module.model.layers")),
    "compiled": Wild(lambda key: "_orig_mod." + key),
    "compiled layers": Wild(_inside("self_attn.", "self_attn._orig_mod.")),
    "checkpointed layers": Wild(_inside(".self_attn", "._checkpoint_wrapped_module.self_attn")),
    "FSDP": Wild(_inside(".self_attn", "._fsdp_wrapped_module.self_attn")),
    "compiled, data parallel, with the adapter's name": Wild(
        lambda key: "module._orig_mod." + key.removeprefix(PREFIX).replace(".weight", ".default.weight")
    ),
    "language_model behind model": Wild(_inside("model.layers", "model.language_model.layers")),
    "language_model before model": Wild(_inside("model.layers", "language_model.model.layers")),
    "language_model alone": Wild(_inside("model.layers", "language_model.layers")),
    "vision-language, full names in the config": Wild(
        _inside("model.layers", "model.language_model.layers"), _named("model.language_model.")
    ),
    "vision-language, regex in the config": Wild(
        _inside("model.layers", "language_model.model.layers"),
        {"target_modules": r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj"},
    ),
    "vision-language, towers excluded": Wild(
        _inside("model.layers", "model.language_model.layers"), {"exclude_modules": r".*vision_tower.*"}
    ),
    "layers wrapped as .linear": Wild(_inside("_proj.", "_proj.linear."), {"target_modules": ["linear"]}),
    "lora.down and lora.up": Wild(
        lambda key: key.replace("lora_A.weight", "lora.down.weight").replace("lora_B.weight", "lora.up.weight")
    ),
    "no .weight": Wild(lambda key: key.removesuffix(".weight")),
    "regex and auto_mapping": Wild(
        str,
        {
            "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.(?:(?:q_proj|v_proj)))",
            "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
        },
    ),
    "an export of few fields": Wild(str, {"only": ("r", "lora_alpha", "target_modules", "peft_type")}),
    "nulls for what is empty": Wild(
        str, {"rank_pattern": None, "alpha_pattern": None, "modules_to_save": None, "layers_to_transform": None}
    ),
    "fields of another PEFT, all off": Wild(str, {"use_new_idea": False, "new_config": None, "new_list": []}),
}


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "ANSWER_TOKENS", 1)
        patch.setattr(prompts_source, "PROTECTED_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def plain(hosts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(hosts("llama"), tmp_path_factory.mktemp("plain") / "my-adapter", target_modules=list(QV))


@pytest.fixture(scope="module")
def wanted(plain: Path, hosts: Callable[..., Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repair of the adapter as PEFT wrote it."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    fix_adapter(FixSettings(str(plain), base=str(hosts("llama")), out=out, prompts=prompts, strength=3.0))
    return out


def written(plain: Path, folder: Path, wild: Wild) -> Path:
    folder.mkdir()
    config = json.loads((plain / CONFIG).read_text()) | dict(wild.config)
    only = config.pop("only", tuple(config))
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key in only}))
    tensors = safetensors.torch.load_file(plain / WEIGHTS)
    safetensors.torch.save_file({wild.spell(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("name", WILD)
@pytest.mark.parametrize("source", ["prompts", "weights"])
def test_a_wild_spelling_is_repaired_and_written_as_peft_does(
    name: str,
    source: str,
    plain: Path,
    wanted: Path,
    hosts: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
) -> None:
    adapter = written(plain, tmp_path / "my-adapter", WILD[name])
    out, host = tmp_path / "out", hosts("llama")
    options: dict[str, Any] = {"prompts": prompts, "strength": 3.0}
    if source == "weights":  # a strength of zero: the adapter itself, spelled anew
        options, wanted = {"unaligned": str(hosts("llama", seed=7)), "strength": 0.0}, plain
    report = fix_adapter(FixSettings(str(adapter), base=str(host), out=out, **options))
    have, want = safetensors.torch.load_file(out / WEIGHTS), safetensors.torch.load_file(wanted / WEIGHTS)
    assert have.keys() == want.keys()
    assert all(torch.equal(have[key], want[key]) for key in want)
    is_as_peft_writes = WILD[name].spell is str and "rank_pattern" not in WILD[name].config
    assert bool(report.conversions) != is_as_peft_writes
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():  # also the config says what it should
        assert torch.equal(oracle.with_adapter(host, out)(ids).logits, oracle.with_adapter(host, wanted)(ids).logits)


NEITHER = {
    "another name": _inside("q_proj", "query"),
    "flat names": lambda key: "lora_unet_" + key.replace(".", "_"),
    "some without the prefix": lambda key: key if "q_proj" in key else key.removeprefix(PREFIX),
    "another tower": _inside("model.layers", "vision_tower.layers"),
    "layers that the host lacks": _inside("layers.1", "layers.7"),
    "lower-case factors": lambda key: key.replace("lora_A", "lora_a").replace("lora_B", "lora_b"),
    "factors without names": lambda key: key.replace(".lora_A.", ".A.").replace(".lora_B.", ".B."),
}


@pytest.mark.parametrize("name", NEITHER)
def test_what_no_rule_maps_is_refused(
    name: str, plain: Path, hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    wild = Wild(NEITHER[name], {"target_modules": ["q_proj", "v_proj", "query"]})
    adapter = written(plain, tmp_path / "my-adapter", wild)
    with pytest.raises(InputError):
        fix_adapter(FixSettings(str(adapter), base=str(hosts("llama")), out=tmp_path / "out", prompts=prompts))
    assert not (tmp_path / "out").exists()


def test_a_spelling_that_fits_two_places_is_refused(plain: Path, hosts: Callable[..., Path], tmp_path: Path) -> None:
    one = read_structure(Location("host", hosts("llama")), trust_remote_code=False).modules
    both = {prefix + name.removeprefix("model."): module for name, module in one.items()
            for prefix in ("model.", "language_model.model.")}  # fmt: skip
    wild = Wild(_inside("model.layers", "language_model.layers"))
    adapter = read_adapter(written(plain, tmp_path / "my-adapter", wild))
    assert bind(adapter, Structure(one)).conversions
    with pytest.raises(InputError, match="can be 2 sets of modules"):
        bind(adapter, Structure(both))


def test_two_keys_that_become_one_are_refused() -> None:
    key = f"{PREFIX}q.lora_A.weight"
    tensors: dict[str, Tensor] = {key: torch.ones(1), key.replace(".weight", ".default.weight"): torch.ones(1)}
    with pytest.raises(InputError, match="same name"):
        canonical_keys(tensors)


def test_canonical_keys_are_left_alone_also_where_a_rule_would_apply() -> None:
    key = f"{PREFIX}module.layers.0.q.lora_A.weight"
    assert canonical_keys({key: 1}) == ({key: 1}, ())
