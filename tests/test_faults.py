"""Killed, out of disk, out of memory, inputs that change: the input stays, the output is whole or absent."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran, make_adapter, make_guard
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from csulora_cli import api, comparison, evaluation, fitting, opening
from csulora_cli.api import fix_adapter
from csulora_cli.cli import interrupts
from csulora_cli.comparison import compare_methods
from csulora_cli.engine import behaviour, inputs, prompts_source, weights_source
from csulora_cli.engine.host import Batch, Host
from csulora_cli.engine.memory import BatchSize, with_cpu_in_reserve
from csulora_cli.errors import InputError, ResourceError
from csulora_cli.evaluation import evaluate_adapters
from csulora_cli.settings import CompareSettings, EvalSettings, FixSettings

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_whole(out: Path) -> bool:
    """Whether every file that the report lists is there with the hash that it lists."""
    listed = json.loads((out / "csulora.json").read_text())["files"]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    return found.pop("csulora.json") is not None and found == listed


# Killed


@dataclass(frozen=True)
class Finished:
    """One run: its exit code (minus the signal that killed it), and all that it did to the watched folder."""

    code: int
    seconds: float
    err: str
    touches: list[str]


class ForkServer:
    """Runs of the command line that need no import of their own."""

    def __init__(self, folder: Path, first_args: list[object]) -> None:
        self.folder = folder
        script = Path(__file__).with_name("forkserver.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), *map(str, first_args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip

    def run(
        self, args: list[object], below: Path, number: int = 0, event: int = 0, seconds: float | None = None
    ) -> Finished:
        """Run it; a signal goes off before the `event`-th time that it touches `below`, or after some seconds."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        request = {
            "args": list(map(str, args)), "below": str(below), "event": event, "seconds": seconds, "signal": number,
            "stdout": str(out), "stderr": str(err),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code, took = json.loads(self._process.stdout.readline())
        return Finished(code, took, err.read_text(), json.loads(out.read_text() or "[]"))

    def close(self) -> None:
        self._process.communicate(timeout=60)


def repair(adapter: Path, hosts: Callable[..., Path], out: Path) -> list[object]:
    """The arguments of a repair that takes no time."""
    models = ["--base", hosts("llama"), "--unaligned", hosts("llama", change=0.3)]
    return ["fix", adapter, *models, "--out", out, "--quiet"]


@pytest.fixture(scope="module")
def server(
    hosts: Callable[..., Path], adapters: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("server")
    running = ForkServer(folder, repair(adapters("llama"), hosts, folder / "out"))
    yield running
    running.close()


@dataclass(frozen=True)
class Killed:
    """A small repair to interrupt."""

    server: ForkServer
    adapter: Path
    out: Path
    args: list[object]

    def run(self, *more: object, **options: Any) -> Finished:
        return self.server.run([*self.args, "--overwrite", *more], self.out.parent, **options)

    def prepare(self, former: dict[str, bytes] | None) -> None:
        """Nothing, or a former output."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        if former is not None:
            self.out.mkdir(parents=True)
            for name, data in former.items():
                (self.out / name).write_bytes(data)

    def interrupt(self, former: dict[str, bytes] | None, number: int, **when: Any) -> int:
        """Interrupt a run and check what is there; then another run must finish. Returns the exit code."""
        before = contents(self.adapter)
        self.prepare(former)
        ran = self.run("--strength", 2, number=number, **when)
        assert "Traceback" not in ran.err
        assert contents(self.adapter) == before
        if self.out.exists():
            assert contents(self.out) == former or is_whole(self.out)
        if ran.code != -signal.SIGKILL:
            assert ran.code in (0, 128 + number), ran.err
            assert (interrupts.MESSAGE in ran.err) is (ran.code != 0)
            assert former is None or self.out.exists()
            assert {path.name for path in self.out.parent.glob("*")} <= {"out"}  # nothing beside it is left
        again = self.run()
        assert again.code == 0, again.err
        assert contents(self.adapter) == before
        assert is_whole(self.out)
        assert [path.name for path in self.out.parent.iterdir()] == ["out"]
        return ran.code


@pytest.fixture
def killed(server: ForkServer, hosts: Callable[..., Path], tmp_path: Path) -> Killed:
    adapter = make_adapter(hosts("llama"), tmp_path / "adapter", target_modules=["down_proj"], r=2)
    (adapter / "tokenizer.json").write_text("{}")
    out = tmp_path / "here" / "out"
    return Killed(server, adapter, out, repair(adapter, hosts, out))


def touches_and_former(killed: Killed, has_former: bool) -> tuple[list[str], dict[str, bytes] | None]:
    """What a run without interruption does, and the output that it finds."""
    first = killed.run()
    return (killed.run().touches, contents(killed.out)) if has_former else (first.touches, None)


@pytest.mark.parametrize("has_former", [False, True])
def test_interrupted_at_places_all_over_the_writing(killed: Killed, has_former: bool) -> None:
    touches, former = touches_and_former(killed, has_former)
    assert len(touches) > 20
    for event, name in enumerate(touches, start=1):
        numbers = SIGNALS if name == "os.rename" else SIGNALS[event // 4 % len(SIGNALS) :][: event % 4 == 0]
        for number in numbers:
            assert killed.interrupt(former, number, event=event) != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("has_former", [False, True])
@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_at_every_place_of_the_writing(killed: Killed, number: signal.Signals, has_former: bool) -> None:
    touches, former = touches_and_former(killed, has_former)
    for event in range(1, len(touches) + 1):
        killed.interrupt(former, number, event=event)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_at_fifty_random_times(killed: Killed, number: signal.Signals) -> None:
    longest = max(killed.run().seconds for _ in range(3))
    former = contents(killed.out)
    times = random.Random(0)
    codes = [killed.interrupt(former, number, seconds=times.uniform(0, longest)) for _ in range(50)]
    assert any(codes)  # some of them did hit


# The disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`small_disk(kib)` is a folder on a file system of that size; only root can make one."""
    mounted = []

    def mount(kib: int, *options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kib}k", *options]), "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def by_weights(hosts: Callable[..., Path], adapters: Callable[..., Path], tmp_path: Path) -> Callable[..., FixSettings]:
    """Settings of a repair without prompts."""
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters("llama"), adapter)

    def make(**changes: Any) -> FixSettings:
        options = {"adapter": str(adapter), "base": str(hosts("llama")), "unaligned": str(hosts("llama", change=0.3)),
                   "out": tmp_path / "here" / "out"}  # fmt: skip
        return FixSettings(**{**options, **changes})

    return make


@pytest.mark.parametrize("kib", range(4, 36, 4))
def test_a_full_disk_leaves_nothing(
    kib: int, small_disk: Callable[..., Path], by_weights: Callable[..., FixSettings]
) -> None:
    disk = small_disk(kib)
    with pytest.raises(ResourceError, match=r"cannot write .* No space left on device") as caught:
        fix_adapter(by_weights(out=disk / "out"))
    assert caught.value.exit_code == 5
    assert caught.value.hint
    assert list(disk.iterdir()) == []


def test_a_full_disk_keeps_the_former_output(
    small_disk: Callable[..., Path], by_weights: Callable[..., FixSettings]
) -> None:
    disk = small_disk(52)
    fix_adapter(by_weights(out=disk / "out"))
    former = contents(disk)
    with pytest.raises(ResourceError):
        fix_adapter(by_weights(out=disk / "out", overwrite=True))
    assert contents(disk) == former


def test_a_disk_that_is_read_only(
    small_disk: Callable[..., Path], csulora: Callable[..., Ran], by_weights: Callable[..., FixSettings]
) -> None:
    settings = by_weights(out=small_disk(1024, "ro") / "out")
    ran = csulora("fix", settings.adapter, "--base", settings.base, "--unaligned", settings.unaligned, "--out",
                  settings.out, "--quiet")  # fmt: skip
    assert ran.code == 5
    assert "Read-only file system" in ran.error
    assert ran.hint


@pytest.mark.parametrize("stage", ["verify", "report"])
def test_an_output_folder_that_vanishes_is_no_input_error(stage: str, by_weights: Callable[..., FixSettings]) -> None:
    settings = by_weights()
    assert settings.out is not None
    with pytest.raises(ResourceError, match="has vanished"):
        fix_adapter(settings, At(stage, lambda: shutil.rmtree(settings.out.parent)))
    assert not settings.out.exists()


# Inputs that change


class At:
    """Progress that does something when a stage begins, and keeps warnings."""

    def __init__(self, stage: str = "", act: Callable[[], object] = lambda: None) -> None:
        self._stage = stage
        self._act = act
        self.warnings: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        if name == self._stage:
            self._act()

    def advance(self, steps: int = 1) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [_grow, _replace, Path.unlink], ids=["grown", "replaced", "removed"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changes_meanwhile_is_an_input_error(
    name: str, change: Callable[[Path], object], by_weights: Callable[..., FixSettings]
) -> None:
    settings = by_weights()
    assert settings.out is not None
    file = Path(settings.adapter) / name
    with pytest.raises(InputError, match=r"changed while it was being used|missing") as caught:
        fix_adapter(settings, At("displacement", lambda: change(file)))
    assert name in caught.value.message
    assert caught.value.hint
    assert list(settings.out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_comes_back_as_it_is_is_never_other_bytes_than_were_read(
    name: str, by_weights: Callable[..., FixSettings]
) -> None:
    settings = by_weights(strength=0.0)
    assert settings.out is not None
    file = Path(settings.adapter) / name

    def change_behind_its_stamp() -> None:
        before = file.stat()
        file.write_bytes(file.read_bytes()[:-1] + b" ")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(InputError, match="changed while it was being used") as caught:
        fix_adapter(settings, At("write", change_behind_its_stamp))
    assert name in caught.value.message
    assert list(settings.out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_host_that_changes_meanwhile_is_an_input_error(
    name: str, by_weights: Callable[..., FixSettings], hosts: Callable[..., Path], tmp_path: Path
) -> None:
    host = tmp_path / "host"
    shutil.copytree(hosts("llama"), host)
    settings = by_weights(base=str(host))
    with pytest.raises(InputError, match="changed while it was being used"):
        fix_adapter(settings, At("write", lambda: _replace(host / name)))
    assert settings.out is not None
    assert list(settings.out.parent.iterdir()) == []


CUT_WHEN_THE_WEIGHTS_ARE_READ = """
import os, sys
from csulora_cli.cli import console, main
from csulora_cli.files import Stamp
file, when = sys.argv[1:3]
check, stage = Stamp.check, console.TerminalProgress.stage
def cut():
    os.truncate(file, 4096)
def checked(stamp, error):
    check(stamp, error)
    if when == "after the check" and str(stamp.path) == file:
        cut()
def staged(progress, name, total=None):
    stage(progress, name, total)
    if when == "before" and name == "displacement":
        cut()
Stamp.check, console.TerminalProgress.stage = checked, staged
sys.argv[1:] = sys.argv[3:]
main.main()
"""


@pytest.mark.parametrize(("role", "when"), [("host", "before"), ("unaligned", "after the check")])
def test_weights_that_are_cut_off_end_the_run_and_nothing_else_happens(
    role: str, when: str, by_weights: Callable[..., FixSettings], tmp_path: Path
) -> None:
    settings = by_weights()
    models = {"host": tmp_path / "models" / "llama", "unaligned": tmp_path / "models" / "unaligned"}
    shutil.copytree(str(settings.base), models["host"])
    shutil.copytree(str(settings.unaligned), models["unaligned"])
    file = models[role] / "model.safetensors"
    command = ["fix", settings.adapter, "--base", models["host"], "--unaligned", models["unaligned"], "--out",
               settings.out, "--quiet"]  # fmt: skip
    before = contents(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", CUT_WHEN_THE_WEIGHTS_ARE_READ, str(file), when, *map(str, command)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    if when == "before":
        lines = f"error: {file} changed while it was being used\nhint: Run again when it is complete.\n"
        assert (ran.returncode, ran.stderr) == (4, lines)
    else:
        assert ran.returncode == -signal.SIGBUS
    cut = str(file.relative_to(tmp_path))
    assert contents(tmp_path) == {**before, cut: before[cut][:4096]}


@pytest.fixture
def measuring(
    hosts: Callable[..., Path], adapters: Callable[..., Path], prompts: Path, tmp_path: Path
) -> Callable[..., Callable[[Any], Any]]:  # fmt: skip
    """`measuring("eval", …)(progress)` runs `eval` or `compare` on copies in `models`; it writes to `here`."""
    sources = {"adapter": adapters("llama"), "host": hosts("llama"), "unaligned": hosts("llama", change=0.3)}
    models = {name: tmp_path / "models" / name for name in sources}
    for name, folder in models.items():
        shutil.copytree(sources[name], folder)
    guard, here = make_guard(tmp_path / "models" / "judge"), tmp_path / "here"
    adapter, host, unaligned = map(str, models.values())

    def make(command: str, **changes: Any) -> Callable[[Any], Any]:
        common = {"prompts": prompts, "limit": 2, "answer_tokens": 2, "report": here / "page.html", **changes}
        if command == "eval":
            evaluated = EvalSettings((adapter,), host, judge=str(guard), save_answers=here / "answers.jsonl", **common)
            return lambda progress: evaluate_adapters(evaluated, progress)
        compared = CompareSettings(
            adapter, host, unaligned=unaligned, methods="shrink,keep-out", points=2, out=here / "out", **common
        )
        return lambda progress: compare_methods(compared, progress)

    return make


@pytest.mark.parametrize("change", [_grow, _replace], ids=["grown", "replaced"])
@pytest.mark.parametrize(
    ("command", "stage", "name"),
    [
        ("eval", "measure", "adapter/adapter_model.safetensors"),
        ("eval", "report", "host/tokenizer.json"),
        ("eval", "report", "judge/model.safetensors"),
        ("compare", "methods", "adapter/adapter_config.json"),
        ("compare", "strength", "host/model.safetensors"),
        ("compare", "methods", "unaligned/config.json"),
        ("compare", "write", "adapter/adapter_model.safetensors"),
    ],
)
def test_what_changes_while_it_is_measured_is_an_input_error(
    command: str, stage: str, name: str, change: Callable[[Path], object], measuring: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(InputError, match="changed while it was being used") as caught:
        measuring(command)(At(stage, lambda: change(tmp_path / "models" / name)))
    assert name in caught.value.message
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]


# Memory


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
FULL_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.fixture
def by_prompts(
    hosts: Callable[..., Path], adapters: Callable[..., Path], prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., FixSettings]:  # fmt: skip
    """Settings of a repair with prompts."""
    monkeypatch.setattr(behaviour, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(prompts_source, "PROTECTED_TOKENS", 2)

    def make(name: str) -> FixSettings:
        return FixSettings(
            str(adapters("llama")), base=str(hosts("llama")), prompts=prompts, out=tmp_path / name, strength=1.0
        )

    return make


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception], None]:
    """`small_memory(3, error)` makes the model raise the error on more than three prompts at a time."""

    def shrink(most: int, error: Exception) -> None:
        run = Host.run

        def checked(host: Host, batch: Batch, *args: Any, **options: Any) -> Any:
            if len(batch.rows) > most:
                raise error
            return run(host, batch, *args, **options)

        monkeypatch.setattr(Host, "run", checked)
        generate = LlamaForCausalLM.generate

        def checked_generate(model: Any, input_ids: Any, **options: Any) -> Any:
            if len(input_ids) > most:
                raise error
            return generate(model, input_ids=input_ids, **options)

        monkeypatch.setattr(LlamaForCausalLM, "generate", checked_generate)

    return shrink


def factors_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def assert_nearly_equal(left: Path, right: Path) -> None:
    mine, other = factors_of(left), factors_of(right)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, other[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("error", [FULL, FULL_CPU, MemoryError()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [1, 3])
def test_a_model_that_has_no_memory_for_large_batches_gets_small_ones(
    most: int, error: Exception, small_memory: Callable[..., None], by_prompts: Callable[[str], FixSettings]
) -> None:
    usual, small = by_prompts("usual"), by_prompts("small")
    fix_adapter(usual)
    small_memory(most, error)
    progress = At()
    report = fix_adapter(small, progress)
    assert [text for text in progress.warnings if "memory" in text] == [
        "out of memory: going on with smaller batches, which is slower"
    ]
    assert set(progress.warnings) <= set(report.warnings)
    assert usual.out is not None
    assert small.out is not None
    assert_nearly_equal(usual.out, small.out)


def test_a_model_that_has_no_memory_for_one_prompt_is_a_resource_error(
    small_memory: Callable[..., None], by_prompts: Callable[[str], FixSettings]
) -> None:
    small_memory(0, FULL)
    settings = by_prompts("out")
    with pytest.raises(ResourceError, match="out of memory") as caught:
        fix_adapter(settings)
    assert caught.value.exit_code == 5
    assert settings.out is not None
    assert not settings.out.exists()


def test_moments_that_do_not_fit_are_collected_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, by_prompts: Callable[[str], FixSettings]
) -> None:
    usual, small = by_prompts("usual"), by_prompts("small")
    fix_adapter(usual)
    collect = inputs._collect
    held = []

    def checked(host: Any, groups: Any, *args: Any) -> Any:
        if len(groups) > 2:
            raise FULL_CPU
        held.append(len(groups))
        return collect(host, groups, *args)

    monkeypatch.setattr(inputs, "_collect", checked)
    progress = At()
    fix_adapter(small, progress)
    assert any("a part of the modules at a time" in text for text in progress.warnings)
    assert max(held) <= 2
    assert usual.out is not None
    assert small.out is not None
    assert_nearly_equal(usual.out, small.out)


def test_a_solver_without_memory_on_the_device_goes_to_the_cpu() -> None:
    warnings, devices = [], []

    def solve(device: torch.device) -> str:
        devices.append(device.type)
        if device.type != "cpu":
            raise FULL
        return "solved"

    assert with_cpu_in_reserve(solve, torch.device("meta"), warnings.append) == "solved"
    assert with_cpu_in_reserve(solve, torch.device("cpu"), warnings.append) == "solved"
    assert devices == ["meta", "cpu", "cpu"]
    assert warnings == ["out of memory on meta: solving on the CPU, which is slower"]


def test_the_cpu_is_not_tried_for_other_errors_nor_twice() -> None:
    devices = []

    def fail(error: Exception) -> Callable[[torch.device], None]:
        def solve(device: torch.device) -> None:
            devices.append(device.type)
            raise error

        return solve

    with pytest.raises(ValueError, match="other"):
        with_cpu_in_reserve(fail(ValueError("other")), torch.device("meta"), devices.append)
    with pytest.raises(torch.OutOfMemoryError):
        with_cpu_in_reserve(fail(FULL), torch.device("cpu"), devices.append)
    assert devices == ["meta", "cpu"]


def test_moments_without_memory_on_the_device_go_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, by_prompts: Callable[[str], FixSettings]
) -> None:
    collect = prompts_source.collect_moments

    def checked(host: Any, groups: Any, prompts: Any, device: torch.device, advance: Any) -> Any:
        if device.type != "cpu":
            raise FULL
        return collect(host, groups, prompts, device, advance)

    monkeypatch.setattr(prompts_source, "solver_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(prompts_source, "collect_moments", checked)
    progress = At()
    assert fix_adapter(by_prompts("out"), progress).exit_code in (0, 3)
    assert "out of memory on meta: solving on the CPU, which is slower" in progress.warnings


def test_displacements_without_memory_on_the_device_go_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, by_weights: Callable[..., FixSettings]
) -> None:
    found = weights_source.leading_directions

    def checked(displacement: torch.Tensor, *args: Any) -> Any:
        if displacement.device.type != "cpu":
            raise FULL
        return found(displacement, *args)

    monkeypatch.setattr(weights_source, "leading_directions", checked)
    monkeypatch.setattr(api, "solver_device", lambda _: torch.device("meta"))
    progress = At()
    fix_adapter(by_weights(), progress)
    assert "out of memory on meta: solving on the CPU, which is slower" in progress.warnings


RESTARTED = "out of memory on the device: starting again on the CPU, which is slower"


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """`full_gpu(module, name)`: there seems to be a GPU, on which a function that loads a model finds no memory."""

    def pretend(module: Any, name: str) -> None:
        for place in (api, opening, evaluation, comparison):
            monkeypatch.setattr(place, "choose_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
        load = getattr(module, name)

        def checked(*args: Any) -> Any:
            if torch.device("cuda") in args:
                raise FULL
            return load(*args)

        monkeypatch.setattr(module, name, checked)

    return pretend


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_model_that_does_not_fit_the_device_runs_on_the_cpu_unless_the_device_was_asked_for(
    device: str, full_gpu: Callable[[Any, str], None], by_prompts: Callable[[str], FixSettings]
) -> None:
    full_gpu(fitting, "open_host")
    settings = dataclasses.replace(by_prompts("out"), device=device)
    progress = At()
    if device == "cuda":
        with pytest.raises(ResourceError, match="out of memory on the device"):
            fix_adapter(settings, progress)
        return
    assert fix_adapter(settings, progress).settings["device"] == "cpu"
    assert RESTARTED in progress.warnings


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("command", "module"), [("eval", evaluation), ("compare", fitting)])
def test_measuring_begins_again_on_the_cpu_unless_the_device_was_asked_for(
    command: str, module: Any, device: str, full_gpu: Callable[[Any, str], None], measuring: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    full_gpu(module, "open_host")
    progress = At()
    run = measuring(command, device=device)
    if device == "cuda":
        with pytest.raises(ResourceError, match="out of memory on the device") as caught:
            run(progress)
        assert caught.value.exit_code == 5
        assert not (tmp_path / "here").exists()
        return
    report = run(progress)
    assert report.settings["device"] == "cpu"
    assert [text for text in report.warnings if "memory" in text] == [RESTARTED]
    assert progress.warnings.count(RESTARTED) == 1
    assert (tmp_path / "here" / "page.html").exists()


def test_a_judge_that_does_not_fit_the_device_takes_all_to_the_cpu(
    full_gpu: Callable[[Any, str], None], measuring: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_gpu(evaluation, "load_judge")
    opened, devices = evaluation.open_host, []

    def on_the_cpu(location: Any, adapters_given: Any, device: torch.device, *args: Any) -> Any:
        devices.append(device.type)
        return opened(location, adapters_given, torch.device("cpu"), *args)

    monkeypatch.setattr(evaluation, "open_host", on_the_cpu)
    report = measuring("eval")(At())
    assert devices == ["cuda", "cpu"]
    assert report.models[0].judge is not None
    assert RESTARTED in report.warnings


def test_a_restart_takes_back_the_steps_that_it_repeats() -> None:
    size, steps = BatchSize(largest=4), []

    def work(tell: Callable[[int], None]) -> str:
        tell(3)
        if size.divisor == 1:
            raise FULL
        tell(4)
        return "done"

    assert size.restarting(work, steps.append) == "done"
    assert steps == [3, -3, 3, 4]
    assert (size.divisor, size.limit(1000)) == (2, 500)


def test_pieces_are_done_once_each_and_in_order() -> None:
    size, done = BatchSize(), []

    def work(rows: list[int]) -> None:
        if len(rows) > 2:
            raise FULL
        done.append(rows)

    size.in_pieces(list(range(7)), work)
    assert [row for rows in done for row in rows] == list(range(7))


def test_another_error_is_not_tried_again() -> None:
    tries = []

    def work(rows: list[int]) -> None:
        tries.append(rows)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        BatchSize().in_pieces([0, 1], work)
    assert tries == [[0, 1]]
