"""Local locations: what is a folder here, and what can be nothing at all."""

import os
from pathlib import Path

import pytest

from csulora_cli.errors import InputError, UsageError
from csulora_cli.locate import ADAPTER_FILES, MODEL_FILES, files_of, locate, locate_model, public_name


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_folder_and_a_file_in_it_are_the_same_place() -> None:
    os.makedirs("org/name")
    Path("org/name/adapter_config.json").touch()
    for given in ("org/name", "org/name/adapter_config.json"):
        location = locate(given, ())
        assert (location.given, location.folder, location.repo_id, location.commit) == (
            given,
            Path("org/name"),
            None,
            None,
        )
        assert location.name == location.label == "name"


def test_the_current_folder_has_a_name(tmp_path: Path) -> None:
    assert locate(".", ()).label == tmp_path.name


def test_a_revision_of_a_local_folder_is_refused() -> None:
    os.makedirs("here")
    with pytest.raises(UsageError, match="--revision v1"):
        locate("here", (), "v1")


def test_two_revisions_are_refused() -> None:
    with pytest.raises(UsageError, match="two revisions given: a and b"):
        locate("org/name@a", (), "b")


@pytest.mark.parametrize(
    "given",
    [
        "", " ",
        "/no/such/folder", "./no", "~/no/such/folder", "~no-such-user/x", "a/b/c", "org/", "@main",
        pytest.param("a" * 5000, id="long"),
        "org/" + "a" * 300, "a\0b", "a\nb/c", "\x1b[31m", "https://huggingface.co/org/name", "a b", "org/na:me",
    ],
)  # fmt: skip
def test_what_is_neither_a_folder_nor_an_id_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="is neither a folder nor a Hub id") as caught:
        locate(given, ())
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/name", "org/name"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/name", "name"),
        ("/home/someone/models/name/", "name"),
        ("../models/name", "name"),
        ("~/models/name", "name"),
        ("C:\\Users\\someone\\name", "name"),
    ],
)
def test_a_public_name_is_no_path(name: str, public: str) -> None:
    assert public_name(name) == public


def test_a_gguf_file_does_not_stand_for_the_adapter_that_it_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"model\.gguf is a GGUF file") as caught:
        locate(str(tmp_path / "model.gguf"), ADAPTER_FILES)
    assert "safetensors" in caught.value.hint


def test_a_gguf_file_is_a_model_by_itself(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    found = locate_model("tiny.gguf", MODEL_FILES, "host")
    assert (found.folder, found.gguf, found.name, found.label) == (Path("."), "tiny.gguf", "tiny", "tiny")
    assert files_of(found, MODEL_FILES) == [Path("tiny.gguf")]


def test_a_folder_is_a_gguf_file_only_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tiny.gguf").write_bytes(b"GGUF")
    assert locate_model("here", MODEL_FILES, "host").gguf == "tiny.gguf"
    (tmp_path / "here" / "model.safetensors.index.json").write_bytes(b"{}")
    assert locate_model("here", MODEL_FILES, "host").gguf is None


@pytest.mark.parametrize("given", ["~no-such-user/x.gguf", "a\0b.gguf", "./no.gguf", "a b/c d.gguf"])
def test_a_gguf_file_that_is_not_there_is_neither(given: str) -> None:
    with pytest.raises(InputError, match="is neither a folder nor a Hub id"):
        locate_model(given, MODEL_FILES, "host")


@pytest.mark.parametrize("name", ["epoch1.safetensors", "0000100_adapters.safetensors", "tokenizer.json"])
def test_a_file_that_would_not_be_read_does_not_stand_for_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name} is not a file that csulora reads by itself") as caught:
        locate(str(tmp_path / name), ())
    assert "adapter_model.safetensors" in caught.value.hint
    assert locate(str(tmp_path / "adapter_model.safetensors"), ()).folder == tmp_path
