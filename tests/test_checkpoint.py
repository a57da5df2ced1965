"""Checkpoints on disk, and matching adapted modules to their weights."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from csulora_cli.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, WeightMatch, match_weights, weight_files
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Site

Shapes = dict[str, tuple[int, ...]]


def lora(name: str, out_features: int = 6, in_features: int = 4) -> Site:
    return Site(name, torch.zeros(2, in_features), torch.zeros(out_features, 2), 2.0, 1.0)


def single(folder: Path, shapes: Shapes) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, folder / SINGLE_NAME)
    return folder


def index(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def matched(folder: Path, *modules: Site, fan_in_fan_out: bool = False) -> dict[str, WeightMatch]:
    with Checkpoint(folder, "host") as checkpoint:
        return match_weights(modules, checkpoint, fan_in_fan_out)


def refused(folder: Path, *modules: Site) -> HostError:
    with pytest.raises(HostError) as caught:
        matched(folder, *modules)
    error = caught.value
    assert error.exit_code == 4
    assert "host" in error.message or str(folder.name) in error.message
    assert "\n" not in error.message + error.hint
    assert "\x1b" not in error.message + error.hint
    return error


# Files


def test_a_single_file(tmp_path: Path) -> None:
    single(tmp_path, {"a.weight": (6, 4), "norm": (3,)})
    with Checkpoint(tmp_path, "host") as checkpoint:
        assert {name: (entry.shape, entry.dtype) for name, entry in checkpoint.tensors.items()} == {
            "a.weight": ((6, 4), "F32"),
            "norm": ((3,), "F32"),
        }
        assert torch.equal(checkpoint.read("a.weight"), torch.full((6, 4), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_in_their_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a.weight": torch.ones(2, 3, dtype=dtype)}, tmp_path / SINGLE_NAME)
    with Checkpoint(tmp_path, "host") as checkpoint:
        assert checkpoint.read("a.weight").dtype is dtype


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(6, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(6, 4)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"z.weight": torch.zeros(6, 4)}, tmp_path / "not-in-the-index.safetensors")
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    index(tmp_path, names)
    assert [file.name for file in weight_files(tmp_path, "host")] == sorted(names.values())
    with Checkpoint(tmp_path, "host") as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "b.weight"}
        assert float(checkpoint.read("a.weight").sum()) == 24
        assert float(checkpoint.read("b.weight").sum()) == 0


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/secret.safetensors", "sub/model.safetensors", "..", "", "model.bin",
        "model.safetensors/../x.safetensors", "model.safetensors\n../x", "a\x1b[31m", "./model.safetensors",
    ],
)  # fmt: skip
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a.weight": torch.ones(6, 4)}, tmp_path / "secret.safetensors")
    error = refused(index(folder, {"a.weight": name}), lora("a"))
    assert "no shards" in error.message


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors", 3])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    assert "no weight_map" in refused(index(tmp_path, weight_map), lora("a")).message


def test_the_file_that_holds_all_is_read_beside_an_index_as_transformers_does(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(6, 4)}, tmp_path / "model-00001-of-00001.safetensors")
    index(single(tmp_path, {"a.weight": (6, 4)}), {"a.weight": "model-00001-of-00001.safetensors"})
    assert [file.name for file in weight_files(tmp_path, "host")] == [SINGLE_NAME]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": NaN}'])
def test_an_index_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    assert INDEX_NAME in refused(tmp_path, lora("a")).message


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(6, 4)}, tmp_path / "model-00001-of-00002.safetensors")
    index(
        tmp_path,
        {f"{name}.weight": f"model-0000{number}-of-00002.safetensors" for number, name in ((1, "a"), (2, "b"))},
    )
    assert "lacks model-00002-of-00002.safetensors" in refused(tmp_path, lora("a")).message


def test_weights_only_as_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickles" in refused(tmp_path, lora("a")).message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert f"lacks {SINGLE_NAME}" in refused(tmp_path, lora("a")).message


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refused(tmp_path / "host", lora("a")).message


@pytest.mark.timeout(30)
def test_pipes_and_folders_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).mkdir()
    assert "lacks" in refused(tmp_path, lora("a")).message
    (tmp_path / SINGLE_NAME).rmdir()
    os.mkfifo(tmp_path / SINGLE_NAME)
    assert "lacks" in refused(tmp_path, lora("a")).message


@pytest.mark.parametrize("data", [b"", b"<html>", save({"a.weight": torch.ones(6, 4)})[:-3]])
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(data)
    assert "not a safetensors file" in refused(tmp_path, lora("a")).message


def test_a_damaged_second_shard_is_named(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(6, 4)}, tmp_path / "first.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    index(tmp_path, {"a.weight": "first.safetensors", "b.weight": "x.safetensors"})
    assert "x.safetensors of the host is not a safetensors file" in refused(tmp_path, lora("a")).message


# Names


@pytest.mark.parametrize(
    ("on_disk", "in_adapter"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("layers.0.q", "base.model.layers.0.q"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("model.language_model.layers.0.q", "layers.0.q"),
        ("lm_head", "lm_head"),
    ],
)
def test_one_prefix_may_differ(tmp_path: Path, on_disk: str, in_adapter: str) -> None:
    folder = single(tmp_path, {f"{on_disk}.weight": (6, 4), f"{on_disk}.bias": (6,)})
    assert matched(folder, lora(in_adapter)) == {in_adapter: WeightMatch(f"{on_disk}.weight", False)}


def test_modules_without_the_prefix_keep_their_names(tmp_path: Path) -> None:
    folder = single(tmp_path, {"h.0.c.weight": (6, 4), "h.1.c.weight": (6, 4), "lm_head.weight": (6, 4)})
    found = matched(folder, lora("transformer.h.0.c"), lora("transformer.h.1.c"), lora("lm_head"))
    assert [match.tensor for match in found.values()] == ["h.0.c.weight", "h.1.c.weight", "lm_head.weight"]


def test_names_as_they_are_win_over_a_renaming(tmp_path: Path) -> None:
    folder = single(tmp_path, {"h.0.c.weight": (6, 4), "old.h.0.c.weight": (6, 4), "0.c.weight": (6, 4)})
    assert matched(folder, lora("h.0.c"))["h.0.c"].tensor == "h.0.c.weight"


def test_the_prefix_that_explains_all_modules_wins(tmp_path: Path) -> None:
    shapes: Shapes = {"a.layers.0.q.weight": (6, 4), "bb.layers.0.q.weight": (6, 4), "bb.layers.1.q.weight": (6, 4)}
    found = matched(single(tmp_path, shapes), lora("layers.0.q"), lora("layers.1.q"))
    assert [match.tensor for match in found.values()] == ["bb.layers.0.q.weight", "bb.layers.1.q.weight"]


def test_a_suffix_alone_is_no_match(tmp_path: Path) -> None:
    refused(single(tmp_path, {"layers.11.q.weight": (6, 4), "xlayers.1.q.weight": (6, 4)}), lora("layers.1.q"))


def test_missing_modules_show_both_sides(tmp_path: Path) -> None:
    folder = single(tmp_path, {"model.layers.0.q.weight": (6, 4), "model.norm.weight": (4,)})
    error = refused(folder, lora("model.layers.0.q"), lora("model.layers.1.q"), lora("model.layers.2.q"))
    assert "1 of 3 adapted modules exist in the host" in error.message
    assert "model.layers.1.q" in error.message
    assert "model.layers.0.q.weight" in error.message
    assert error.hint


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    error = refused(single(tmp_path, {"a\n\x1b[31m.weight": (6, 4)}), lora("b\n\x1b[31m"))
    assert "a\\n\\x1b[31m.weight" in error.message
    assert "b\\n\\x1b[31m" in error.message


# Shapes and orientation


def test_conv1d_is_seen_by_its_shape(tmp_path: Path) -> None:
    folder = single(tmp_path, {"h.0.c_attn.weight": (4, 6)})
    assert matched(folder, lora("h.0.c_attn", 6, 4))["h.0.c_attn"].is_transposed is True


def test_linear_is_seen_by_its_shape_whatever_the_config_says(tmp_path: Path) -> None:
    folder = single(tmp_path, {"q.weight": (6, 4)})
    assert matched(folder, lora("q", 6, 4), fan_in_fan_out=True)["q"].is_transposed is False


def test_a_square_weight_alone_says_nothing(tmp_path: Path) -> None:
    folder = single(tmp_path, {"q.weight": (4, 4)})
    assert matched(folder, lora("q", 4, 4))["q"].is_transposed is None
    assert matched(folder, lora("q", 4, 4), fan_in_fan_out=True)["q"].is_transposed is True


@pytest.mark.parametrize(("stored", "is_transposed"), [((6, 4), False), ((4, 6), True)])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_rectangular_weight_tells_for_the_square_ones(
    tmp_path: Path, stored: tuple[int, int], is_transposed: bool, fan_in_fan_out: bool
) -> None:
    # PEFT ignores fan_in_fan_out where it contradicts the layer (formats.md, section 1), and so must we.
    folder = single(tmp_path, {"q.weight": (4, 4), "up.weight": stored})
    found = matched(folder, lora("q", 4, 4), lora("up", 6, 4), fan_in_fan_out=fan_in_fan_out)
    assert {name: match.is_transposed for name, match in found.items()} == {"q": is_transposed, "up": is_transposed}


@pytest.mark.parametrize("shape", [(6, 5), (4,), (6, 4, 1), (12, 4), (6, 8)])
def test_a_weight_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    error = refused(single(tmp_path, {"q.weight": shape}), lora("q", 6, 4))
    assert str(shape) in error.message
    assert "(6, 4)" in error.message
