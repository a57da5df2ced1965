"""`fix_adapter`: what the report, the card and csulora.json say, which gates fail, and that errors leave nothing."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from badfiles import with_header

import csulora_cli
from csulora_cli import api
from csulora_cli.api import fix_adapter
from csulora_cli.engine import behaviour, prompts_source, weights_source
from csulora_cli.engine.strength import PATH
from csulora_cli.errors import CsuloraError, HostError, ResourceError, VerificationError
from csulora_cli.report import FixReport
from csulora_cli.settings import FixSettings, Geometry, RankMode
from csulora_cli.solver.split import Split

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SOURCES: dict[str, dict[str, Any]] = {
    "prompts": {},
    "keep-out": {"unaligned": True, "geometry": Geometry.KEEP_OUT},
    "keep-out protect": {"unaligned": True, "protect": 1.0},
    "keep-in": {"unaligned": True, "geometry": Geometry.KEEP_IN},
}


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 2)


@pytest.fixture
def settings(
    hosts: Callable[..., Path], adapters: Callable[..., Path], prompts: Path, tmp_path: Path
) -> Callable[..., FixSettings]:
    """Settings of a small repair; `unaligned=True` takes the weights source."""

    def make(**changes: Any) -> FixSettings:
        options: dict[str, Any] = {"base": str(hosts("llama")), "out": tmp_path / "work" / "out"}
        if changes.pop("unaligned", False):
            options["unaligned"] = str(hosts("llama", change=0.3))
        if "unaligned" not in options or "protect" in changes:
            options["prompts"] = prompts
        return FixSettings(**{"adapter": str(adapters("llama")), **options, **changes})

    return make


def edited(
    adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **config: Any
) -> Path:
    """A copy of an adapter with other config entries or tensors."""
    shutil.copytree(adapter, folder)
    entries = {**json.loads((folder / CONFIG).read_text()), **config}
    (folder / CONFIG).write_text(json.dumps(entries))
    if change is not None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def otherwise_stored(folder: Path) -> None:
    """Put an adapter's tensors in another order, under other metadata and with spaces in the header."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made by": "another program"}}
    data = b""
    for key in sorted(tensors, reverse=True):
        values = tensors[key].numpy().tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[key] = {"dtype": "F32", "shape": list(tensors[key].shape), "data_offsets": offsets}
        data += values
    (folder / WEIGHTS).write_bytes(with_header(header, data))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def texts_of(out: Path) -> str:
    return (out / "csulora.json").read_text() + (out / "README.md").read_text()


# The report


def test_report_is_plain_json_and_lies_beside_the_adapter(settings: Callable[..., FixSettings]) -> None:
    wanted = settings(strength=2.0, protect=0.5)
    report = fix_adapter(wanted)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema_version"] == 1
    assert document["version"] == csulora_cli.__version__
    assert document["exit_code"] == report.exit_code
    assert document["failed_gates"] == report.failed_gates
    assert document["totals"]["moved"] == pytest.approx(report.moved, rel=1e-5)
    assert document.pop("out") == str(wanted.out)
    assert wanted.out is not None
    assert json.loads((wanted.out / "csulora.json").read_text()) == document


def test_counts_add_up(settings: Callable[..., FixSettings]) -> None:
    report = fix_adapter(settings(strength=128.0))
    assert len(report.modules) == 14
    assert report.tensors == {"changed": 14, "unchanged": 14, "carried": 0, "dropped": 0, "total": 28}  # every A, no B
    assert report.prompt_counts == {
        "directions": {"harmful": 8, "lookalikes": 0, "benign": 8},
        "tuning": {"harmful": 4, "benign": 4},
        "report": {"harmful": 4, "benign": 4},
    }
    assert report.behaviour.keys() == {"host", "adapter", "repaired"}
    for found in report.behaviour.values():
        counts = (found.harmful_refused, found.harmful_answered, found.harmful_incoherent)
        assert sum(count.count for count in counts) == 4
        assert {count.total for count in (*counts, found.benign_refused)} == {4}
    host, adapter = report.behaviour["host"], report.behaviour["adapter"]
    assert host.harmful_kl_to_host == host.benign_kl_to_host == adapter.benign_kl_to_adapter == 0
    assert adapter.harmful_kl_to_host > report.behaviour["repaired"].harmful_kl_to_host > 0


@pytest.mark.parametrize(
    ("changes", "recorded"),
    [
        (
            {"strength": 2.0, "protect": 0.5},
            {"source": "prompts", "strength": 2.0, "protect": 0.5, "target": None, "dtype": "float32"},
        ),
        ({}, {"source": "prompts", "protect": 1.0, "target": 0.06, "chat_template": True}),
        ({"dtype": "bfloat16", "strength": 1.0}, {"dtype": "bfloat16"}),
        (
            {"unaligned": True},
            {
                "source": "weights",
                "geometry": "keep-out",
                "strength": 1.0,
                "subspace_energy": 0.9,
                "subspace_rank": None,
            },
        ),
        (
            {"unaligned": True, "protect": 2.0, "strength": 3.0},
            {"source": "weights", "geometry": "keep-out", "strength": 3.0, "protect": 2.0, "subspace_energy": 0.9},
        ),
        (
            {"unaligned": True, "geometry": Geometry.KEEP_IN, "rank": RankMode.EXACT, "subspace_rank": 5},
            {"geometry": "keep-in", "rank": "exact", "subspace_energy": None, "subspace_rank": 5, "device": "cpu"},
        ),
    ],
)
def test_settings_are_recorded_as_they_were_used(
    changes: dict[str, Any], recorded: dict[str, Any], settings: Callable[..., FixSettings]
) -> None:
    report = fix_adapter(settings(**changes))
    assert {key: report.settings[key] for key in recorded} == recorded
    assert report.settings["strength"] == report.strength.value


def test_hashes_are_those_of_the_files(settings: Callable[..., FixSettings], prompts: Path) -> None:
    wanted = settings(strength=2.0)
    report = fix_adapter(wanted)
    assert wanted.out is not None
    assert report.files == {path.name: sha256(path) for path in wanted.out.iterdir() if path.name != "csulora.json"}
    adapter, host = Path(wanted.adapter), Path(str(wanted.base))
    assert report.inputs["adapter"].sha256 == {name: sha256(adapter / name) for name in (CONFIG, WEIGHTS)}
    assert report.inputs["prompts"].sha256 == {prompts.name: sha256(prompts)}
    hashed = report.inputs["host"].sha256
    assert hashed == {name: sha256(host / name) for name in hashed}
    assert hashed.keys() >= {"config.json", "model.safetensors"}


def test_every_host_file_that_shapes_the_prompts_is_hashed(settings: Callable[..., FixSettings]) -> None:
    """Another tokenizer or chat template gives another repair (InputRecord: every file that was used)."""
    hashed = fix_adapter(settings(strength=2.0)).inputs["host"].sha256
    assert hashed.keys() >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("is_weights", [True, False])
def test_no_path_of_this_machine_is_written(
    is_weights: bool, settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", base_model_name_or_path="org/some-model")
    wanted = settings(adapter=str(adapter), strength=1.0, unaligned=is_weights)
    fix_adapter(wanted)
    assert wanted.out is not None
    text = texts_of(wanted.out)
    for path in (wanted.base, wanted.unaligned, wanted.adapter, wanted.prompts, wanted.out, tmp_path, "/tmp"):
        assert path is None or str(path) not in text


def test_adapter_that_names_a_local_base_leaves_no_path_but_in_its_own_config(
    settings: Callable[..., FixSettings], adapters: Callable[..., Path], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = "/home/someone/models/other-model"
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", base_model_name_or_path=elsewhere)
    wanted = settings(adapter=str(adapter), strength=1.0, unaligned=True)
    fix_adapter(wanted)
    assert wanted.out is not None
    assert "/home/someone" not in texts_of(wanted.out)
    assert json.loads((wanted.out / CONFIG).read_text())["base_model_name_or_path"] == elsewhere


# The model card


def front_matter(out: Path) -> list[str]:
    text = (out / "README.md").read_text()
    assert text.startswith("---\n")
    return text.split("---\n")[1].splitlines()


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ("org/some-model", 'base_model: "org/some-model"'),
        ("/home/someone/llama", None),
        ("../models/llama", None),
        ("~/llama", None),
        ("C:\\models\\llama", None),
        ("https://example.org/llama", None),
        ("llama", None),
        ('org/"x: [y]', None),
        ("org/name\nbase_model_relation: merge", None),
        (None, None),
    ],
)
def test_card_names_the_base_as_a_hub_id_or_not_at_all(
    named: str | None,
    line: str | None,
    settings: Callable[..., FixSettings],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", base_model_name_or_path=named)
    wanted = settings(adapter=str(adapter), unaligned=True)
    fix_adapter(wanted)
    assert wanted.out is not None
    lines = front_matter(wanted.out)
    assert [entry for entry in lines if entry.startswith("base_model:")] == ([line] if line else [])
    assert ("base_model_relation: adapter" in lines) == (line is not None)
    assert "library_name: peft" in lines
    assert "- csulora" in lines


def test_card_never_claims_safety(settings: Callable[..., FixSettings]) -> None:
    wanted = settings(strength=1.0)
    fix_adapter(wanted)
    assert wanted.out is not None
    card = (wanted.out / "README.md").read_text()
    assert "do not show that the adapter is safe" in card
    assert "is now safe" not in card


# Warnings and gates


def test_another_base_than_the_adapter_names_is_warned_of(
    settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", base_model_name_or_path="org/some-model")
    report = fix_adapter(settings(adapter=str(adapter), unaligned=True))
    assert len(report.warnings) == 1
    assert "the adapter names org/some-model as its base" in report.warnings[0]


@pytest.mark.parametrize("named", ["org/llama", "/home/someone/llama", None])
def test_the_same_base_elsewhere_is_not_warned_of(
    named: str | None, settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", base_model_name_or_path=named)
    assert fix_adapter(settings(adapter=str(adapter), unaligned=True)).warnings == ()


def test_an_unaligned_model_that_has_nothing_to_do_with_the_host_is_warned_of(
    settings: Callable[..., FixSettings], hosts: Callable[..., Path]
) -> None:
    (warning,) = fix_adapter(replace(settings(unaligned=True), unaligned=str(hosts("llama", seed=7)))).warnings
    assert warning.startswith("host and unaligned model differ by more than the host's own weights in 14 of 14 modules")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_rslora": True}, "rsLoRA"),
        ({"alpha_pattern": {"v_proj": 3}}, "alpha_pattern"),
        ({"use_rslora": True, "alpha_pattern": {"v_proj": 3}}, "rsLoRA and alpha_pattern"),
        ({"lora_alpha": 0, "alpha_pattern": {"v_proj": 3}}, "alpha_pattern and a lora_alpha of 0"),
        ({"lora_alpha": 0}, "a lora_alpha of 0"),
        ({"alpha_pattern": {"v_proj": 8, "no_such_module": 3}}, None),
        ({}, None),
    ],
)
def test_what_a_server_ignores_is_warned_of_where_it_matters(
    config: dict[str, Any],
    said: str | None,
    settings: Callable[..., FixSettings],
    adapters: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter = str(edited(adapters("llama"), tmp_path / "my-adapter", **config))
    report = fix_adapter(settings(adapter=adapter, unaligned=True))
    own = f"llama.cpp ignores {said}, which this adapter uses: converted for it, its updates would have other scales"
    assert report.to_dict()["warnings"] == ([] if said is None else [own])
    # The uniform layout has neither.
    exact = settings(adapter=adapter, unaligned=True, geometry=Geometry.KEEP_IN, rank=RankMode.EXACT, overwrite=True)
    assert fix_adapter(exact).warnings == ()


def test_the_base_that_the_adapter_names_is_taken(settings: Callable[..., FixSettings]) -> None:
    report = fix_adapter(settings(base=None, strength=1.0))  # peft wrote the host's folder into the config
    assert report.inputs["host"].name == "llama"


@pytest.mark.parametrize("is_ours", [True, False], ids=["stored as csulora does", "stored otherwise"])
@pytest.mark.parametrize("source", ["prompts", "weights"])
def test_an_adapter_that_does_not_move_the_host_comes_back_unchanged(
    source: str,
    is_ours: bool,
    settings: Callable[..., FixSettings],
    adapters: Callable[..., Path],
    tmp_path: Path,
    prompts: Path,
) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if ".lora_B." in key:
                tensor.zero_()

    adapter = edited(adapters("llama"), tmp_path / "my-adapter", silence)
    if not is_ours:
        otherwise_stored(adapter)
    changes = {"unaligned": True, "strength": "auto", "prompts": prompts} if source == "weights" else {}
    wanted = settings(adapter=str(adapter), **changes)
    report = fix_adapter(wanted)
    assert report.strength.value == 0
    assert report.strength.is_auto
    assert report.is_unchanged
    assert wanted.out is not None
    for name in (WEIGHTS, CONFIG):
        assert (wanted.out / name).read_bytes() == (adapter / name).read_bytes()
        assert report.files[name] == report.inputs["adapter"].sha256[name]
    assert "Every tensor is written as it was read." in (wanted.out / "README.md").read_text()


@pytest.mark.parametrize("source", SOURCES)
def test_strength_zero_gives_the_files_of_an_adapter_back(
    source: str, settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter")
    otherwise_stored(adapter)
    wanted = settings(adapter=str(adapter), strength=0.0, **SOURCES[source])
    assert fix_adapter(wanted).is_unchanged
    assert wanted.out is not None
    for name in (WEIGHTS, CONFIG):
        assert (wanted.out / name).read_bytes() == (adapter / name).read_bytes()


def test_how_an_adapter_was_stored_makes_no_difference_to_its_repair(
    settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter")
    written = []
    for _ in range(2):
        wanted = settings(adapter=str(adapter), unaligned=True, overwrite=True)
        assert not fix_adapter(wanted).is_unchanged
        assert wanted.out is not None
        written.append((wanted.out / WEIGHTS).read_bytes())
        otherwise_stored(adapter)
    assert written[0] == written[1]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_zero_update_stays_zero_at_a_given_strength(
    strength: float, settings: Callable[..., FixSettings], adapters: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = edited(adapters("llama"), tmp_path / "my-adapter", lambda tensors: [t.zero_() for t in tensors.values()])
    for geometry in Geometry:
        wanted = settings(adapter=str(adapter), unaligned=True, strength=strength, geometry=geometry, overwrite=True)
        report = fix_adapter(wanted)
        assert report.moved == 0
        assert report.is_unchanged


def test_a_host_that_does_not_refuse_fails_a_gate_but_is_written(settings: Callable[..., FixSettings]) -> None:
    wanted = settings(strength=1.0)
    report = fix_adapter(wanted)
    assert report.exit_code == 3
    assert any("the host itself refuses only 0 of 4" in gate for gate in report.failed_gates)
    assert wanted.out is not None
    assert (wanted.out / WEIGHTS).exists()


def test_a_limit_that_no_strength_meets_fails_a_gate(settings: Callable[..., FixSettings]) -> None:
    report = fix_adapter(settings(target=0.0))
    assert report.strength.is_reached is False
    path = report.strength.path
    assert path[-1].strength == PATH[-1]
    adapter_kl, level = report.strength.adapter_kl, path[-1].harmful_kl
    assert adapter_kl is not None
    assert report.strength.value < PATH[-1]
    levelled_off = adapter_kl - 0.98 * (adapter_kl - level)
    assert report.strength.value == next(point.strength for point in path if point.harmful_kl <= levelled_off)
    assert report.exit_code == 3
    assert any(f"no λ up to {PATH[-1]:g}" in gate for gate in report.failed_gates)


def test_no_gate_fails_where_no_model_ran(settings: Callable[..., FixSettings]) -> None:
    report = fix_adapter(settings(unaligned=True))
    assert report.exit_code == 0
    assert report.behaviour == {}


# Progress


class Recorder:
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done: list[int] = []
        self.warnings: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total))
        self.done.append(0)

    def advance(self, steps: int = 1) -> None:
        self.done[-1] += steps

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"strength": 1.0}, "adapter models host answers prompts write check verify measure report"),
        ({}, "adapter models host answers prompts strength write check verify measure report"),
        ({"unaligned": True}, "adapter models displacement write verify report"),
    ],
)
def test_progress_goes_through_the_stages(
    changes: dict[str, Any], names: str, settings: Callable[..., FixSettings]
) -> None:
    progress = Recorder()
    fix_adapter(settings(**changes), progress)
    assert [name for name, _ in progress.stages] == names.split()
    for (name, total), done in zip(progress.stages, progress.done, strict=True):
        assert total is None or done == total, name


# Errors leave nothing


def left_over(wanted: FixSettings) -> list[str]:
    assert wanted.out is not None
    return sorted(path.name for path in wanted.out.parent.glob("*")) if wanted.out.parent.exists() else []


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to 9 bytes"
    ),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "place",
    [
        "csulora_cli.api.PromptsPath",
        "csulora_cli.api.measure_behaviour",
        "transformers.AutoModelForCausalLM.from_pretrained",
    ],
)
def test_out_of_memory_is_a_resource_error(
    place: str, error: Exception, settings: Callable[..., FixSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    wanted = settings(strength=1.0)
    with pytest.raises(ResourceError, match="out of memory") as caught:
        fix_adapter(wanted)
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert left_over(wanted) == []


def test_another_runtime_error_is_not_called_out_of_memory(
    settings: Callable[..., FixSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(api, "PromptsPath", fail)
    wanted = settings(strength=1.0)
    with pytest.raises(RuntimeError, match="mat1"):
        fix_adapter(wanted)
    assert left_over(wanted) == []


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`spoil(3)` makes every solver give factors that much too large."""

    def patch(factor: float) -> None:
        monkeypatch.setattr(prompts_source, "by_moments", lambda a, *_: factor * a)
        monkeypatch.setattr(weights_source, "by_directions", lambda a, *_: factor * a.double())
        closest = Split.closest

        def spoiled(parts: Split, strength: float) -> tuple[Any, Any]:
            columns, rows = closest(parts, strength)
            return columns, factor * rows

        monkeypatch.setattr(Split, "closest", spoiled)

    return patch


@pytest.mark.parametrize("source", SOURCES)
def test_a_solution_worse_than_the_adapter_is_not_written(
    source: str, spoil: Callable[[float], None], settings: Callable[..., FixSettings]
) -> None:
    spoil(3)
    wanted = settings(strength=1.0, **SOURCES[source])
    with pytest.raises(VerificationError, match="came out worse than it went in") as caught:
        fix_adapter(wanted)
    assert caught.value.exit_code == 1
    assert left_over(wanted) == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_solution_of_nan_is_not_written(
    source: str, spoil: Callable[[float], None], settings: Callable[..., FixSettings]
) -> None:
    spoil(float("nan"))
    wanted = settings(strength=1.0, **SOURCES[source])
    with pytest.raises((CsuloraError, RuntimeError)):
        fix_adapter(wanted)
    assert left_over(wanted) == []


def test_a_module_lost_in_writing_is_noticed(
    settings: Callable[..., FixSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    serialise = api.writer.serialise

    def lossy(tensors: dict[str, torch.Tensor]) -> bytes:
        return serialise({key: tensor for key, tensor in tensors.items() if "layers.1.mlp.up_proj" not in key})

    monkeypatch.setattr(api.writer, "serialise", lossy)
    wanted = settings(unaligned=True)
    with pytest.raises(VerificationError, match="does not hold the modules"):
        fix_adapter(wanted)
    assert left_over(wanted) == []


def test_an_error_keeps_the_former_output(
    settings: Callable[..., FixSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(unaligned=True)
    fix_adapter(wanted)
    assert wanted.out is not None
    former = {path.name: path.read_bytes() for path in wanted.out.iterdir()}
    monkeypatch.setattr(weights_source, "by_directions", lambda a, *_: 3 * a.double())
    with pytest.raises(VerificationError):
        fix_adapter(dataclasses.replace(wanted, overwrite=True))
    assert {path.name: path.read_bytes() for path in wanted.out.iterdir()} == former
    assert left_over(wanted) == ["out"]


def test_overwriting_replaces_the_whole_folder(settings: Callable[..., FixSettings]) -> None:
    wanted = settings(unaligned=True)
    fix_adapter(wanted)
    assert wanted.out is not None
    (wanted.out / "stale.json").write_text("{}")
    fix_adapter(dataclasses.replace(wanted, overwrite=True, strength=2.0))
    assert not (wanted.out / "stale.json").exists()
    assert json.loads((wanted.out / "csulora.json").read_text())["strength"]["value"] == 2.0
    assert left_over(wanted) == ["out"]


@pytest.mark.parametrize("is_weights", [True, False])
def test_nan_in_the_host_is_a_host_error(
    is_weights: bool, settings: Callable[..., FixSettings], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    host = shutil.copytree(hosts("llama"), tmp_path / "llama")
    tensors = safetensors.torch.load_file(host / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, host / "model.safetensors", metadata={"format": "pt"})
    wanted = settings(base=str(host), unaligned=is_weights, strength=1.0)
    with pytest.raises(HostError, match="NaN"):
        fix_adapter(wanted)
    assert left_over(wanted) == []


def test_a_report_is_what_the_package_promises() -> None:
    assert csulora_cli.fix_adapter is fix_adapter
    assert csulora_cli.FixReport is FixReport
    assert csulora_cli.FixSettings is FixSettings
    with pytest.raises(AttributeError, match="no attribute 'repair'"):
        _ = csulora_cli.repair
