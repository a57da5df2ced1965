"""Output folders: whole or not at all, nothing of value lost, the same bytes for the same tensors."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from csulora_cli.adapter import Adapter
from csulora_cli.engine.attach import Factors
from csulora_cli.errors import ResourceError, UsageError
from csulora_cli.formats.config import CONFIG_NAME
from csulora_cli.formats.dialect import PEFT
from csulora_cli.formats.targets import find_targets
from csulora_cli.writer import (
    CARD_NAME,
    REPORT_NAME,
    cast_error,
    check_apart,
    check_output,
    copy_companions,
    is_finite,
    serialise,
    staged,
    stored_tensors,
)

# Staging

WEIGHTS_NAME = PEFT.weights_name


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def fill(folder: Path, text: str = "new") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_text(text)


def content(folder: Path) -> str:
    return (folder / CONFIG_NAME).read_text()


def siblings(out: Path) -> set[str]:
    return {entry.name for entry in out.parent.iterdir()} - {out.name}


def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_appears_when_it_is_complete(out: Path) -> None:
    with staged(out) as folder:
        fill(folder)
        assert folder.parent == out.parent
        assert not out.exists()
    assert content(out) == "new"
    assert siblings(out) == set()


def test_an_empty_folder_is_filled(out: Path) -> None:
    out.mkdir(parents=True)
    with staged(out) as folder:
        fill(folder)
    assert content(out) == "new"


def test_a_former_folder_is_replaced_as_a_whole(out: Path) -> None:
    fill(out, "old")
    (out / "left over").touch()
    with staged(out) as folder:
        fill(folder)
        assert content(out) == "old"
    assert {entry.name for entry in out.iterdir()} == {CONFIG_NAME}
    assert content(out) == "new"
    assert siblings(out) == set()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("has_former", [False, True])
def test_nothing_appears_and_nothing_is_lost_on_failure(
    out: Path, error: type[BaseException], has_former: bool
) -> None:
    if has_former:
        fill(out, "old")
    with pytest.raises(error), staged(out) as folder:  # noqa: PT012
        fill(folder)
        raise error
    assert out.exists() == has_former
    assert not has_former or content(out) == "old"
    assert siblings(out) == set()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_while_putting_in_place_keeps_the_former_folder(
    out: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(out, "old")
    rename = Path.rename

    def fail_on_staging(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_staging)
    with pytest.raises((ResourceError, KeyboardInterrupt)), staged(out) as folder:
        fill(folder)
    assert content(out) == "old"
    assert siblings(out) == set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_closed_disk_is_a_resource_error(out: Path, code: int) -> None:
    with pytest.raises(ResourceError) as caught, staged(out) as folder:  # noqa: PT012
        fill(folder)
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 5
    assert "\n" not in caught.value.message
    assert not out.exists()
    assert siblings(out) == set()


def test_what_a_dead_run_left_is_removed(out: Path) -> None:
    fill(out.parent / f".out.partial-{dead_pid()}", "half")
    fill(out.parent / f".out.partial-{os.getpid()}", "half")  # a number that is used again
    with staged(out) as folder:
        fill(folder)
    assert content(out) == "new"
    assert siblings(out) == set()


def test_what_a_living_run_writes_is_left_alone(out: Path) -> None:
    alive = out.parent / f".out.partial-{os.getppid()}"
    fill(alive, "half")
    with staged(out) as folder:
        fill(folder)
    assert content(alive) == "half"


def test_a_former_folder_whose_successor_never_came_is_brought_back(out: Path) -> None:
    fill(out.parent / f".out.former-{dead_pid()}", "old")
    with pytest.raises(ValueError, match="stop"), staged(out):
        raise ValueError("stop")
    assert content(out) == "old"
    assert siblings(out) == set()


@pytest.mark.parametrize("ending", ["x", "", "²", "9" * 30])
def test_names_that_end_in_no_process_id_do_not_stop_a_run(out: Path, ending: str) -> None:
    fill(out.parent / f".out.partial-{ending}", "mine")
    with staged(out) as folder:
        fill(folder)
    assert content(out) == "new"


def test_a_name_with_wildcards_touches_no_other_output(tmp_path: Path) -> None:
    pid = dead_pid()
    fill(tmp_path / f".a.former-{pid}", "of another output")
    fill(tmp_path / f".[ab].partial-{pid}", "half")
    with staged(tmp_path / "[ab]") as folder:
        fill(folder)
    assert content(tmp_path / f".a.former-{pid}") == "of another output"
    assert not (tmp_path / f".[ab].partial-{pid}").exists()


@pytest.mark.parametrize("is_filled", [False, True])
def test_a_link_to_a_folder_can_be_the_output(out: Path, tmp_path: Path, is_filled: bool) -> None:
    target = tmp_path / "large disk"
    target.mkdir()
    if is_filled:
        fill(target, "old")
    out.parent.mkdir()
    out.symlink_to(target)
    with staged(out) as folder:
        fill(folder)
    assert content(out) == "new"
    assert siblings(out) == set()


# Where to write


def test_a_fresh_or_empty_folder_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/er/new"):
        check_output(tmp_path / name, tmp_path / "adapter", overwrite=False)


@pytest.mark.parametrize("name", [CONFIG_NAME, REPORT_NAME])
def test_an_adapter_is_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(UsageError, match="exists and is not empty") as caught:
        check_output(folder, tmp_path / "adapter", overwrite=False)
    assert "--overwrite" in caught.value.hint
    check_output(folder, tmp_path / "adapter", overwrite=True)


def test_a_folder_that_holds_no_adapter_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "photos").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no adapter"):
        check_output(tmp_path / "out", tmp_path / "adapter", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_must_not_overlap_the_adapter(tmp_path: Path, overwrite: bool) -> None:
    adapter = tmp_path / "a" / "adapter"
    fill(adapter)
    (tmp_path / "link").symlink_to(adapter)
    (tmp_path / "parent-link").symlink_to(tmp_path / "a")
    places = [adapter, adapter / "inside", tmp_path / "a", tmp_path, adapter / ".." / "adapter", tmp_path / "link"]
    for out in [*places, tmp_path / "parent-link" / "adapter" / "x"]:
        with pytest.raises(UsageError, match="overlaps the adapter"):
            check_output(out, adapter, overwrite)
        with pytest.raises(UsageError, match="overlaps the adapter"):
            check_output(out, tmp_path / "link", overwrite)


def test_a_name_that_only_begins_alike_is_no_overlap(tmp_path: Path) -> None:
    fill(tmp_path / "adapter")
    check_output(tmp_path / "adapter-csulora", tmp_path / "adapter", overwrite=False)


@pytest.mark.parametrize("name", ["file", "file/out", "file/deep/out"])
def test_the_output_must_not_be_or_lie_in_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        check_output(tmp_path / name, tmp_path / "adapter", overwrite=True)


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    out = tmp_path / "a\n\x1b[31m"
    out.touch()
    with pytest.raises(UsageError) as caught:
        check_output(out, tmp_path / "adapter", overwrite=False)
    assert "a\\n\\x1b[31m" in caught.value.message


# Companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


GOOD = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json", "LICENSE",
    "LICENSE.txt", "NOTICE.md", "generation_config.json",
]  # fmt: skip


def test_companions_are_copied_byte_for_byte(source: Path, target: Path) -> None:
    for name in GOOD:
        (source / name).write_bytes(name.encode() + b"\r\n\x00")
    assert copy_companions(source, target) == sorted(GOOD)
    assert {entry.name: entry.read_bytes() for entry in target.iterdir()} == {
        name: name.encode() + b"\r\n\x00" for name in GOOD
    }


@pytest.mark.parametrize(
    "name",
    [
        CARD_NAME, REPORT_NAME, CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin", "training_args.bin", "optimizer.pt",
        "pytorch_model.bin", "rng_state.pth", "model.safetensors", "config.json", "setup.py", ".env", "notes.txt",
        "trainer_state.json", "scaler.pkl", "tokenizer.pkl", "tokenizer.pickle", "tokenizer.bin", "tokenizer_state.pt",
        "tokenizer.pth", "tokenizer.ckpt", "tokenizer.safetensors", "tokenization_evil.py", "tokenizer.py",
        "LICENSE.pkl",
    ],
)  # fmt: skip
def test_weights_pickles_code_and_strangers_are_not_copied(source: Path, target: Path, name: str) -> None:
    (source / name).write_bytes(b"x")
    assert copy_companions(source, target) == []
    assert list(target.iterdir()) == []


def test_links_that_leave_the_folder_are_not_followed(source: Path, target: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "elsewhere").write_text("key")
    links = {
        "tokenizer.json": secret,
        "vocab.txt": Path("/etc/passwd"),
        "merges.txt": Path("../../../secret"),
        "vocab.json": blobs / "elsewhere",  # a folder of that name, but not this repository's
        "LICENSE": tmp_path / "missing",
    }
    for name, goal in links.items():
        (source / name).symlink_to(goal)
    assert copy_companions(source, target) == []
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("is_relative", [False, True])
def test_links_into_the_hub_cache_are_followed(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    blobs = source.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc123").write_text("{}")
    (source / "tokenizer.json").symlink_to("../../blobs/abc123")
    if is_relative:
        monkeypatch.chdir(source.parent)
    assert copy_companions(Path(source.name) if is_relative else source, target) == ["tokenizer.json"]
    assert not (target / "tokenizer.json").is_symlink()
    assert (target / "tokenizer.json").read_text() == "{}"


@pytest.mark.timeout(30)
def test_pipes_folders_and_huge_files_are_not_copied(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csulora_cli.writer.MAX_COPIED_BYTES", 10)
    os.mkfifo(source / "tokenizer.json")
    (source / "tokenizer").mkdir()
    (source / "vocab.txt").write_bytes(b"x" * 11)
    (source / "merges.txt").write_bytes(b"x" * 10)
    assert copy_companions(source, target) == ["merges.txt"]


# Tensors


def adapter_of(config: dict[str, Any], ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 40, generator=generator).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(50, rank, generator=generator).to(dtype)
    config = {"peft_type": "LORA", **config}
    return Adapter(Path("adapter"), config, tensors, PEFT, find_targets(config, tensors), (), (), {})


def grown(adapter: Adapter, name: str, rank: int) -> Factors:
    """A repaired update of another rank, at the module's own scale."""
    (module,) = [module for module in adapter.sites if module.name == name]
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(rank, 40, generator=generator), torch.randn(50, rank, generator=generator)
    return Factors(*factors, module.scale)


def test_the_same_ranks_keep_layout_config_dtype_and_bits() -> None:
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"b": 2}, "custom": None}
    adapter = adapter_of(config, {"a": 4, "b": 2}, torch.bfloat16)
    factors = {module.name: Factors.of(module) for module in adapter.sites}
    tensors, written = stored_tensors(adapter, factors)
    assert written == adapter.config
    assert written is not adapter.config
    assert list(written) == list(adapter.config)
    assert tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensors[key], adapter.tensors[key]) for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_repaired_factor_is_cast_to_the_stored_dtype_once(dtype: torch.dtype) -> None:
    adapter = adapter_of({"r": 4, "lora_alpha": 6}, {"a": 4}, dtype)
    repaired = Factors(adapter.sites[0].lora_a.double() / 3, adapter.sites[0].lora_b, 1.5)
    tensors, _ = stored_tensors(adapter, {"a": repaired})
    assert torch.equal(tensors[adapter.targets[0].key_a], repaired.lora_a.to(dtype))


@pytest.mark.parametrize("config", [{"lora_alpha": 12}, {"lora_alpha": 4}, {"lora_alpha": -6}, {"lora_alpha": 0}])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha_pattern", [{}, {"b": 30.5}])
def test_grown_ranks_give_the_uniform_layout_and_the_same_updates(
    config: dict[str, Any], use_rslora: bool, alpha_pattern: dict[str, float]
) -> None:
    ranks = {"a": 4, "b": 2, "c": 4}
    settings = {
        "r": 4, **config, "use_rslora": use_rslora, "alpha_pattern": alpha_pattern, "rank_pattern": {"b": 2},
        "init_lora_weights": "gaussian", "target_modules": ["a", "b", "c"],
    }  # fmt: skip
    adapter = adapter_of(settings, ranks)
    factors = {"a": grown(adapter, "a", 8), "b": grown(adapter, "b", 4), "c": Factors.of(adapter.sites[2])}
    tensors, written = stored_tensors(adapter, factors)
    changed = {
        "r": 16, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
        "init_lora_weights": True,
    }  # fmt: skip
    assert written == {**adapter.config, **changed}
    assert type(written["r"]) is type(written["lora_alpha"]) is int
    for (module,) in (target.sites for target in find_targets(written, tensors)):  # read back by PEFT's rules
        wanted = factors[module.name]
        assert (module.rank, module.scale) == (16, 1.0)
        have, want = module.lora_b @ module.lora_a, wanted.scale * wanted.lora_b @ wanted.lora_a
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "written"), [(5, 16), (16, 16), (17, 32), (32, 32)])
def test_the_uniform_rank_is_a_multiple_of_sixteen(rank: int, written: int) -> None:
    adapter = adapter_of({"r": 4, "lora_alpha": 4}, {"a": 4})
    tensors, config = stored_tensors(adapter, {"a": grown(adapter, "a", rank)})
    assert config["r"] == written
    assert {min(tensor.shape) for tensor in tensors.values()} == {written}


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {f"name {index}": torch.full((3, 2), float(index)) for index in range(20)}
    data = serialise(tensors)
    assert data == serialise(dict(reversed(tensors.items())))
    assert data == serialise({name: tensor.mT.contiguous().mT for name, tensor in tensors.items()})
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_serialised_reads_back(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = {
        "turned": tensor.clone().mT,
        "graded": tensor.clone().requires_grad_(),
        "top": tensor[:2],
        "rest": tensor[2:],
    }
    found = load(serialise(views))
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_cast_errors_are_relative_to_the_update() -> None:
    adapter = adapter_of({"r": 4, "lora_alpha": 6}, {"a": 4, "b": 4})
    promised = {module.name: Factors.of(module) for module in adapter.sites}
    stored = {
        "a": promised["a"],
        "b": Factors(promised["b"].lora_a, promised["b"].lora_b * 1.01, promised["b"].scale),
    }
    errors = cast_error(adapter.sites, promised, stored)
    assert errors["a"] == pytest.approx(0.0, abs=1e-12)
    assert errors["b"] == pytest.approx(0.01, rel=1e-3)


def test_cast_errors_see_a_wrong_scale_and_a_zero_update() -> None:
    adapter = adapter_of({"r": 4, "lora_alpha": 6}, {"a": 4})
    promised = Factors.of(adapter.sites[0])
    doubled = Factors(promised.lora_a, promised.lora_b, 2 * promised.scale)
    assert cast_error(adapter.sites, {"a": promised}, {"a": doubled})["a"] == pytest.approx(1.0)
    nothing = Factors(promised.lora_a * 0, promised.lora_b, promised.scale)
    assert cast_error(adapter.sites, {"a": nothing}, {"a": nothing})["a"] == 0.0


def test_values_that_overflow_the_stored_dtype_are_seen() -> None:
    adapter = adapter_of({"r": 4, "lora_alpha": 6}, {"a": 4}, torch.float16)
    module = adapter.sites[0]
    tensors, _ = stored_tensors(adapter, {"a": Factors(module.lora_a.float() * 1e6, module.lora_b, module.scale)})
    assert not is_finite(tensors)
    assert is_finite(stored_tensors(adapter, {"a": Factors.of(module)})[0])


@pytest.mark.parametrize("place", ["", "base", "base/deep"])
def test_an_input_that_a_former_output_holds_is_not_removed(tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    (out / place).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError, match="which is read"):
        check_apart(out, None, out / place)
    check_apart(out, None, tmp_path / "other", tmp_path / "out-2")
