"""Validation of settings, and settings from a TOML file."""

import math
import tomllib
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from csulora_cli.errors import UsageError
from csulora_cli.settings import (
    DEFAULT_GEOMETRY,
    DEFAULT_PROTECT,
    DEFAULT_SUBSPACE_ENERGY,
    DEFAULT_WEIGHTS_STRENGTH,
    MAX_STRENGTH,
    TABLES,
    CompareSettings,
    EvalSettings,
    FixSettings,
    Geometry,
    RankMode,
    Source,
    read_config_file,
)

DEFAULTS = Path(__file__).parent.parent / "configs" / "default.toml"
WEIGHTS: dict[str, Any] = {"unaligned": "org/base"}


def refused(**given: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        FixSettings(**{"adapter": "a", **given})
    assert_well_formed(caught.value)
    return caught.value


def assert_well_formed(error: UsageError) -> None:
    assert error.exit_code == 2
    assert "\n" not in error.message + error.hint
    assert "\x1b" not in error.message + error.hint


def test_defaults_of_the_prompts_source() -> None:
    settings = FixSettings("a")
    assert settings.chosen_source is Source.PROMPTS
    assert settings.is_auto
    assert settings.fixed_strength is None
    assert settings.chosen_protect == DEFAULT_PROTECT
    assert (settings.device, settings.dtype, settings.chosen_target) == ("auto", "auto", 0.06)
    assert not settings.overwrite
    assert not settings.trust_remote_code


def test_defaults_of_the_weights_source() -> None:
    settings = FixSettings("a", unaligned="b")
    assert settings.chosen_source is Source.WEIGHTS
    assert not settings.is_auto
    assert settings.fixed_strength == DEFAULT_WEIGHTS_STRENGTH
    assert settings.chosen_geometry is DEFAULT_GEOMETRY is Geometry.KEEP_OUT
    assert settings.chosen_rank is RankMode.KEEP
    assert settings.chosen_energy == DEFAULT_SUBSPACE_ENERGY
    assert settings.chosen_protect == 0
    assert not settings.fades_on_prompts
    assert not settings.runs_prompts


def test_keep_out_that_protects_runs_prompts_and_finds_its_strength() -> None:
    settings = FixSettings("a", **WEIGHTS, protect=0.5, prompts=Path("p.jsonl"))
    assert settings.chosen_source is Source.WEIGHTS
    assert settings.fades_on_prompts
    assert settings.runs_prompts
    assert settings.is_auto
    assert FixSettings("a", **WEIGHTS, protect=0.5, prompts=Path("p.jsonl"), strength=2.0).fixed_strength == 2.0
    assert not FixSettings("a", **WEIGHTS, protect=0.0).runs_prompts


@pytest.mark.parametrize("strength", [0, 0.0, 1, 2.5, MAX_STRENGTH])
def test_a_fixed_strength(strength: float) -> None:
    settings = FixSettings("a", strength=strength)
    assert settings.fixed_strength == strength
    assert not settings.is_auto


def test_auto_strength_with_the_weights_source_may_read_prompts() -> None:
    assert FixSettings("a", **WEIGHTS, strength="auto", prompts=Path("p.jsonl")).is_auto


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"adapter": ""}, "no adapter"),
        ({"strength": -1}, "--strength"),
        ({"strength": math.nan}, "--strength"),
        ({"strength": math.inf}, "--strength"),
        ({"strength": MAX_STRENGTH * 2}, "--strength"),
        ({"strength": "much"}, "--strength"),
        ({"strength": "a\n\x1b[31m"}, "--strength"),
        ({"strength": 10**400}, "--strength"),
        ({"protect": -0.1}, "--protect"),
        ({"protect": math.nan}, "--protect"),
        ({"target": -0.1}, "--target"),
        ({"target": 1.1}, "--target"),
        ({"target": math.nan}, "--target"),
        ({"device": "gpu"}, "--device"),
        ({"device": "cuda:"}, "--device"),
        ({"device": "cuda:0 "}, "--device"),
        ({"device": "CPU\n"}, "--device"),
        ({"dtype": "float64"}, "--dtype"),
        ({"dtype": "int8\x1b"}, "--dtype"),
        ({**WEIGHTS, "subspace_energy": 0.0}, "--subspace-energy"),
        ({**WEIGHTS, "subspace_energy": 1.01}, "--subspace-energy"),
        ({**WEIGHTS, "subspace_energy": math.nan}, "--subspace-energy"),
        ({**WEIGHTS, "subspace_rank": 0}, "--subspace-rank"),
        ({**WEIGHTS, "subspace_rank": -3}, "--subspace-rank"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], option: str) -> None:
    assert option in refused(**given).message


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"source": Source.WEIGHTS}, "--source weights"),
        ({**WEIGHTS, "protect": 1.0, "geometry": Geometry.KEEP_IN}, "--protect"),
        ({**WEIGHTS, "prompts": Path("p")}, "--prompts"),
        ({**WEIGHTS, "prompts": Path("p"), "strength": 2.0}, "--prompts"),
        ({**WEIGHTS, "prompts": Path("p"), "protect": 0.0}, "--prompts"),
        ({"source": Source.PROMPTS, **WEIGHTS}, "--unaligned"),
        ({"geometry": Geometry.KEEP_IN}, "--geometry"),
        ({"subspace_energy": 0.5}, "--subspace-energy"),
        ({"subspace_rank": 3}, "--subspace-rank"),
        ({"rank": RankMode.KEEP}, "--rank"),
        ({**WEIGHTS, "rank": RankMode.EXACT}, "--rank exact"),
        ({**WEIGHTS, "rank": RankMode.EXACT, "geometry": Geometry.KEEP_OUT}, "--rank exact"),
        ({**WEIGHTS, "subspace_rank": 3, "subspace_energy": 0.5}, "exclude each other"),
    ],
)
def test_settings_that_the_source_does_not_read_are_refused(given: dict[str, Any], option: str) -> None:
    assert option in refused(**given).message


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:12"])
def test_devices(device: str) -> None:
    assert FixSettings("a", device=device).device == device


# TOML


def config(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "fix.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config_file(path, "fix")


def refused_config(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        config(tmp_path, text)
    assert_well_formed(caught.value)
    assert "fix.toml" in caught.value.message
    return caught.value.message


def test_every_kind_of_value(tmp_path: Path) -> None:
    text = """
        [fix]
        base = "org/host"
        unaligned = "org/base"
        out = "some/folder"
        source = "weights"
        geometry = "keep-in"
        rank = "exact"
        strength = 4
        target = 0
        subspace-energy = 0.5
        trust_remote_code = true
        revision = ""
        """
    given = config(tmp_path, text)
    assert given == {
        "base": "org/host", "unaligned": "org/base", "out": Path("some/folder"), "source": Source.WEIGHTS,
        "geometry": Geometry.KEEP_IN, "rank": RankMode.EXACT, "strength": 4, "target": 0.0, "subspace_energy": 0.5,
        "trust_remote_code": True,
    }  # fmt: skip
    settings = FixSettings("a", **given)
    assert settings.fixed_strength == 4.0
    assert type(settings.source) is Source
    assert type(settings.target) is float


@pytest.mark.parametrize("text", ["", "[fix]", "# nothing"])
def test_an_empty_file_gives_nothing(tmp_path: Path, text: str) -> None:
    assert config(tmp_path, text) == {}


def test_a_report_is_a_page(tmp_path: Path) -> None:
    assert config(tmp_path, '[fix]\nreport = "a b.html"') == {"report": Path("a b.html")}
    for name in ("page.html", "folder/PAGE.HTM"):
        assert FixSettings("a", report=Path(name)).report == Path(name)
    for name in ("page", "page.html.txt", ".html", "\x1b"):
        assert "does not end in .html" in refused(report=Path(name)).message


def test_auto_is_a_strength(tmp_path: Path) -> None:
    assert config(tmp_path, '[fix]\nstrength = "auto"') == {"strength": "auto"}


@pytest.mark.parametrize(
    "text",
    [
        '[fix]\nlambda = 1', '[fix]\nstrenght = 1', '[fix]\n"a\\n\\u001b" = 1', '[fix]\n"" = 1',
        "[fix]\nchosen_rank = 1",        "[fix.more]\nx = 1",
    ],
)  # fmt: skip
def test_unknown_keys_are_refused(tmp_path: Path, text: str) -> None:
    assert "unknown key" in refused_config(tmp_path, text)


@pytest.mark.parametrize("text", ["strength = 1", "[fixes]\nstrength = 1", "[fix]\n[batch]\nx = 1", '"\\n" = 1'])
def test_unknown_tables_are_refused(tmp_path: Path, text: str) -> None:
    assert "unknown tables or keys" in refused_config(tmp_path, text)


def test_fix_must_be_a_table(tmp_path: Path) -> None:
    assert "is not a table" in refused_config(tmp_path, "fix = 3")
    assert "is not a table" in refused_config(tmp_path, "[[fix]]\nstrength = 1")


@pytest.mark.parametrize(
    "line",
    [
        'source = "both"', "source = 1", "source = []", 'geometry = "keep"', 'rank = "full"', 'strength = "much"',
        "strength = true", "strength = [1]", 'protect = "1"', "protect = true", 'target = "0.1"', "subspace_rank = 1.0",
        'subspace_rank = "4"', "subspace_rank = true", "subspace_energy = false", "overwrite = 1",
        'overwrite = "yes"', "base = 3", "out = 3", "out = []", "device = 0", "prompts = {a = 1}", "dtype = 32",
        "revision = 2020-01-01", 'source = "a\\n\\u001b[31m"',
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_refused(tmp_path: Path, line: str) -> None:
    message = refused_config(tmp_path, f"[fix]\n{line}")
    assert line.split(" ", maxsplit=1)[0] in message


@pytest.mark.parametrize("key", ["strength", "protect", "target", "subspace_energy"])
def test_a_number_beyond_all_bounds_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "fix.toml"
    path.write_text(f"[fix]\n{key} = {10**400}\n")
    with pytest.raises(UsageError) as caught:
        FixSettings("a", **read_config_file(path, "fix"), **(WEIGHTS if key == "subspace_energy" else {}))
    assert_well_formed(caught.value)


@pytest.mark.parametrize(
    "text", ["[fix", "x = ", b"\xff\xfe", "[fix]\nstrength = 1\nstrength = 2", b"\xef\xbb\xbf[fix]"]
)
def test_what_is_no_toml_is_refused(tmp_path: Path, text: str | bytes) -> None:
    assert "is not TOML" in refused_config(tmp_path, text)


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing\n.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot read") as caught:
            read_config_file(path, "fix")
        assert_well_formed(caught.value)


COMMANDS: dict[str, dict[str, Any]] = {
    "fix": {"adapter": "a"}, "eval": {"adapters": ("a",)}, "compare": {"adapter": "a"},
}  # fmt: skip


def test_default_toml_has_a_table_for_every_command() -> None:
    assert list(tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))) == list(TABLES) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_default_toml_lists_every_setting_but_the_adapter(command: str) -> None:
    document = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    assert set(document[command]) == {field.name for field in fields(TABLES[command])} - set(COMMANDS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_default_toml_holds_the_defaults(command: str) -> None:
    kind, needed = TABLES[command], COMMANDS[command]
    assert kind(**needed, **read_config_file(DEFAULTS, command)) == kind(**needed)
    table = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))[command]
    want = {field.name: "" if field.default is None else field.default for field in fields(kind)}
    want = {name: str(value) if isinstance(value, StrEnum) else value for name, value in want.items()}  # as TOML has it
    assert all(table[name] == want[name] and type(table[name]) is type(want[name]) for name in table)


def test_a_file_may_hold_the_tables_of_several_commands(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text('[fix]\nstrength = 2\n[eval]\nlimit = 3\nsave-answers = "a.jsonl"\n')
    assert read_config_file(path, "fix") == {"strength": 2.0}
    assert read_config_file(path, "eval") == {"limit": 3, "save_answers": Path("a.jsonl")}


@pytest.mark.parametrize("key", ["adapter", "strength", "adapters"])
def test_keys_of_another_command_and_adapters_are_unknown(tmp_path: Path, key: str) -> None:
    path = tmp_path / "eval.toml"
    path.write_text(f'[eval]\n{key} = "x"\n')
    with pytest.raises(UsageError, match="unknown key"):
        read_config_file(path, "eval")


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"adapters": ()}, "no adapter"),
        ({"adapters": ("a", "")}, "no adapter"),
        ({"adapters": ("a", "b\n", "b\n")}, "given twice"),
        ({"answer_tokens": 0}, "--answer-tokens"),
        ({"answer_tokens": 10**6}, "--answer-tokens"),
        ({"limit": 0}, "--limit"),
        ({"judge_label": "unsafe"}, "--judge-label"),
        ({"overwrite": True}, "--overwrite"),
        ({"device": "gpu"}, "--device"),
        ({"dtype": "float64"}, "--dtype"),
    ],
)
def test_settings_of_an_evaluation_that_are_wrong(given: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=option) as caught:
        EvalSettings(**{"adapters": ("a",), **given})
    assert_well_formed(caught.value)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ({"adapter": ""}, "no adapter"),
        ({"points": 0}, "--points"),
        ({"points": 10**6}, "--points"),
        ({"answer_tokens": 0}, "--answer-tokens"),
        ({"limit": 0}, "--limit"),
        ({"overwrite": True}, "--overwrite"),
        ({"device": "gpu"}, "--device"),
        ({"dtype": "float64"}, "--dtype"),
    ],
)
def test_settings_of_a_comparison_that_are_wrong(given: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=option) as caught:
        CompareSettings(**{"adapter": "a", **given})
    assert_well_formed(caught.value)


def test_names_of_methods_stand_between_commas() -> None:
    assert CompareSettings("a", methods=" prompts, lssf,,shrink ").method_names == ("prompts", "lssf", "shrink")
    assert CompareSettings("a").method_names is None
