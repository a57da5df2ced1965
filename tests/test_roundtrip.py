"""What is written: it loads in peft and transformers, and merges to the promised update, computed densely elsewhere."""

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from conftest import make_adapter, with_kinds
from torch import Tensor

from csulora_cli import api
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, inputs, prompts_source
from csulora_cli.engine.inputs import DirectionPrompts, InputGroup, group_bytes
from csulora_cli.engine.prompts_source import PromptsPath
from csulora_cli.report import FixReport
from csulora_cli.settings import FixSettings, Geometry, RankMode
from csulora_cli.solver.attenuate import contrast

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HOSTS = ("llama", "llama-tied", "qwen2", "gpt2")
STRENGTH = 3.0
PROTECTED_TOKENS = 5

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "rank_pattern": {"rank_pattern": {"k_proj": 2, "c_attn": 6, "down_proj": 5}},
    "alpha_pattern": {"lora_alpha": 4, "alpha_pattern": {r"layers\.1.*q_proj": 1, r"h\.0.*c_proj": 16, "up_proj": 3}},
    "odd": {"r": 3, "lora_alpha": 9},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "some layers": {"target_modules": ["q_proj", "v_proj", "c_attn", "c_fc"], "layers_to_transform": [1]},
    # On GPT-2 this hits square Conv1D weights only, whose orientation no shape tells.
    "regex": {"target_modules": r".*\.1\.(self_attn|mlp|attn)\.(o_proj|down_proj|c_proj)"},
}
# Every kind on Llama; on the others what their architecture could get wrong.
PAIRS = [
    *(("llama", kind) for kind in KINDS),
    *(("llama-tied", kind) for kind in ("odd", "rank_pattern")),
    *(("qwen2", kind) for kind in ("rslora", "alpha_pattern", "bf16")),
    *(("gpt2", kind) for kind in ("plain", "rank_pattern", "alpha_pattern", "some layers", "regex", "fp16")),
]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SOURCES: dict[str, dict[str, Any]] = {
    "prompts": {"strength": STRENGTH},
    "prompts auto": {"target": 0.5},
    "keep-out": {"strength": STRENGTH},
    "keep-out protect": {"strength": STRENGTH, "protect": 1.0},
    "keep-in": {"strength": STRENGTH, "geometry": Geometry.KEEP_IN},
    "keep-in exact": {"strength": STRENGTH, "geometry": Geometry.KEEP_IN, "rank": RankMode.EXACT},
}
WEIGHT_SOURCES = ("keep-out", "keep-out protect", "keep-in", "keep-in exact")
PROMPT_SOURCES = ("prompts", "prompts auto", "keep-out protect")
RANK_KEEPING = (*PROMPT_SOURCES, "keep-out", "keep-in")


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", PROTECTED_TOKENS)


@pytest.fixture
def fix(hosts: Callable[..., Path], uneven: Path, tmp_path: Path) -> Callable[..., tuple[Path, FixReport]]:
    """`fix(host kind, adapter, source)` repairs into a fresh folder."""

    def run(kind: str, adapter: Path, source: str, out: str = "out", **changes: Any) -> tuple[Path, FixReport]:
        options = dict(SOURCES[source])
        if source in WEIGHT_SOURCES:
            options["unaligned"] = str(hosts(kind, seed=7))
        if source in PROMPT_SOURCES:
            options["prompts"] = uneven
        options.update(changes)
        folder = tmp_path / out
        return folder, fix_adapter(FixSettings(str(adapter), base=str(hosts(kind)), out=folder, **options))

    return run


@pytest.fixture(scope="module")
def dense_inputs() -> Callable[..., dict[str, Tensor]]:
    """`oracle.fade_on_prompts`, with the forward passes of each host and prompt list done once."""
    original = oracle.inputs

    @cache
    def remembered(host: Path, names: tuple[str, ...], ids: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
        return original(host, names, ids)

    return lambda host, names, token_lists: remembered(host, tuple(names), tuple(token_lists))


def promised(
    host: Path,
    unaligned: Path,
    adapter: Path,
    file: Path,
    source: str,
    strength: float,
    energy: float = 0.9,
    rank: int | None = None,
) -> dict[str, Tensor]:
    if source.startswith("prompts"):
        return oracle.fade_on_prompts(host, adapter, file, strength, 1.0, PROTECTED_TOKENS)
    modules = oracle.peft_modules(host, adapter)
    aligned, other = oracle.weights(host, modules), oracle.weights(unaligned, modules)
    displacements = {name: aligned[name] - other[name] for name in modules}
    if source == "keep-out protect":
        bases = {name: oracle.leading(displacement, energy, rank)[2] for name, displacement in displacements.items()}
        return oracle.fade_on_prompts(host, adapter, file, strength, 1.0, PROTECTED_TOKENS, bases)
    result = {}
    for name, dense in modules.items():
        solve = oracle.keep_out if source == "keep-out" else oracle.keep_in
        result[name] = solve(dense.update, displacements[name], strength, energy, rank)
        if source == "keep-in":
            result[name] = oracle.truncated(result[name], dense.lora_a.shape[0])
    return result


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def assert_merges_to(host: Path, folder: Path, wanted: Mapping[str, Tensor], limit: float = 1e-5) -> None:
    found = oracle.merged_updates(host, folder)
    assert found.keys() == wanted.keys()
    gaps = {name: oracle.relative_gap(found[name], wanted[name]) for name in wanted}
    assert max(gaps.values()) < limit, gaps


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("host", "kind"), PAIRS)
def test_written_adapter_loads_everywhere_and_merges_to_the_promised_update(
    host: str,
    kind: str,
    source: str,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
    dense_inputs: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = adapters(host, **KINDS[kind])
    out, report = fix(host, adapter, source)
    monkeypatch.setattr(oracle, "inputs", dense_inputs)
    strength = report.strength.value
    # The host runs in float32; the rounding of what it reads grows with λ.
    limit = ROUNDING[KINDS[kind].get("dtype", torch.float32)] * max(1, strength / 4)
    wanted = promised(hosts(host), hosts(host, seed=7), adapter, uneven, source, strength)

    assert_merges_to(hosts(host), out, wanted, limit)
    assert_peft_takes_every_tensor(hosts(host), out)
    assert_transformers_agrees_with_peft(hosts(host), out)
    if source in RANK_KEEPING:
        assert_same_layout(adapter, out)
    if source in (*PROMPT_SOURCES, "keep-out"):
        before, after = tensors_of(adapter), tensors_of(out)
        assert all(same_bits(before[key], after[key]) for key in before if ".lora_B." in key)


@pytest.mark.parametrize(
    ("every", "counts"),
    [
        (2, {"harmful": 0, "lookalikes": 4, "benign": 4}),
        (6, {"harmful": 8, "lookalikes": 2, "benign": 6}),
    ],
)
def test_look_alikes_fade_in_the_place_of_harmful_prompts_or_beside_them_where_they_are_few(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
    tmp_path: Path,
    every: int,
    counts: dict[str, int],
) -> None:
    kinds = with_kinds(uneven, tmp_path / "kinds.jsonl", every)
    adapter = adapters("llama")
    out, report = fix("llama", adapter, "prompts", prompts=kinds)
    assert report.prompt_counts["directions"] == counts
    wanted = promised(hosts("llama"), hosts("llama", seed=7), adapter, kinds, "prompts", report.strength.value)
    assert_merges_to(hosts("llama"), out, wanted)
    plain = promised(hosts("llama"), hosts("llama", seed=7), adapter, uneven, "prompts", report.strength.value)
    assert max(oracle.relative_gap(wanted[name], plain[name]) for name in wanted) > 0.01  # the kinds do count


def assert_peft_takes_every_tensor(host: Path, folder: Path) -> None:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing keys
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module")  # the other hosts' names
        loaded = oracle.with_adapter(host, folder)
    state = peft.get_peft_model_state_dict(loaded)
    stored = tensors_of(folder)
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[key].float(), stored[key].float()) for key in stored)


def assert_transformers_agrees_with_peft(host: Path, folder: Path) -> None:
    plain = oracle.load(host)
    plain.load_adapter(str(folder))
    ids = torch.tensor([[1, 5, 9, 33, 12, 7]])
    with torch.no_grad():
        ours, theirs = plain(ids).logits, oracle.with_adapter(host, folder)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_layout(adapter: Path, out: Path) -> None:
    assert (out / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    before, after = tensors_of(adapter), tensors_of(out)
    layout = {key: (tensor.shape, tensor.dtype) for key, tensor in before.items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in after.items()} == layout


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_exact_rank_is_written_in_the_uniform_layout(
    host: str, adapters: Callable[..., Path], fix: Callable[..., tuple[Path, FixReport]]
) -> None:
    adapter = adapters(host, r=9, **KINDS["rank_pattern"])
    out, _ = fix(host, adapter, "keep-in exact")
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, out))
    assert after["r"] == after["lora_alpha"] == 32  # twice 9, up to a multiple of 16
    assert isinstance(after["lora_alpha"], int)
    assert after["rank_pattern"] == after["alpha_pattern"] == {}
    assert after["use_rslora"] is False
    assert after.keys() == before.keys()
    assert {tensor.shape[0] for key, tensor in tensors_of(out).items() if ".lora_A." in key} == {32}
    assert tensors_of(out).keys() == tensors_of(adapter).keys()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["plain", "rslora", "rank_pattern", "bf16"])
def test_strength_zero_keeps_every_bit(
    source: str, kind: str, adapters: Callable[..., Path], fix: Callable[..., tuple[Path, FixReport]]
) -> None:
    adapter = adapters("llama", **KINDS[kind])
    out, report = fix("llama", adapter, source, strength=0.0)
    before, after = tensors_of(adapter), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    assert (out / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert report.is_unchanged
    assert report.tensors == {"changed": 0, "unchanged": len(before), "carried": 0, "dropped": 0, "total": len(before)}
    assert report.moved == 0


@pytest.mark.parametrize("source", [*SOURCES, "keep-out auto"])
def test_same_inputs_elsewhere_give_the_same_bytes(
    source: str, hosts: Callable[..., Path], adapters: Callable[..., Path], uneven: Path, tmp_path: Path
) -> None:
    written = []
    for place in ("one", "two/deeper"):
        folder = tmp_path / place
        adapter = shutil.copytree(adapters("llama"), folder / "my-adapter")
        (adapter / "tokenizer_config.json").write_text("{}")
        host = shutil.copytree(hosts("llama"), folder / "llama")
        options = {"strength": "auto"} if source == "keep-out auto" else dict(SOURCES[source])
        if source.startswith("keep"):
            options["unaligned"] = str(shutil.copytree(hosts("llama", seed=7), folder / "unaligned"))
        if source.startswith("prompts") or source.endswith("auto"):
            options["prompts"] = shutil.copyfile(uneven, folder / "prompts.jsonl")
        out = folder / "out"
        fix_adapter(FixSettings(str(adapter), base=str(host), out=out, **options))
        written.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert written[0].keys() == {WEIGHTS, CONFIG, "README.md", "csulora.json", "tokenizer_config.json"}
    for name, data in written[0].items():
        assert data == written[1][name], name


# Chunks of memory, the Woodbury form and batch sizes change nothing


@pytest.mark.parametrize("host", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [1, 60_000])
def test_tiny_memory_budget_gives_the_same_update(
    host: str,
    budget: int,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages: list[str] = []
    monkeypatch.setattr(api, "PromptsPath", partial(PromptsPath, budget_bytes=budget))
    collect = inputs.collect_moments
    monkeypatch.setattr(inputs, "collect_moments", lambda *args: stages.append("chunk") or collect(*args))
    out, _ = fix(host, adapters(host), "prompts")
    assert len(stages) > 1
    wanted = promised(hosts(host), hosts(host), adapters(host), uneven, "prompts", STRENGTH)
    assert_merges_to(hosts(host), out, wanted)
    out, _ = fix(host, adapters(host), "keep-out protect", out="protect")
    wanted = promised(hosts(host), hosts(host, seed=7), adapters(host), uneven, "keep-out protect", STRENGTH)
    assert_merges_to(hosts(host), out, wanted)

    auto, auto_report = fix(host, adapters(host), "prompts auto", out="auto")
    monkeypatch.setattr(api, "PromptsPath", PromptsPath)
    roomy, roomy_report = fix(host, adapters(host), "prompts auto", out="roomy")
    assert auto_report.strength == roomy_report.strength
    assert (auto / WEIGHTS).read_bytes() == (roomy / WEIGHTS).read_bytes()


def test_moments_along_the_directions_count_in_the_budget(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    fix: Callable[..., tuple[Path, FixReport]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks: list[int] = []
    collect = prompts_source.collect_moments

    def all_at_once(host: Any, groups: list[InputGroup], prompts: DirectionPrompts, *rest: Any) -> Any:
        chunks.append(sum(group_bytes(group, prompts.tokens) for group in groups))
        return collect(host, groups, prompts, *rest)

    monkeypatch.setattr(prompts_source, "collect_moments", all_at_once)
    fix("llama", adapters("llama"), "prompts")
    (whole,) = chunks
    monkeypatch.setattr(api, "PromptsPath", partial(PromptsPath, budget_bytes=whole))
    fix("llama", adapters("llama"), "prompts", out="prompts")
    assert chunks == [whole, whole]
    monkeypatch.setattr(inputs, "collect_moments", all_at_once)
    fix("llama", adapters("llama"), "keep-out protect", out="protect")
    assert max(chunks[2:]) < whole
    assert sum(chunks[2:]) == whole


@pytest.mark.parametrize("host", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("budget", [1, 10**9])
@pytest.mark.parametrize("source", ["prompts", "keep-out protect"])
def test_keeping_tokens_gives_the_same_update_as_keeping_moments(
    host: str,
    budget: int,
    source: str,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "PromptsPath", partial(PromptsPath, budget_bytes=budget))
    monkeypatch.setattr(inputs, "uses_tokens", lambda _group, _tokens: True)
    out, _ = fix(host, adapters(host), source)
    wanted = promised(hosts(host), hosts(host, seed=7), adapters(host), uneven, source, STRENGTH)
    assert_merges_to(hosts(host), out, wanted)


def test_few_tokens_take_the_woodbury_form_by_themselves(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    fix: Callable[..., tuple[Path, FixReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPT-2's last projection reads 128 features; eight one-word prompts have fewer tokens than that."""
    file = tmp_path / "short.jsonl"
    splits = ("directions", "tuning", "report")
    lines = [
        {"prompt": f"w{8 * split + 4 * side + index}", "label": label, "split": name}
        for split, name in enumerate(splits)
        for side, label in enumerate(("harmful", "benign"))
        for index in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    forms = []
    monkeypatch.setattr(
        "csulora_cli.engine.prompts_source.by_tokens",
        lambda *args: forms.append(args[1].shape) or _by_tokens(*args),
    )
    from csulora_cli.solver.attenuate import by_tokens as _by_tokens

    out, _ = fix("gpt2", adapters("gpt2"), "prompts", prompts=file)
    assert forms
    assert {shape[0] for shape in forms} == {128}
    assert_merges_to(hosts("gpt2"), out, promised(hosts("gpt2"), hosts("gpt2"), adapters("gpt2"), file, "prompts", 3.0))


@pytest.mark.parametrize(
    ("kind", "protect", "strength"), [("bf16", 30.0, 0.125), ("bf16", 100.0, 0.25), ("fp16", 100.0, 0.0625)]
)
def test_rounding_of_a_small_repair_is_not_taken_for_a_wrong_one(
    kind: str,
    protect: float,
    strength: float,
    adapters: Callable[..., Path],
    fix: Callable[..., tuple[Path, FixReport]],
) -> None:
    _, report = fix("llama", adapters("llama", **KINDS[kind]), "prompts", strength=strength, protect=protect)
    rises = [module.objective_after / module.objective_before - 1 for module in report.modules]
    assert 0 < max(rises) < ROUNDING[KINDS[kind]["dtype"]]


def test_what_all_strengths_share_is_computed_once(
    adapters: Callable[..., Path], fix: Callable[..., tuple[Path, FixReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(inputs, "contrast", lambda *args: calls.append(args[0]) or contrast(*args))
    _, report = fix("llama", adapters("llama"), "prompts auto")
    assert len(report.strength.path) > 1
    assert len(calls) == len({id(moment) for moment in calls}) == 8  # two layers, four different inputs in each


@pytest.mark.parametrize("protect", [0.0, 30.0])
def test_protection_is_the_one_asked_for(
    protect: float,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
) -> None:
    out, _ = fix("qwen2", adapters("qwen2"), "prompts", protect=protect)
    host, adapter = hosts("qwen2"), adapters("qwen2")
    assert_merges_to(host, out, oracle.fade_on_prompts(host, adapter, uneven, STRENGTH, protect, PROTECTED_TOKENS))


@pytest.mark.parametrize("options", [{"subspace_energy": 0.5}, {"subspace_energy": 1.0}, {"subspace_rank": 3}])
@pytest.mark.parametrize("source", WEIGHT_SOURCES)
def test_subspace_is_the_one_asked_for(
    source: str,
    options: dict[str, Any],
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
) -> None:
    host, unaligned, adapter = hosts("gpt2"), hosts("gpt2", seed=7), adapters("gpt2", **KINDS["odd"])
    out, report = fix("gpt2", adapter, source, **options)
    energy, rank = options.get("subspace_energy", 0.9) - 1e-9, options.get("subspace_rank")
    assert_merges_to(host, out, promised(host, unaligned, adapter, uneven, source, STRENGTH, energy, rank))
    modules = oracle.peft_modules(host, adapter)
    aligned, other = oracle.weights(host, modules), oracle.weights(unaligned, modules)
    kept = {name: len(oracle.leading(aligned[name] - other[name], energy, rank)[1]) for name in modules}
    assert {module.name: module.directions for module in report.modules} == kept


def test_sharded_hosts_give_the_same_update(
    hosts: Callable[..., Path], adapters: Callable[..., Path], fix: Callable[..., tuple[Path, FixReport]], uneven: Path
) -> None:
    host, unaligned = hosts("llama", shard="20KB"), hosts("llama", seed=7, shard="15KB")
    assert len(list(host.glob("*.safetensors"))) > 2
    adapter = adapters("llama")
    for source in ("prompts", "keep-out"):
        changes = {"unaligned": str(unaligned)} if source == "keep-out" else {}
        whole, _ = fix("llama", adapter, source, out=f"{source}-whole")
        parts, _ = fix("llama", adapter, source, out=f"{source}-parts", **changes)
        assert (whole / WEIGHTS).read_bytes() == (parts / WEIGHTS).read_bytes()


# Orientation


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("host", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["keep-out", "keep-in exact"])
@pytest.mark.parametrize("is_square", [False, True])
def test_orientation_follows_the_layer_and_not_what_fan_in_fan_out_says(
    is_square: bool,
    source: str,
    host: str,
    says: bool,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    uneven: Path,
    fix: Callable[..., tuple[Path, FixReport]],
    tmp_path: Path,
) -> None:
    """PEFT forces it on Conv1D and off on Linear whatever the file says (formats.md, section 1)."""
    square = {"llama": "q_proj", "gpt2": "attn.c_proj"}[host]  # of which no shape tells how it is stored
    made = make_adapter(hosts(host), tmp_path / "made", target_modules=[square]) if is_square else adapters(host)
    adapter = shutil.copytree(made, tmp_path / "my-adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "fan_in_fan_out": says}))
    out, _ = fix(host, adapter, source)
    wanted = promised(hosts(host), hosts(host, seed=7), adapter, uneven, source, STRENGTH)
    assert_merges_to(hosts(host), out, wanted)


# An adapter can be spelled in many ways


def respelled(adapter: Path, folder: Path, spelling: str) -> Path:
    """The same update as (r 4, alpha 8), written differently."""
    shutil.copytree(adapter, folder)
    config, tensors = json.loads((folder / CONFIG).read_text()), tensors_of(folder)
    names = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors})
    if spelling == "rslora":
        config |= {"use_rslora": True, "lora_alpha": 8 / math.sqrt(4)}
    elif spelling == "alpha_pattern":
        config |= {"lora_alpha": 3, "alpha_pattern": dict.fromkeys(names, 8)}
    elif spelling == "negative alpha":
        config["lora_alpha"] = -8
        tensors = {key: -tensor if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    elif spelling == "rotated":
        torch.manual_seed(3)
        turn = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
        for key, tensor in tensors.items():
            turned = tensor.double() @ turn if ".lora_B." in key else torch.linalg.inv(turn) @ tensor.double()
            tensors[key] = turned.float().contiguous()
    elif spelling == "padded":
        config |= {"r": 6, "lora_alpha": 12}
        for key, tensor in tensors.items():
            wide = torch.zeros(tensor.shape[0], 6) if ".lora_B." in key else torch.zeros(6, tensor.shape[1])
            wide[: tensor.shape[0], : tensor.shape[1]] = tensor
            tensors[key] = wide
    (folder / CONFIG).write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("spelling", ["rslora", "alpha_pattern", "negative alpha", "rotated", "padded"])
@pytest.mark.parametrize("source", ["prompts", *WEIGHT_SOURCES])
def test_spelling_of_an_adapter_does_not_change_its_repair(
    source: str,
    spelling: str,
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    fix: Callable[..., tuple[Path, FixReport]],
    tmp_path: Path,
) -> None:
    plain, _ = fix("llama", adapters("llama"), source, out="plain")
    other, _ = fix("llama", respelled(adapters("llama"), tmp_path / "my-adapter", spelling), source, out="other")
    wanted = oracle.merged_updates(hosts("llama"), plain)
    if spelling == "padded" and source == "keep-in":  # more rank to keep: closer to the exact form, never farther
        found = oracle.merged_updates(hosts("llama"), other)
        assert all(torch.linalg.matrix_rank(found[name], rtol=1e-4) == 6 for name in found)
        return
    assert_merges_to(hosts("llama"), other, wanted)


# auto


@pytest.mark.parametrize("host", HOSTS)
def test_auto_takes_the_smallest_strength_that_meets_the_limit(
    host: str, hosts: Callable[..., Path], adapters: Callable[..., Path], fix: Callable[..., Any], uneven: Path
) -> None:
    """Every KL on the path, recomputed with peft, one prompt at a time."""
    _, report = fix(host, adapters(host), "prompts auto", target=0.3)
    record = report.strength
    assert record.is_reached
    assert record.limit is not None
    assert record.adapter_kl is not None
    tuning = [line for line in map(json.loads, uneven.read_text().splitlines()) if line["label"] == "harmful"][2::4]
    reference = first_tokens(hosts(host), None, [line["prompt"] for line in tuning])

    def kl(folder: Path) -> float:
        other = first_tokens(hosts(host), folder, [line["prompt"] for line in tuning])
        return float((reference.exp() * (reference - other)).sum(-1).clamp(max=1).mean())

    assert record.adapter_kl == pytest.approx(kl(adapters(host)), rel=1e-3)
    assert record.limit == pytest.approx(0.3 * record.adapter_kl)
    for point in record.path:
        folder, _ = fix(host, adapters(host), "prompts", out=f"at-{point.strength}", strength=point.strength)
        assert point.harmful_kl == pytest.approx(kl(folder), rel=1e-3, abs=5e-7)  # float32
        assert (point.harmful_kl <= record.limit) == (point.strength >= record.value)


def first_tokens(host: Path, adapter: Path | None, prompts: list[str]) -> Tensor:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(host)
    model = oracle.load(host) if adapter is None else oracle.with_adapter(host, adapter)
    with torch.no_grad():
        rows = [model(torch.tensor([oracle.chat_ids(tokenizer, text)])).logits[0, -1] for text in prompts]
    return torch.stack(rows).double().log_softmax(-1)
