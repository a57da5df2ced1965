"""Every variant of adapter: read as PEFT reads it, repaired, and read by PEFT again."""

import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import make_adapter
from formats_doc import Row, render
from other_hosts import OTHER_HOSTS
from refused_hosts import REFUSED_HOSTS
from safetensors.torch import load_file, save_file
from test_spelling import WILD, written
from torch import Tensor
from variants import EXPERTS, GOOD, MONTECLORA, QV, REFUSED, VELORA, Variant, changing

from csulora_cli.adapter import Adapter, bind, read_adapter, with_weights
from csulora_cli.api import fix_adapter
from csulora_cli.checkpoint import Checkpoint
from csulora_cli.engine import behaviour, effects, prompts_source
from csulora_cli.engine.attach import Update, weight_of
from csulora_cli.engine.host import Host, load_host
from csulora_cli.errors import HostError, InputError, UnsupportedError
from csulora_cli.formats.layouts import KERNEL
from csulora_cli.formats.replication import grow
from csulora_cli.formats.structure import read_structure, structure_of
from csulora_cli.locate import Location
from csulora_cli.report import FixReport
from csulora_cli.settings import DoraMode, FixSettings, Geometry, RankMode

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 33, 12, 7, 3, 40]])
DECODER_IDS = torch.tensor([[0, 7, 21, 4, 50]])
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Measured:
    """One variant: the repair's report, and how far logits are from PEFT's, as shares of what the adapter does.

    Attributes:
        report: of the repair.
        read_error: of the adapter as it was read.
        written_error: of what was written.
        before, after: the tensors of both files.
    """

    report: FixReport
    read_error: float
    written_error: float
    before: dict[str, Tensor]
    after: dict[str, Tensor]


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", 3)


@pytest.fixture(scope="module")
def measured(hosts: Callable[..., Path], prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`measured(name)`: the variant made by PEFT, read, repaired, and loaded by PEFT again; each is done once."""

    @cache
    def measure(name: str) -> Measured:
        variant = GOOD[name]
        folder = tmp_path_factory.mktemp("variant")
        host_folder = hosts(variant.host)
        adapter = make_variant(variant, host_folder, folder / "adapter")
        out = folder / "out"
        report = fix_adapter(
            FixSettings(str(adapter), base=str(host_folder), out=out, prompts=prompts, strength=3.0, protect=0.5)
        )
        read = adapter
        if report.conversions:  # at λ = 0 what is written is the adapter as it was rewritten
            read = folder / "rewritten"
            fix_adapter(FixSettings(str(adapter), base=str(host_folder), out=read, prompts=prompts, strength=0.0))
        host = load_host(Location("host", host_folder), CPU, "auto", trust_remote_code=False)
        plain = logits(host.model)
        return Measured(
            report,
            gap(adapted_logits(host, read), peft_logits(host_folder, adapter), plain),
            gap(adapted_logits(host, out), peft_logits(host_folder, out), plain),
            load_file(adapter / WEIGHTS),
            load_file(out / WEIGHTS),
        )

    return measure


def make_variant(variant: Variant, host: Path, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied weights and of what targets nothing
        make_adapter(host, folder, **variant.options)
    if variant.change is not None:
        variant.change(folder)
    return folder


def logits(model: Any) -> Tensor:
    both = {"decoder_input_ids": DECODER_IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, **both).logits
    return found


def peft_logits(host: Path, adapter: Path) -> Tensor:
    """What PEFT makes of an adapter; a key that it misses or does not know is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return logits(oracle.with_adapter(host, adapter))


def adapted_logits(host: Host, folder: Path) -> Tensor:
    with host.adapted(Update.of(bound(host, folder))):
        return logits(host.model)


def bound(host: Host, folder: Path) -> Adapter:
    adapter = read_adapter(folder)
    if adapter.replication and not host.repeats:
        host.repeats = grow(host.model, adapter.replication)
    structure = structure_of(host.model, host.repeats)
    found = bind(adapter, structure)
    return with_weights(found, structure, lambda site: weight_of(host.model, site.place))


def gap(ours: Tensor, theirs: Tensor, plain: Tensor) -> float:
    return float((ours - theirs).norm() / (theirs - plain).norm())


@pytest.mark.parametrize("name", GOOD)
def test_a_good_variant_is_repaired(name: str, measured: Callable[[str], Measured]) -> None:
    found = measured(name)
    report = found.report
    # The update is PEFT's, and PEFT reads what was written as it was meant.
    assert found.read_error < 2e-5
    assert found.written_error < 2e-5
    # It moved, in no module against the objective, and every tensor is accounted for.
    assert report.moved > 0
    counts = dict(report.tensors)
    assert counts.pop("total") == sum(counts.values()) == len(found.before)
    assert counts["changed"] > 0
    assert {record.key for record in report.carried} <= found.after.keys()
    if not report.conversions:
        assert_only_factors_changed(found)


def assert_only_factors_changed(found: Measured) -> None:
    """Same keys, shapes and dtypes; whatever is neither A nor a magnitude that follows A keeps every bit."""
    assert found.before.keys() == found.after.keys()
    for key, tensor in found.before.items():
        assert found.after[key].shape == tensor.shape
        assert found.after[key].dtype == tensor.dtype
        if not any(part in key for part in ("lora_A", "lora_embedding_A", "lora_magnitude")):
            assert torch.equal(found.after[key], tensor), key


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_is_not_repaired_is_refused_by_name(
    name: str, hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    kind = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = kind.make(hosts(kind.host), tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        fix_adapter(FixSettings(str(adapter), base=str(hosts(kind.host)), out=tmp_path / "out", prompts=prompts))
    assert kind.message in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def on_other_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """`on_other_host(name)`: the error of an adapter on a host that is not plain safetensors."""

    @cache
    def measure(name: str) -> float:
        folder = tmp_path_factory.mktemp("host")
        other = OTHER_HOSTS[name](folder)
        adapter = make_adapter(other.reference, folder / "adapter")
        host = load_host(other.location, CPU, "auto", trust_remote_code=False)
        return gap(adapted_logits(host, adapter), peft_logits(other.reference, adapter), logits(host.model))

    return measure


@pytest.mark.parametrize("name", OTHER_HOSTS)
def test_another_host_runs_the_adapter_as_peft_does(name: str, on_other_host: Callable[[str], float]) -> None:
    assert on_other_host(name) < 2e-5


def test_documentation_says_what_was_measured(
    measured: Callable[[str], Measured],
    request: pytest.FixtureRequest,
    plain_conversions: dict[str, Sequence[str]],
    on_other_host: Callable[[str], float],
) -> None:
    rows = []
    for name, variant in GOOD.items():
        found = measured(name)
        effects = [record.effect for record in found.report.carried]
        carried = [f"{effects.count(effect)} {CARRIED_WORDS[effect]}" for effect in dict.fromkeys(effects)]
        conversions = found.report.conversions
        rows.append(Row(name, variant.group, carried, conversions, found.read_error, found.written_error))
    refusals = {name: kind.message for name, kind in REFUSED.items()}
    loaded = {name: on_other_host(name) for name in OTHER_HOSTS}
    refused_hosts = {name: host.message for name, host in REFUSED_HOSTS.items()}
    names = [f"{name} ({kind})" for name, (kind, _) in WEIGHTS_SOURCE.items()]
    names.append("convolution with groups, by keep-out alone (convolution)")
    text = render(rows, plain_conversions, refusals, loaded, refused_hosts, names)
    path = Path(__file__).parents[1] / "docs" / "formats.md"
    if request.config.getoption("--write-docs"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, "stale: run pytest tests/test_formats.py --write-docs"


CARRIED_WORDS = {"replaces": "replaced", "copy": "copies", "bias": "biases", "training": "of training only"}


@pytest.fixture(scope="module")
def plain_conversions(hosts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequence[str]]:
    """How each wild spelling is rewritten."""
    folder = tmp_path_factory.mktemp("spellings")
    plain = make_adapter(hosts("llama"), folder / "plain", target_modules=QV)
    structure = read_structure(Location("host", hosts("llama")), trust_remote_code=False)
    return {
        name: bind(read_adapter(written(plain, folder / str(index), wild)), structure).conversions
        for index, (name, wild) in enumerate(WILD.items())
    }


@pytest.mark.parametrize("left_out", ["lm_head.lora", "lora_embedding"])
def test_one_end_of_a_tied_update_is_enough(left_out: str, hosts: Callable[..., Path], tmp_path: Path) -> None:
    change = changing(lambda key, tensor: None if left_out in key else tensor)
    made = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_variant(Variant("", "llama-tied", made, change), hosts("llama-tied"), tmp_path)
    host = load_host(Location("host", hosts("llama-tied")), CPU, "auto", trust_remote_code=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses the keys that are left out
        theirs = logits(oracle.with_adapter(hosts("llama-tied"), adapter))
    assert gap(adapted_logits(host, adapter), theirs, logits(host.model)) < 2e-5


# What only one source or one option does


@pytest.fixture
def fix(hosts: Callable[..., Path], prompts: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path, FixReport]]:
    """`fix(host, adapter options, source, settings)`: the adapter, what was written, and the report."""

    def run(kind: str, made: dict[str, Any], **settings: Any) -> tuple[Path, Path, FixReport]:
        adapter, out = make_variant(Variant("", kind, made), hosts(kind), tmp_path / "adapter"), tmp_path / "out"
        own = settings if "unaligned" in settings else {"prompts": prompts, **settings}
        return adapter, out, fix_adapter(FixSettings(str(adapter), base=str(hosts(kind)), out=out, **own))

    return run


WEIGHTS_SOURCE: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}),
    "embedding and output layer": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied output layer": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "convolution": ("convolution", {"target_modules": ["mix", "out"]}),
    "experts in one tensor": ("gpt-oss", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts one by one": ("mixtral", {"target_modules": QV, "target_parameters": EXPERTS}),
    "experts one by one, other names": ("qwen3-moe", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts stored the other way round": ("qwen3-vl-moe", {"target_modules": QV, "target_parameters": EXPERTS}),
    "layers repeated, experts one by one": (
        "mixtral",
        {"target_modules": [], "target_parameters": EXPERTS[:1], "layer_replication": [[1, 2], [0, 2]]},
    ),
    "projections in one tensor on disk": ("hrm-text", {"target_modules": ["q_proj", "v_proj", "gate_proj"]}),
    "vision-language": ("llava", {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
    "vision-language, embedding and output layer": ("llava", {"target_modules": ["embed_tokens", "lm_head"]}),
    "router": ("gpt-oss", {"target_modules": [], "target_parameters": ["mlp.router.weight"]}),
    "LoRA biases": ("qwen2", {"target_modules": QV, "lora_bias": True}),
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True}),
    "VeLoRA": ("llama", {"target_modules": QV, "velora_config": VELORA}),
    "MonteCLoRA": ("llama", {"target_modules": QV, "monteclora_config": MONTECLORA}),
    "layers repeated": ("llama", {"target_modules": QV, "layer_replication": [[0, 2], [1, 2], [0, 1]]}),
    "encoder-decoder, every linear layer": ("t5", {}),
    "encoder-decoder, embeddings on disk once": ("bart", {"target_modules": ["embed_tokens", "q_proj"]}),
    "encoder-decoder, a parameter": ("t5", {"target_modules": [], "target_parameters": ["wi.weight"]}),
    "pissa": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
}
UNSEEN_BY_PROMPTS = "encoder-decoder, a parameter"
GEOMETRIES: dict[str, dict[str, Any]] = {
    "keep-out": {"geometry": Geometry.KEEP_OUT},
    "keep-out, protect": {"geometry": Geometry.KEEP_OUT, "protect": 1.0},
    "keep-in": {"geometry": Geometry.KEEP_IN},
    "keep-in, exact rank": {"geometry": Geometry.KEEP_IN, "rank": RankMode.EXACT},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", WEIGHTS_SOURCE)
def test_the_weights_source_repairs_every_layout(
    name: str,
    geometry: str,
    fix: Callable[..., tuple[Path, Path, FixReport]],
    hosts: Callable[..., Path],
    prompts: Path,
) -> None:
    kind, made = WEIGHTS_SOURCE[name]
    settings = {"unaligned": str(hosts(kind, seed=7)), "strength": 3.0, **GEOMETRIES[geometry]}
    if "protect" in settings:
        settings["prompts"] = prompts
        if name == UNSEEN_BY_PROMPTS:
            with pytest.raises(HostError, match="cannot be told") as caught:
                fix(kind, made, **settings)
            assert caught.value.hint.endswith("use --unaligned without --protect.")
            return
    _, out, report = fix(kind, made, **settings)
    assert report.moved > 0
    counts = dict(report.tensors)
    assert counts.pop("total") == sum(counts.values())
    host = load_host(Location("host", hosts(kind)), CPU, "float32", trust_remote_code=False)
    assert gap(adapted_logits(host, out), peft_logits(hosts(kind), out), logits(host.model)) < 2e-5


CONVERTED = ["mixtral", "qwen3-moe", "qwen3-vl-moe", "gpt-oss", "hrm-text", "llava", "gemma3", "gpt2"]


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_checkpoint_gives_every_parameter_as_transformers_loads_it(kind: str, hosts: Callable[..., Path]) -> None:
    loaded = oracle.load(hosts(kind)).state_dict()
    structure = read_structure(Location("host", hosts(kind)), trust_remote_code=False)
    assert structure.stored is not None
    with Checkpoint(hosts(kind), "host") as checkpoint:
        checkpoint.convert(structure.stored)
        missing = loaded.keys() - checkpoint.tensors.keys()
        assert all(set(structure.stored_names(name)) & checkpoint.tensors.keys() for name in missing)
        for name in loaded.keys() - missing:
            assert checkpoint.tensors[name].shape == loaded[name].shape
            assert torch.equal(checkpoint.read(name), loaded[name]), name
            assert torch.equal(checkpoint.read(name, 1), loaded[name][1]), name


def test_no_rule_of_transformers_changes_other_values_than_those_of_experts_under_one_name() -> None:
    from transformers import conversion_mapping

    # Names on disk that are those in memory are taken to hold the same values, see `Fitting._is_named_as_on_disk`.
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    converters = [rule for rules in mapping.values() for rule in rules if hasattr(rule, "operations")]
    kept = {
        target.replace("\\", "")
        for rule in converters
        for target in rule.target_patterns
        if any(re.search(source, target.replace("\\", "")) for source in rule.source_patterns)
    }
    assert len(converters) > 50
    assert kept == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("source", ["prompts", "weights"])
def test_an_adapter_keeps_the_names_of_the_class_that_it_was_trained_on(
    source: str, hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    """Of a model that transformers also loads without its vision tower, under other names for its modules."""
    import transformers

    host, text = hosts("qwen3.5"), tmp_path / "text"
    transformers.AutoModelForCausalLM.from_pretrained(host).save_pretrained(text)
    adapter, out = make_adapter(text, tmp_path / "adapter", target_modules=["q_proj", "up_proj"]), tmp_path / "out"
    own: dict[str, Any] = {"prompts": prompts} if source == "prompts" else {"unaligned": str(hosts("qwen3.5", seed=7))}
    report = fix_adapter(FixSettings(str(adapter), base=str(host), out=out, strength=3.0, **own))
    assert report.moved > 0
    assert report.conversions == ()
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(key.startswith("base_model.model.model.layers.") for key in after)
    plain = logits(oracle.load(text))
    assert gap(peft_logits(text, out), peft_logits(text, adapter), plain) > 0.01  # it is another one, and no empty one
    modules = {target.module for target in read_adapter(out).targets}
    loaded = load_host(Location("host", host), CPU, "float32", trust_remote_code=False, modules=modules)
    assert gap(adapted_logits(loaded, out), peft_logits(text, out), plain) < 2e-5


def test_the_weights_source_repairs_a_vision_tower(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path]
) -> None:
    made = {"target_modules": ["patch_embedding", "out_proj", "q_proj"]}
    adapter, out, _ = fix("llava", made, unaligned=str(hosts("llava", seed=7)), strength=3.0)
    for layer in ("embeddings.patch_embedding", "encoder.layers.0.self_attn.out_proj"):
        name = f"model.vision_tower.{layer}"
        before, found = (update_of(hosts("llava"), folder, name) for folder in (adapter, out))
        own, other = (
            oracle.load(hosts("llava", **options)).get_submodule(name).weight.detach().double().flatten(1)
            for options in ({}, {"seed": 7})
        )
        assert oracle.relative_gap(found, oracle.keep_out(before, own - other, 3.0, 0.9, None)) < 1e-5


def update_of(host: Path, adapter: Path, name: str) -> Tensor:
    """PEFT's update of a linear layer, or of the kernel of a convolution, flattened to (out, in·kernel)."""
    update: Tensor = oracle.with_adapter(host, adapter).base_model.model.get_submodule(name).get_delta_weight("default")
    return update.detach().double().flatten(1)


def test_the_keep_out_update_of_a_convolution_with_groups_is_the_dense_one(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path]
) -> None:
    made = {"target_modules": ["grouped", "out"], "r": 8}
    adapter, out, _ = fix("convolution", made, unaligned=str(hosts("convolution", seed=7)), strength=3.0)
    host = load_host(Location("host", hosts("convolution")), CPU, "float32", trust_remote_code=False)
    assert gap(adapted_logits(host, out), peft_logits(hosts("convolution"), out), logits(host.model)) < 2e-5
    models = [oracle.load(hosts("convolution", **options)) for options in ({}, {"seed": 7})]
    after = {site.name: site for site in bound(host, out).sites}
    for site in bound(host, adapter).sites:
        if site.place.groups == 1:
            continue
        own, other = (on_all_channels(model.get_submodule(site.name)) for model in models)
        update, found = (each.scale * each.lora_b.double() @ each.lora_a.double() for each in (site, after[site.name]))
        assert oracle.relative_gap(found, oracle.keep_out(update, own - other, 3.0, 0.9, None)) < 1e-5


def on_all_channels(layer: torch.nn.Conv1d) -> Tensor:
    """What a convolution with groups makes of one patch of all channels, (out, in·kernel), column by column."""
    size = layer.in_channels * layer.kernel_size[0]
    patches = torch.eye(size, dtype=torch.float64).reshape(size, layer.in_channels, -1)
    kernel = layer.weight.detach().double()
    return torch.nn.functional.conv1d(patches, kernel, groups=layer.groups).flatten(1).mT


def test_keep_in_refuses_a_convolution_with_groups(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    other = str(hosts("convolution", seed=7))
    with pytest.raises(UnsupportedError, match=r"'layers.0.grouped' is a convolution of 4 groups") as caught:
        fix("convolution", {"target_modules": ["grouped"]}, unaligned=other, geometry=Geometry.KEEP_IN)
    assert "keep-out" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_convolution_with_groups_takes_no_other_b() -> None:
    shapes = torch.Size([4, 6, 3]), torch.Size([8, 2, 1])
    lora_b = torch.block_diag(torch.ones(4, 2), torch.ones(4, 2))
    _, packed = KERNEL.pack([(torch.ones(4, 18), lora_b)], *shapes)
    assert torch.equal(packed, torch.ones(8, 2, 1))
    with pytest.raises(UnsupportedError, match="has no place for it"):
        KERNEL.pack([(torch.ones(4, 18), lora_b + 1)], *shapes)
    with pytest.raises(UnsupportedError, match="has no place for it"):
        KERNEL.pack([(torch.ones(5, 18), torch.nn.functional.pad(lora_b, (0, 1)))], *shapes)


def test_the_keep_out_update_of_experts_stored_apart_is_the_dense_one(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path]
) -> None:
    made = {"target_modules": [], "target_parameters": EXPERTS[:1]}
    adapter, out, _ = fix("mixtral", made, unaligned=str(hosts("mixtral", seed=7)), strength=3.0)
    host = load_host(Location("host", hosts("mixtral")), CPU, "float32", trust_remote_code=False)
    before, after = ({site.name: site for site in bound(host, folder).sites} for folder in (adapter, out))
    weights = [oracle.load(hosts("mixtral", **options)).state_dict() for options in ({}, {"seed": 7})]
    for name, site in before.items():
        own, other = (state[site.place.weight][site.place.expert].double() for state in weights)
        update = site.scale * site.lora_b.double() @ site.lora_a.double()
        found = after[name].scale * after[name].lora_b.double() @ after[name].lora_a.double()
        assert oracle.relative_gap(found, oracle.keep_out(update, own - other, 3.0, 0.9, None)) < 1e-5


def test_the_keep_out_update_of_an_embedding_is_the_dense_one(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path]
) -> None:
    made = {"target_modules": ["embed_tokens"]}
    adapter, out, _ = fix("llama", made, unaligned=str(hosts("llama", seed=7)), strength=3.0)
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    tables = [
        load_file(hosts("llama", **options) / "model.safetensors")["model.embed_tokens.weight"].double()
        for options in ({}, {"seed": 7})
    ]
    update = 2.0 * (before[f"{prefix}B"] @ before[f"{prefix}A"]).double()  # (dim, vocab)
    wanted = oracle.keep_out(update, (tables[0] - tables[1]).mT, 3.0, 0.9, None)
    found = 2.0 * (after[f"{prefix}B"] @ after[f"{prefix}A"]).double()
    assert oracle.relative_gap(found, wanted) < 1e-5


def test_dora_merged_is_the_truncated_change_of_the_weight(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path]
) -> None:
    made = {"target_modules": ["q_proj"], "use_dora": True}
    adapter, out, report = fix("llama", made, strength=0.0, dora=DoraMode.MERGE_SVD)
    changes = oracle.weight_changes(hosts("llama"), adapter)
    lost = total = 0.0
    for name, found in oracle.merged_updates(hosts("llama"), out).items():
        wanted = oracle.truncated(changes[name], 4)
        assert oracle.relative_gap(found, wanted) < 1e-4
        lost += float((changes[name] - wanted).square().sum())
        total += float(changes[name].square().sum())
    assert f"missing {100 * (lost / total) ** 0.5:.2g}%" in report.conversions[0]


@pytest.mark.parametrize("options", [{"dora": DoraMode.REFUSE}, {"strict": True}])
def test_dora_can_be_refused(options: dict[str, Any], fix: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="DoRA"):
        fix("llama", {"target_modules": QV, "use_dora": True}, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name, variant in GOOD.items() if variant.group == "Carried along"])
def test_strict_refuses_what_acts_beside_the_updates(
    name: str, measured: Callable[[str], Measured], fix: Callable[..., Any], tmp_path: Path
) -> None:
    variant = GOOD[name]
    active = [record.key for record in measured(name).report.carried if record.is_active]
    assert measured(name).report.carried
    if not active:  # copies, or what only training reads
        assert fix(variant.host, variant.options, strict=True, strength=0.0)[2].is_unchanged
        return
    assert any("carried along unrepaired" in warning for warning in measured(name).report.warnings)
    with pytest.raises(UnsupportedError, match="--strict"):
        fix(variant.host, variant.options, strict=True)
    assert not (tmp_path / "out").exists()


def test_experts_that_no_token_reaches_keep_their_updates_and_are_named(
    fix: Callable[..., tuple[Path, Path, FixReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "prompt_effects", _without_tokens_in_expert_3(effects.prompt_effects))
    _, _, report = fix("mixtral", {"target_modules": [], "target_parameters": EXPERTS[:1]}, strength=1.0)
    (warning,) = [text for text in report.warnings if "no token of the prompts" in text]
    assert "2 of 8 adapted experts" in warning
    assert "experts.gate_up_proj[3]" in warning


def test_an_expert_that_alignment_left_alone_is_not_called_unreached(
    fix: Callable[..., tuple[Path, Path, FixReport]], hosts: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    unaligned = shutil.copytree(hosts("mixtral", seed=7), tmp_path / "unaligned")
    own, other = (load_file(folder / "model.safetensors") for folder in (hosts("mixtral"), unaligned))
    same = {key: tensor for key, tensor in own.items() if ".experts.3." in key}
    assert same
    save_file(other | same, unaligned / "model.safetensors", metadata={"format": "pt"})
    made = {"target_modules": [], "target_parameters": EXPERTS[:1]}
    _, _, report = fix("mixtral", made, unaligned=str(unaligned), prompts=prompts, strength=1.0, protect=1.0)
    left = {module.name for module in report.modules if module.directions == 0}
    assert len(left) == 2
    assert left == {module.name for module in report.modules if module.moved == 0}
    (warning,) = [text for text in report.warnings if "[3]" in text]
    assert warning.startswith("host and unaligned model do not differ in 2 modules, left unchanged")


def _without_tokens_in_expert_3(original: Callable[..., list[effects.Effect]]) -> Callable[..., list[effects.Effect]]:
    def changed(*args: Any) -> list[effects.Effect]:
        return [
            replace(effect, before={**effect.before, "faded": 0.0}) if effect.name.endswith("[3]") else effect
            for effect in original(*args)
        ]

    return changed
