"""Every bad adapter is refused in one line, quickly, in little memory, and nothing is lost by it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from badfiles import BAD_FILES, WEIGHTS, BadFile, CannotMakeError, write
from conftest import Ran
from test_adapter import assert_well_formed

from csulora_cli.adapter import read_adapter
from csulora_cli.api import fix_adapter
from csulora_cli.errors import AdapterError
from csulora_cli.settings import FixSettings

ON_COMMAND_LINE = (
    "cut off after 40 bytes", "empty file", "header that claims 100 MB", "pickle saved as safetensors",
    "lora_A without lora_B", "nan in lora_A, fp16", "product overflows bf16", "config is no UTF-8",
    "config nested 100,000 deep", "r is absurd: 10^4000", "peft_type is LOHA", "a field with a hostile name",
    "only adapter_model.bin", "pipe in the place of adapter_config.json",
    "tensor with a line break, an escape and a bidi mark in its name", "link to a device in the place of " + WEIGHTS,
)  # fmt: skip


def made(bad: BadFile, folder: Path) -> Path:
    """The bad adapter in a new folder."""
    folder.mkdir()
    try:
        bad.make(folder)
    except CannotMakeError as reason:
        pytest.skip(str(reason))
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A former output, which must not be touched."""
    out = tmp_path / "out"
    out.mkdir()
    write(out)
    (out / "csulora.json").write_text("{}")
    return out


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*")}


def test_there_are_enough_of_them_and_none_twice() -> None:
    assert len(BAD_FILES) >= 120
    assert len({bad.name for bad in BAD_FILES}) == len(BAD_FILES)
    assert {bad.name for bad in BAD_FILES} >= set(ON_COMMAND_LINE)


def test_what_they_are_made_from_is_good(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_adapter(tmp_path)


@pytest.mark.timeout(30)  # a hang is a failure
@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: ascii(bad.name))
def test_a_bad_adapter_is_refused(
    bad: BadFile, hosts: Callable[..., Path], output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a canary would land
    folder = made(bad, tmp_path / "adapter")
    before = snapshot(output)
    settings = FixSettings(
        str(folder), base=str(hosts("llama")), unaligned=str(hosts("llama", seed=7)), out=output, overwrite=True
    )
    started = time.process_time()
    with pytest.raises(AdapterError) as caught:
        fix_adapter(settings)
    assert time.process_time() - started < 10  # of its own: the machine may be busy with other things
    assert type(caught.value) is bad.error or bad.error is AdapterError
    assert_well_formed(caught.value)
    assert caught.value.hint
    for name in bad.names:
        assert name in caught.value.message
    assert snapshot(output) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"adapter", "out", "blobs", "outside-" + WEIGHTS,
                                                         "outside-adapter_config.json"}  # fmt: skip


@pytest.mark.parametrize("name", ON_COMMAND_LINE)
def test_on_the_command_line_it_is_two_lines_and_exit_code_4(
    name: str,
    csulora: Callable[..., Ran],
    hosts: Callable[..., Path],
    output: Path,
    tmp_path: Path,
) -> None:
    bad = next(bad for bad in BAD_FILES if bad.name == name)
    folder, before = made(bad, tmp_path / "adapter"), snapshot(output)
    ran = csulora("fix", folder, "--base", hosts("llama"), "--out", output, "--overwrite", "--quiet", "--json")
    first, second = ran.err.splitlines()
    assert (ran.code, first[:7], second[:6]) == (4, "error: ", "hint: ")
    assert json.loads(ran.out) == {
        "error": {"message": first.removeprefix("error: "), "hint": second.removeprefix("hint: ")}, "exit_code": 4,
    }  # fmt: skip
    assert snapshot(output) == before


READ = """
import resource, sys
from pathlib import Path
from csulora_cli.adapter import read_adapter
from csulora_cli.errors import AdapterError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for folder in sys.argv[1:]:
    before = peak()
    try:
        read_adapter(Path(folder))
    except AdapterError:
        print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux")
def test_bombs_take_memory_in_proportion_to_their_size(tmp_path: Path) -> None:
    bombs = [made(bad, tmp_path / str(index)) for index, bad in enumerate(BAD_FILES) if bad.is_bomb]
    good = tmp_path / "good"
    good.mkdir()
    write(good, "{}")  # the first refusal pays for what is loaded late
    command = [sys.executable, "-c", READ, str(good), *map(str, bombs)]
    taken = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1:]
    assert len(taken) == len(bombs)
    for folder, peak in zip(bombs, taken, strict=True):
        on_disk = sum(512 * path.stat().st_blocks for path in folder.iterdir())
        assert int(peak) <= 25 * on_disk + 16 * 2**20, folder
