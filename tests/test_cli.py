"""The real command line: exit codes, what goes to which stream, and that nothing is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Ran, make_adapter

from csulora_cli import api, html
from csulora_cli.api import fix_adapter
from csulora_cli.cli.main import main
from csulora_cli.engine import behaviour
from csulora_cli.report import FixReport
from csulora_cli.settings import FixSettings, Geometry
from csulora_cli.version import __version__

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ANSI = re.compile(r"\x1b")


@pytest.fixture(autouse=True)
def _surroundings(clean_surroundings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 2)


@dataclass(frozen=True)
class World:
    """A folder with copies of an adapter and its models, and the arguments of a weights repair that takes no time."""

    folder: Path
    adapter: Path
    host: Path
    unaligned: Path
    prompts: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def by_prompts(self) -> list[object]:
        return [self.adapter, "--base", self.host, "--out", self.out, "--prompts", self.prompts, "--strength", 1]

    @property
    def by_weights(self) -> list[object]:
        return [self.adapter, "--base", self.host, "--out", self.out, "--unaligned", self.unaligned]

    def files(self) -> set[Path]:
        return set(self.folder.rglob("*"))

    def edit(self, **entries: Any) -> None:
        config = json.loads((self.adapter / CONFIG).read_text())
        (self.adapter / CONFIG).write_text(json.dumps({**config, **entries}))

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = safetensors.torch.load_file(self.adapter / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, self.adapter / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def world(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.copytree(adapters("llama"), folder / "my-adapter")
    shutil.copyfile(prompts, folder / "prompts.jsonl")
    return World(folder, folder / "my-adapter", hosts("llama"), hosts("llama", change=0.3), folder / "prompts.jsonl")


# Errors: one line, one hint, an exit code, nothing on stdout, nothing left

Prepare = Callable[[World], list[object]]


def _fix_without(option: str, by: str = "by_weights") -> Prepare:
    def prepare(world: World) -> list[object]:
        args = list(getattr(world, by))
        at = args.index(option)
        return args[:at] + args[at + 2 :]

    return prepare


def _with(*extra: object, by: str = "by_weights") -> Prepare:
    return lambda world: [*getattr(world, by), *extra]


def _after(change: Callable[[World], Any], by: str = "by_weights") -> Prepare:
    def prepare(world: World) -> list[object]:
        change(world)
        return list(getattr(world, by))

    return prepare


def _replaced(option: str, value: Callable[[World], object], by: str = "by_weights") -> Prepare:
    def prepare(world: World) -> list[object]:
        args = list(getattr(world, by))
        args[args.index(option) + 1] = value(world)
        return args

    return prepare


def _host(kind: str) -> Callable[[World], Path]:
    from conftest import make_host

    return lambda world: make_host(kind, world.folder.parent / kind)


def _smaller_host(world: World) -> Path:
    import transformers

    folder = world.folder.parent / "smaller"
    config = transformers.AutoConfig.from_pretrained(world.host, hidden_size=16, intermediate_size=24)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _pickle_only(world: World) -> None:
    (world.adapter / WEIGHTS).rename(world.adapter / "adapter_model.bin")


def _add_tensor(name: str) -> Callable[[World], None]:
    return lambda world: world.edit_tensors(lambda tensors: tensors.update({name: torch.ones(32)}))


def _dora(world: World) -> None:
    shutil.rmtree(world.adapter)
    make_adapter(world.host, world.adapter, use_dora=True)


def _modules_to_save(world: World) -> None:
    shutil.rmtree(world.adapter)
    make_adapter(world.host, world.adapter, modules_to_save=["lm_head"])


def _filled_out(world: World) -> None:
    world.out.mkdir()
    (world.out / "thesis.tex").write_text("years of work")


def _filled_and_overwrite(world: World) -> list[object]:
    _filled_out(world)
    return [*world.by_weights, "--overwrite"]


def _file_as_parent(world: World) -> Path:
    (world.folder / "a-file").write_text("")
    return world.folder / "a-file" / "out"


def _config_file(text: str) -> Prepare:
    def prepare(world: World) -> list[object]:
        (world.folder / "settings.toml").write_text(text)
        return [world.adapter, "--config", world.folder / "settings.toml"]

    return prepare


def _prompts_file(text: str) -> Callable[[World], None]:
    return lambda world: world.prompts.write_text(text)


def _after_report(text: str, *extra: object) -> Prepare:
    def prepare(world: World) -> list[object]:
        (world.folder / "page.html").write_text(text)
        return [*world.by_weights, *extra]

    return prepare


FAILURES: dict[str, tuple[Prepare, int, str]] = {
    "no such folder": (lambda _: ["./nowhere", "--base", "x"], 4, "./nowhere is neither a folder nor a Hub id"),
    "home of nobody": (lambda _: ["~nosuchuser/adapter", "--base", "x"], 4, "neither a folder nor a Hub id"),
    "endless name": (lambda _: ["a" * 5000, "--base", "x"], 4, "neither a folder nor a Hub id"),
    "no config": (_after(lambda w: (w.adapter / CONFIG).unlink()), 4, "adapter_config.json is missing"),
    "no weights": (_after(lambda w: (w.adapter / WEIGHTS).unlink()), 4, "adapter_model.safetensors is missing"),
    "config is no JSON": (_after(lambda w: (w.adapter / CONFIG).write_text("{")), 4, "is not valid JSON"),
    "weights cut off": (
        _after(lambda w: (w.adapter / WEIGHTS).write_bytes(b"version https://git-lfs")),
        4,
        "is not a safetensors file",
    ),
    "pickle only": (_after(_pickle_only), 4, "has only adapter_model.bin, a pickle"),
    "NaN in the adapter": (_after(lambda w: w.edit_tensors(_spoil)), 4, "holds NaN or Inf"),
    "another rank": (_after(lambda w: w.edit(r=5)), 4, "should have rank 5"),
    "DoRA": (lambda w: [*_after(_dora)(w), "--dora", "refuse"], 4, "DoRA"),
    "carried and strict": (lambda w: [*_after(_modules_to_save)(w), "--strict"], 4, "--strict: the adapter carries 1"),
    "no PEFT name": (_after(_add_tensor("model.norm.weight")), 4, "is not named as PEFT names"),
    "no LoRA": (_after(lambda w: w.edit(peft_type="IA3")), 4, 'peft_type "IA3"'),
    "no base named": (_fix_without("--base"), 4, "the base model that the adapter names cannot be used"),
    "no base at all": (
        lambda w: [w.edit(base_model_name_or_path=None), *_fix_without("--base")(w)][1:],
        2,
        "does not name its base model",
    ),
    "base is not here": (_replaced("--base", lambda _: "./nowhere"), 4, "./nowhere is neither a folder"),
    "other architecture": (_replaced("--base", _host("gpt2")), 4, "14 of 14 adapted modules are not in the host"),
    "other architecture, by prompts": (
        _replaced("--base", _host("gpt2"), by="by_prompts"),
        4,
        "14 of 14 adapted modules are not in the host",
    ),
    "other size": (_replaced("--base", _smaller_host), 4, "but the adapter changes a weight of"),
    "unaligned of another size": (_replaced("--unaligned", _smaller_host), 4, "of the unaligned model is"),
    "unaligned of another kind": (_replaced("--unaligned", _host("gpt2")), 4, "exist in the unaligned model"),
    "unaligned is the host": (_replaced("--unaligned", lambda w: w.host), 4, "are the same in all 14 adapted modules"),
    "out is filled": (_after(_filled_out), 2, "exists and is not empty"),
    "out is no adapter": (_filled_and_overwrite, 2, "which holds no adapter"),
    "out is the adapter": (_replaced("--out", lambda w: w.adapter), 2, "overlaps the adapter"),
    "out in the adapter": (_replaced("--out", lambda w: w.adapter / "fixed"), 2, "overlaps the adapter"),
    "out holds the adapter": (_replaced("--out", lambda w: w.folder), 2, "overlaps the adapter"),
    "out is a file": (_replaced("--out", lambda w: w.prompts), 2, "is not a folder"),
    "out below a file": (_replaced("--out", _file_as_parent), 2, "a-file"),
    "report is no page": (_with("--report", "report.txt"), 2, "--report report.txt does not end in .html"),
    "report exists": (_after_report("<html>", "--report", "page.html"), 2, "--report page.html exists"),
    "report is somebody else's": (
        _after_report("<html>", "--report", "page.html", "--overwrite"),
        2,
        "--overwrite would replace page.html, which csulora did not write",
    ),
    "report is out": (_with("--out", "a.html", "--report", "a.html"), 2, "--report a.html is where --out a.html"),
    "report above out": (
        _with("--out", "a.html/b", "--report", "a.html"),
        2,
        "--report a.html is where --out a.html/b",
    ),
    "strength is a word": (_with("--strength", "strong"), 2, "--strength is strong, not a number or auto"),
    "strength below 0": (_with("--strength", "-1"), 2, "--strength is -1"),
    "strength is NaN": (_with("--strength", "nan"), 2, "--strength is nan, outside 0 to"),
    "strength is infinite": (_with("--strength", "inf"), 2, "--strength is inf, outside 0 to"),
    "target above 1": (_with("--target", "1.5"), 2, "--target is 1.5, outside 0 to 1"),
    "no such device": (_with("--device", "tpu"), 2, "--device is tpu"),
    "device not here": (_with("--device", "cuda:99"), 2, "--device cuda:99 is not available here"),
    "device far off": (_with("--device", "cuda:300"), 2, "--device cuda:300"),
    "no such dtype": (_with("--dtype", "int8"), 2, "--dtype is int8"),
    "no such geometry": (_with("--geometry", "keep-up"), 2, "keep-up"),
    "subspace rank 0": (_with("--subspace-rank", 0), 2, "--subspace-rank is 0"),
    "both subspaces": (_with("--subspace-rank", 3, "--subspace-energy", 0.5), 2, "exclude each other"),
    "exact rank of keep-out": (_with("--rank", "exact"), 2, "--rank exact applies to --geometry keep-in only"),
    "protect by keep-in": (_with("--protect", 1, "--geometry", "keep-in"), 2, "--protect does not apply to --geometry"),
    "prompts not read": (_with("--prompts", "prompts.jsonl"), 2, "--prompts is not read by the weights source"),
    "geometry by prompts": (_with("--geometry", "keep-in", by="by_prompts"), 2, "--geometry applies to the weights"),
    "rank by prompts": (_with("--rank", "keep", by="by_prompts"), 2, "--rank applies to the weights source only"),
    "subspace by prompts": (_with("--subspace-rank", 2, by="by_prompts"), 2, "--subspace-rank applies to the weights"),
    "unaligned by prompts": (_with("--source", "prompts"), 2, "--unaligned applies to the weights source only"),
    "weights without unaligned": (
        _with("--source", "weights", by="by_prompts"),
        2,
        "--source weights needs the unaligned checkpoint",
    ),
    "revision of a folder": (_with("--revision", "main"), 2, "--revision main does not apply to the local folder"),
    "no such config": (lambda w: [w.adapter, "--config", "nowhere.toml"], 2, "cannot read --config nowhere.toml"),
    "config is no TOML": (_config_file("[fix"), 2, "is not TOML"),
    "config has another table": (_config_file("[train]\n"), 2, "unknown tables or keys"),
    "config has another key": (_config_file("[fix]\nlambda = 1\n"), 2, "unknown key lambda"),
    "config has another type": (_config_file('[fix]\ntarget = "low"\n'), 2, "target in --config"),
    "config has a bad value": (_config_file("[fix]\nstrength = -1\n"), 2, "--strength is -1"),
    "no such option": (_with("--lambda", 1), 2, "--lambda"),
    "prompts not there": (_replaced("--prompts", lambda _: "nowhere.jsonl", by="by_prompts"), 4, "nowhere.jsonl"),
    "prompts are no JSON": (_after(_prompts_file("how do I\n"), by="by_prompts"), 4, "line 1 is not a JSON object"),
    "prompts have no label": (_after(_prompts_file('{"prompt": "a"}\n'), by="by_prompts"), 4, "line 1: label is None"),
    "too few prompts": (
        _after(_prompts_file('{"prompt": "a", "label": "benign"}\n'), by="by_prompts"),
        4,
        "at least 4 are needed",
    ),
    "prompts are empty": (_after(_prompts_file(""), by="by_prompts"), 4, "at least 4 are needed"),
}
# Their message already says what to type.
WITHOUT_HINT = {
    "strength below 0",
    "strength is NaN",
    "strength is infinite",
    "target above 1",
    "config is no JSON",
    "out below a file",
    "report is out",
    "report above out",
    "subspace rank 0",
    "exact rank of keep-out",
    "no such config",
    "config is no TOML",
    "config has another type",
    "config has a bad value",
    "prompts not there",
    "prompts have no label",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_and_what_next_and_leave_nothing(
    name: str, world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prepare, code, message = FAILURES[name]
    if name == "no base named":
        world.edit(base_model_name_or_path="./gone")
    args = prepare(world)
    before = world.files()
    ran = csulora("fix", *args, "--quiet")
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert message in ran.error
    assert name in WITHOUT_HINT or ran.hint
    assert len([line for line in ran.err.splitlines() if not line.startswith("warning: ")]) <= 2
    assert len(ran.error) <= 700
    assert world.files() == before


@pytest.mark.parametrize("name", ["no such folder", "strength is a word", "no such option", "NaN in the adapter"])
def test_json_of_a_failure_is_one_document(name: str, world: World, csulora: Callable[..., Ran]) -> None:
    prepare, code, message = FAILURES[name]
    ran = csulora("fix", *prepare(world), "--json")
    document = json.loads(ran.out)
    assert document["exit_code"] == ran.code == code
    assert message in document["error"]["message"]
    assert message in ran.error


def test_an_unexpected_error_is_called_a_bug(
    world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise ZeroDivisionError("\x1b[31mby zero")

    monkeypatch.setattr(api, "fix_adapter", fail)
    ran = csulora("fix", *world.by_weights)
    assert ran.code == 1
    assert ran.error == "unexpected ZeroDivisionError: \\x1b[31mby zero"
    assert "This is a bug in csulora" in ran.hint
    monkeypatch.setenv("CSULORA_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["csulora", "fix", *map(str, world.by_weights)])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_is_130(
    flags: list[str], world: World, csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api.card, "model_card", interrupt)
    before = world.files()
    ran = csulora("fix", *world.by_weights, "--quiet", *flags)
    assert ran.code == 130
    assert ran.error == "interrupted; what is written is whole or absent"
    assert world.files() == before
    assert not flags or json.loads(ran.out)["exit_code"] == 130


# Success


def test_a_repair_by_weights(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("fix", *world.by_weights)
    assert ran.code == 0, ran.err
    assert {path.name for path in world.out.iterdir()} == {WEIGHTS, CONFIG, "README.md", "csulora.json"}
    assert "source    weights, keep-out" in ran.out
    assert "strength  λ = 1 (given)" in ran.out
    assert "No prompt was run" in ran.out
    assert f"wrote     {world.out}" in ran.out
    assert "error" not in ran.err


def test_a_repair_by_weights_that_protects_says_what_it_ran(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("fix", *world.by_weights, "--protect", 0.5, "--prompts", "prompts.jsonl", "--strength", 2)
    assert ran.code == 3, ran.err  # the tiny host refuses nothing
    sources = re.search(r"source    (.+)\n {10}(.+)\n", ran.out)
    assert sources is not None
    assert re.fullmatch(r"weights, keep-out, k = \d+ to \d+ directions a module", sources[1])
    assert sources[2] == "prompts, 8 harmful and 8 benign, β = 0.5"
    assert "λ = 2 (given)" in ran.out
    assert "along V, the displacement's directions; nothing else of the update changes" in ran.out
    assert "harmful prompts, along the directions of safety alignment" in (world.out / "README.md").read_text()


def test_a_repair_by_prompts_says_that_a_gate_failed(world: World, csulora: Callable[..., Ran]) -> None:
    args = world.by_prompts
    args[args.index("--strength") + 1] = "auto"
    ran = csulora("fix", *args, "--target", 0.5)
    assert ran.code == 3, ran.err
    assert (world.out / WEIGHTS).exists()
    assert "source    prompts, 8 harmful and 8 benign" in ran.out
    assert "Not reached: the host itself refuses only 0 of 4 harmful prompts" in ran.out
    assert "harmful prompts refused" in ran.out
    assert "running the prompts ..." in ran.err
    assert all(line.endswith(" ...") for line in ran.err.splitlines()), ran.err


def test_json_of_a_success_is_one_document(world: World, csulora: Callable[..., Ran]) -> None:
    ran = csulora("fix", *world.by_weights, "--json")
    document = json.loads(ran.out)
    assert document["exit_code"] == ran.code == 0
    assert document.pop("out") == str(world.out)
    assert document == json.loads((world.out / "csulora.json").read_text())


def test_quiet_prints_nothing(world: World, csulora: Callable[..., Ran]) -> None:
    assert csulora("fix", *world.by_weights, "--quiet") == Ran(0, "", "")
    args = [*world.by_prompts, "--overwrite", "-q"]
    assert csulora("fix", *args) == Ran(3, "", "")


def test_warnings_come_through_quiet(world: World, csulora: Callable[..., Ran]) -> None:
    world.edit(base_model_name_or_path="org/other")
    ran = csulora("fix", *world.by_weights, "--quiet")
    assert ran.err.startswith("warning: the adapter names org/other as its base")
    assert ran.out == ""


def test_out_defaults_to_a_folder_here(world: World, csulora: Callable[..., Ran]) -> None:
    args = _fix_without("--out")(world)
    assert csulora("fix", *args).code == 0
    assert (world.folder / "my-adapter-csulora" / WEIGHTS).exists()
    ran = csulora("fix", *args)
    assert ran.code == 2
    assert "my-adapter-csulora exists and is not empty" in ran.error
    assert csulora("fix", *args, "--overwrite").code == 0


def test_a_file_of_the_adapter_stands_for_its_folder(world: World, csulora: Callable[..., Ran]) -> None:
    assert csulora("fix", world.adapter / WEIGHTS, *world.by_weights[1:]).code == 0


def test_settings_come_from_a_file_and_the_command_line_wins(world: World, csulora: Callable[..., Ran]) -> None:
    path = world.folder / "settings.toml"
    path.write_text(f'[fix]\nbase = "{world.host}"\nunaligned = "{world.unaligned}"\nstrength = 2\nout = "out"\n')
    assert csulora("fix", world.adapter, "--config", path, "--strength", 5).code == 0
    assert json.loads((world.out / "csulora.json").read_text())["strength"]["value"] == 5
    assert csulora("fix", world.adapter, "--config", path, "--overwrite").code == 0
    assert json.loads((world.out / "csulora.json").read_text())["strength"]["value"] == 2


def test_a_report_is_written_beside_the_adapter(world: World, csulora: Callable[..., Ran]) -> None:
    args = [*world.by_weights, "--report", "pages/new page.html"]
    ran = csulora("fix", *args)
    assert ran.code == 0, ran.err
    assert f"wrote     {world.out}\n          'pages/new page.html'\n" in ran.out
    page = world.folder / "pages" / "new page.html"
    first = page.read_bytes()
    assert b"Verified from the written file" in first
    assert [path.name for path in page.parent.iterdir()] == [page.name]
    assert csulora("fix", *args, "--overwrite", "-q").code == 0
    assert page.read_bytes() == first


def test_a_report_in_the_output_folder_comes_and_goes_with_it(world: World, csulora: Callable[..., Ran]) -> None:
    page = world.out / "report.html"
    for flags in ([], ["--overwrite"]):
        assert csulora("fix", *world.by_weights, "--report", page, *flags).code == 0
        assert page.is_file()
        assert (world.out / WEIGHTS).is_file()
    assert page.name not in json.loads((world.out / "csulora.json").read_text())["files"]
    assert csulora("fix", *world.by_weights, "--overwrite").code == 0
    assert not page.exists()


def test_a_report_is_refused_before_the_work_begins(world: World, csulora: Callable[..., Ran]) -> None:
    (world.folder / "page.html").write_text("years of work")
    ran = csulora("fix", *world.by_weights, "--report", "page.html", "--overwrite")
    assert ran.code == 2
    assert [line for line in ran.err.splitlines() if line.endswith(" ...")] == ["reading the adapter ..."]


def test_a_report_comes_from_a_file_of_settings(world: World, csulora: Callable[..., Ran]) -> None:
    (world.folder / "settings.toml").write_text('[fix]\nreport = "page.html"\n')
    assert csulora("fix", *world.by_weights, "--config", "settings.toml").code == 0
    assert html.MARK in (world.folder / "page.html").read_text()


# What it looks like


@pytest.fixture(scope="module")
def reports(
    hosts: Callable[..., Path],
    adapters: Callable[..., Path],
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, FixReport]:
    """One report of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    base = {"adapter": str(adapters("llama", rank_pattern={"q_proj": 12})), "base": str(hosts("llama"))}
    by_weights = {**base, "unaligned": str(hosts("llama", change=0.3))}
    auto = {**base, "prompts": prompts}
    settings = {
        "auto": FixSettings(**auto, out=folder / "auto"),
        "unreached": FixSettings(**auto, target=0.0, out=folder / "unreached"),
        "keep-out": FixSettings(**by_weights, strength="auto", prompts=prompts, out=folder / "keep-out"),
        "protect": FixSettings(**by_weights, protect=1.0, prompts=prompts, out=folder / "protect"),
        "keep-in": FixSettings(**by_weights, geometry=Geometry.KEEP_IN, out=folder / "keep-in"),
    }
    return {name: fix_adapter(wanted) for name, wanted in settings.items()}


def width(line: str) -> int:
    """Columns of a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else not unicodedata.combining(char) for char in line)


@pytest.mark.parametrize("name", ["auto", "unreached", "keep-out", "protect", "keep-in"])
def test_every_line_fits_80_columns_but_paths_and_commands(
    name: str,
    reports: dict[str, FixReport],
    world: World,
    csulora: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "fix_adapter", lambda *_: reports[name])
    lines = csulora("fix", *world.by_weights).out.splitlines()
    too_wide = [line for line in lines if width(line) > 80 and "/" not in line]
    tables = [line for line in lines if re.match(r"^(modules|all|\w+_proj|λ|[\d.]+ |KL|harmful|benign|full) ", line)]
    assert len(tables) > 8 or name == "keep-in"
    assert [line for line in tables if width(line) > 80] == []
    assert too_wide == []


@pytest.mark.parametrize(
    "variables", [{}, {"NO_COLOR": "1"}, {"GITHUB_ACTIONS": "true"}, {"FORCE_COLOR": "1"}], ids=str
)
def test_piped_output_has_no_colour(
    variables: dict[str, str],
    reports: dict[str, FixReport],
    world: World,
    csulora: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    real = csulora("fix", *world.by_weights)
    failed = csulora("fix", "./nowhere")
    monkeypatch.setattr(api, "fix_adapter", lambda *_: reports["auto"])
    shown = csulora("fix", *world.by_weights)
    for ran in (real, shown, failed):
        assert not ANSI.search(ran.out + ran.err)


# Hostile names


EVIL = "\x1b[31mevil\x07\u202e\u2028|`<img src=x>`"


def assert_harmless(text: str) -> None:
    bad = {char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and char != "\n"}
    assert not bad, bad


def _evil_adapter(world: World) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.0.mlp.up_proj" in key]:
            tensors[key.replace("up_proj", EVIL)] = tensors.pop(key)

    world.edit_tensors(rename)
    world.edit(target_modules=None)  # no list of names, so that names beside the usual ones count as well


def _evil_model(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name.replace("up_proj", EVIL)] = tensors.pop(name)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_hostile_names_never_reach_the_terminal_raw(world: World, csulora: Callable[..., Ran]) -> None:
    _evil_adapter(world)
    world.edit(base_model_name_or_path=EVIL)
    failed = csulora("fix", *world.by_weights)
    assert failed.code == 4
    assert "evil" in failed.error
    host, unaligned = _evil_model(world.host, world.folder / "host"), _evil_model(world.unaligned, world.folder / "raw")
    args = [world.adapter, "--base", host, "--unaligned", unaligned, "--out", world.out, "--report", "page.html"]
    ran = csulora("fix", *args)
    assert ran.code == 0, ran.err
    for text in (failed.out, failed.err, ran.out, ran.err):
        assert_harmless(text)
        assert "evil" not in text or "\\x1b[31mevil" in text
    card, page = (world.out / "README.md").read_text(), (world.folder / "page.html").read_text()
    assert_harmless(page)
    assert "<img" not in page
    assert "evil" in page
    assert_harmless(card)
    assert "<img" not in card.replace("\\<img", "")
    assert_harmless((world.out / "csulora.json").read_text())


def test_hostile_folder_names_never_reach_the_terminal_raw(world: World, csulora: Callable[..., Ran]) -> None:
    evil = world.folder / "ad\x1b[31map\u202eter"
    world.adapter.rename(evil)
    args = [evil, *_fix_without("--out")(world)[1:]]
    ran = csulora("fix", *args)
    assert ran.code == 0, ran.err
    again = csulora("fix", *args)
    assert again.code == 2
    assert_harmless(again.err)
    assert_harmless(ran.err)
    assert_harmless(ran.out)


def test_hostile_config_entries_never_reach_the_terminal_raw(world: World, csulora: Callable[..., Ran]) -> None:
    for entries in ({"use_dora": EVIL}, {EVIL: 1}, {"peft_type": EVIL}, {"r": EVIL}, {"rank_pattern": {EVIL + "(": 3}}):
        original = (world.adapter / CONFIG).read_text()
        world.edit(**entries)
        ran = csulora("fix", *world.by_weights)
        assert ran.code == 4, ran.err
        assert_harmless(ran.out + ran.err)
        (world.adapter / CONFIG).write_text(original)


# Own processes

PRELUDE = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN = "from csulora_cli.cli.main import main; main()"
# The model card is made when the output is nearly complete but not in place.
SLEEP_BEFORE_THE_END = (
    "import time, csulora_cli.card as card\n"
    "def wait(*_):\n    print('now', file=sys.stderr, flush=True)\n    time.sleep(300)\n"
    "card.model_card = wait\n"
)
HEAVY = ("torch", "transformers", "huggingface_hub", "numpy", "safetensors", "matplotlib", "jinja2")
TELL_IMPORTS = (
    "import atexit; atexit.register(lambda: "
    f"print('heavy', [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)); "
)


def start(code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, args)],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**environment, **options.pop("env", {})},
        **options,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_signals_leave_nothing(number: signal.Signals, code: int, world: World) -> None:
    before = world.files()
    args = [*world.by_weights, "--report", "page.html"]
    process = start(SLEEP_BEFORE_THE_END + RUN, "fix", *args, stdout=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if line == "now\n":
            break
    assert any("partial" in path.name for path in world.files() - before)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert world.files() == before


@pytest.mark.parametrize(
    ("args", "variables", "shows"),
    [
        (["--version"], {}, f"csulora {__version__}"),
        (["--help"], {"GITHUB_ACTIONS": "true"}, "fix"),
        (["fix", "--help"], {"NO_COLOR": "1"}, "--strength"),
        (["eval", "--help"], {}, "--judge-label"),
        (["compare", "--help"], {}, "--methods"),
        ([], {}, "fix"),
    ],
    ids=str,
)
def test_help_and_version_are_plain_and_import_nothing_heavy(
    args: list[str], variables: dict[str, str], shows: str
) -> None:
    process = start(TELL_IMPORTS + RUN, *args, stdout=subprocess.PIPE, env=variables)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (0 if args else 2)
    assert shows in out + err
    assert err.splitlines()[-1] == "heavy []"
    assert not ANSI.search(out + err)


@pytest.mark.parametrize(
    "args", [["--version"], ["fix", "--help"], ["fix", "x", "--strength", "no", "--json"]], ids=str
)
def test_a_reader_that_has_gone_is_no_news(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(RUN, *args, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert process.returncode == 141
    assert "error: " not in err or "--json" in args


def test_the_installed_command_repairs_and_its_reader_may_leave(world: World) -> None:
    command = Path(sys.executable).parent / "csulora"
    if not command.exists():
        pytest.skip("csulora is not installed as a command")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [str(command), "fix", *map(str, world.by_weights)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=300,
    )
    os.close(write)
    assert done.returncode in (0, 141), done.stderr
    assert all(line.endswith(" ...") for line in done.stderr.splitlines()), done.stderr
    assert (world.out / WEIGHTS).exists()
