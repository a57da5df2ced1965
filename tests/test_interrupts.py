"""Ctrl-C and SIGTERM at every time of a run: during imports, and where libraries swallow or rename the exception."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran

from csulora_cli import api
from csulora_cli.cli import interrupts
from csulora_cli.settings import FixSettings

BOTH = [pytest.param(signal.SIGINT, 130, id="SIGINT"), pytest.param(signal.SIGTERM, 143, id="SIGTERM")]
LINE = f"error: {interrupts.MESSAGE}\n"
ALLOW = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# Sends itself a signal right before the first import of a module.
AT_IMPORT = (
    "def hook(event, args):\n"
    "    if event == 'import' and args[0] == {module!r}: os.kill(os.getpid(), {number})\n"
    "sys.addaudithook(hook)\n"
    "from csulora_cli.cli.main import main; main()\n"
)
SAY_WHEN_IT_LISTENS = (
    "from csulora_cli.cli import interrupts; interrupts.listen(); print('listens', flush=True)\n"
    "from csulora_cli.cli.main import main; main()\n"
)


@pytest.fixture
def arguments(hosts: Callable[..., Path], adapters: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Of a repair that takes no time."""
    models = ["--base", hosts("llama"), "--unaligned", hosts("llama", change=0.3)]
    return list(map(str, ["fix", adapters("llama"), *models, "--out", tmp_path / "out", "--quiet"]))


def start(code: str, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ALLOW + code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("number", "code"), BOTH)
@pytest.mark.parametrize("module", ["typer", "torch", "csulora_cli.api"])
def test_during_imports_the_process_ends_at_once(
    module: str, number: signal.Signals, code: int, arguments: list[str], tmp_path: Path
) -> None:
    is_json = number == signal.SIGINT
    process = start(AT_IMPORT.format(module=module, number=int(number)), [*arguments, *["--json"][:is_json]])
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (code, LINE)
    if is_json:
        assert json.loads(out) == {"error": {"message": interrupts.MESSAGE, "hint": ""}, "exit_code": code}
    else:
        assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_new_process_interrupted_at_twenty_random_times(
    number: signal.Signals, code: int, arguments: list[str], tmp_path: Path
) -> None:
    begun = time.monotonic()
    start(SAY_WHEN_IT_LISTENS, arguments).communicate(timeout=600)
    longest = time.monotonic() - begun
    times, codes = random.Random(0), []
    for _ in range(20):
        process = start(SAY_WHEN_IT_LISTENS, [*arguments, "--overwrite"])
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        time.sleep(times.uniform(0, longest))
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
        assert process.returncode in (0, code), err
        assert err == (LINE if process.returncode else "")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing beside it is left
        codes.append(process.returncode)
    assert any(codes)  # some of them did hit


def _swallow(number: int) -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), number)


def _rename(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        raise RuntimeError("Already borrowed") from None


def _in_a_destructor(number: int) -> None:
    class Object:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    Object()


@pytest.mark.parametrize(("number", "code"), BOTH)
@pytest.mark.parametrize("lose", [_swallow, _rename, _in_a_destructor])
def test_a_signal_that_a_library_loses_ends_the_run(
    lose: Callable[[int], None], number: signal.Signals, code: int, arguments: list[str], tmp_path: Path,
    csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    read = api.read_adapter

    def reading(folder: Path) -> object:
        lose(number)
        return read(folder)

    monkeypatch.setattr(api, "read_adapter", reading)
    ran = csulora(*arguments)
    assert (ran.code, ran.out, ran.err) == (code, "", LINE)
    assert not (tmp_path / "out").exists()


def test_a_later_run_in_the_same_process_knows_nothing_of_it(
    arguments: list[str], csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(api, "read_adapter", lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert csulora(*arguments).code == 130
    assert csulora(*arguments).code == 0


def test_other_exceptions_of_destructors_are_still_reported(
    arguments: list[str], csulora: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Object:
        def __init__(self, _settings: FixSettings, _progress: object) -> None:
            raise KeyboardInterrupt  # not by a signal

        def __del__(self) -> None:
            raise ZeroDivisionError

    monkeypatch.setattr(api, "_Fix", Object)
    ran = csulora(*arguments)
    assert ran.code == 130
    assert "ZeroDivisionError" in ran.err


@pytest.mark.usefixtures("clean_surroundings")
def test_what_the_process_was_told_to_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.listen()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_when_all_is_done_a_signal_changes_nothing(arguments: list[str], csulora: Callable[..., Ran]) -> None:
    assert csulora(*arguments).code == 0
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
