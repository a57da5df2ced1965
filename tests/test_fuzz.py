"""The fuzzer's short form, and that it notices what it is made to notice."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from csulora_cli import files

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import fuzz  # noqa: E402


def test_two_thousand_inputs_give_adapters_or_errors_of_our_own() -> None:
    outcomes = fuzz.fuzz(2000, seed=1)
    assert outcomes.total() == 2000
    # Mutations that break everything, or nothing, would test little.
    for outcome in ("adapter: read", "adapter: AdapterError", "adapter: UnsupportedError", "settings: UsageError"):
        assert outcomes[outcome] > 20, outcomes


def test_the_same_seed_gives_the_same_inputs() -> None:
    assert fuzz.fuzz(50, seed=3) == fuzz.fuzz(50, seed=3)
    case = fuzz.seeds()[0]
    assert fuzz.mutate(case, random.Random(5)) == fuzz.mutate(case, random.Random(5))


def test_a_case_survives_packing() -> None:
    case = fuzz.seeds()[0]
    assert fuzz.Case.unpacked(case.packed()) == case
    assert fuzz.Case.unpacked(b"\1") == fuzz.Case(b"", b"")


def test_a_crash_of_the_reader_is_noticed_and_its_input_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def careless(data: bytes) -> Any:
        return {}["missing"] if b"\xff" in data else parse(data)

    parse = files.parse_json
    monkeypatch.setattr(files, "parse_json", careless)
    with pytest.raises(KeyError, match="missing"):
        fuzz.fuzz(2000, seed=0, keep=tmp_path / "kept")
    with pytest.raises(KeyError, match="missing"):
        fuzz.check_case(fuzz.Case.unpacked((tmp_path / "kept").read_bytes()), tmp_path)


def test_an_error_that_is_not_fit_to_print_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "printable", lambda value, limit=200: str(value))
    with pytest.raises(fuzz.BrokenPromiseError, match="not fit to print"):
        fuzz.check_case(fuzz.Case(b'{"\\u001b": 1, "\\u001b": 1}', b""), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_inputs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), "--runs", "100000", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100000 inputs" in done.stdout
