"""What every command does before its own work: find the host, check it against the adapters, load it.

Also what goes with it: warnings kept for the report, another start on the CPU where the device has no memory, what the
machine refuses as errors of our own, and inputs that change meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from csulora_cli import html, writer
from csulora_cli.adapter import Adapter, bind, with_weights
from csulora_cli.checkpoint import CONFIG_NAME, weight_files
from csulora_cli.engine.attach import weight_of
from csulora_cli.engine.host import Host, choose_device, load_host
from csulora_cli.engine.memory import is_out_of_memory, release_memory
from csulora_cli.engine.progress import Progress, Silent
from csulora_cli.errors import HostError, InputError, ResourceError, UnsupportedError, UsageError
from csulora_cli.files import Stamp, check_new_file, sha256_of
from csulora_cli.formats.replication import Replication, grow
from csulora_cli.formats.structure import Structure, structure_of
from csulora_cli.locate import (
    CODE_FILES,
    MODEL_FILES,
    RUN_FILES,
    Location,
    files_matching,
    files_of,
    locate_model,
    public_name,
)
from csulora_cli.report import InputRecord
from csulora_cli.settings import AUTO, CompareSettings, EvalSettings, FixSettings
from csulora_cli.text import printable

Settings = TypeVar("Settings", FixSettings, EvalSettings, CompareSettings)
Report = TypeVar("Report")


class Recorder:
    """Passes everything on to the caller's progress and keeps the warnings for the report."""

    def __init__(self, progress: Progress) -> None:
        self.stage = progress.stage
        self.advance = progress.advance
        self._warn = progress.warn
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Keep a warning and pass it on, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self._warn(message)


def run_on_device(
    work: Callable[[Settings, Recorder], Report], settings: Settings, progress: Progress | None
) -> Report:
    """The result of a command's work, begun again on the CPU where the device that csulora chose has no memory for it.

    Args:
        work: must be repeatable: it leaves nothing behind when it fails.
        settings: what to do.
        progress: receives stages, steps and warnings.

    Raises:
        CsuloraError: what `work` raises, or what the machine refuses as one of ours.
    """
    recorder = Recorder(progress or Silent())
    with resource_errors():
        try:
            return work(settings, recorder)
        except Exception as problem:
            if not is_out_of_memory(problem) or not _may_leave(settings.device):
                raise
        release_memory()
        recorder.warn("out of memory on the device: starting again on the CPU, which is slower")
        return work(replace(settings, device="cpu"), recorder)


def _may_leave(device: str) -> bool:
    """Whether the device, as it was asked for, was csulora's choice, and is not the CPU already."""
    return device == AUTO and choose_device(AUTO).type != "cpu"


@contextmanager
def resource_errors() -> Iterator[None]:
    """What the machine refuses, as our own errors: memory as ResourceError, files as ResourceError or InputError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ResourceError("out of memory on the device", "Try --device cpu or --dtype bfloat16.") from None
    except OSError as problem:
        place = f" {printable(problem.filename)}" if problem.filename else ""
        message = f"the system refuses{place}: {printable(problem.strerror or problem)}"
        if problem.errno in writer.DISK_ERRORS:
            raise ResourceError(message, "Free space or give another place to write to.") from None
        raise InputError(message, "Check that the file exists and that you may read it.") from None
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        message = f"out of memory: {printable(problem)}" if str(problem) else "out of memory"
        raise ResourceError(message, "Try --dtype bfloat16.") from None


def check_report(page: Path | None, overwrite: bool, out: Path | None = None) -> None:
    """Check early that a report, if one is asked for, can be written and nothing of value would be lost.

    Args:
        page: the file to be.
        overwrite: whether an earlier report may be replaced.
        out: a folder that is written, too; the report may lie in it.

    Raises:
        UsageError: another file is there, or the folder is to be where the report is to be.
    """
    if page is None:
        return
    check_new_file(page, "--report", overwrite, html.MARK)
    if out is not None and page.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"--report {printable(page)} is where --out {printable(out)} is to be")


def folders_of(*locations: Location | None) -> list[Path]:
    """The folders of some inputs; None: no such input."""
    return [location.folder for location in locations if location]


def stamps_of(patterns: Sequence[str], *locations: Location | None) -> list[Stamp]:
    """What the files of some inputs look like before they are read, for `check_unchanged`; None: no such input."""
    return [Stamp.of(path) for location in locations if location for path in files_of(location, patterns)]


def check_unchanged(stamps: Iterable[Stamp]) -> None:
    """Check that all files are still those that were read.

    Raises:
        InputError: one was changed, replaced or removed.
    """
    for stamp in stamps:
        stamp.check(InputError)


def model_files(trust_remote_code: bool) -> tuple[str, ...]:
    """Patterns of the files that make up a model, with its own code only where that may run."""
    return (*MODEL_FILES, *CODE_FILES) if trust_remote_code else MODEL_FILES


def locate_host(adapter: Adapter, base: str | None, files: Sequence[str], progress: Progress) -> Location:
    """The host: `base`, or what the adapter names; warns where the two differ.

    Raises:
        UsageError: neither names one.
        HostError: what the adapter names cannot be used.
        InputError: `base` cannot be found.
    """
    named = adapter.base
    if base is None:
        if named is None:
            raise UsageError("the adapter does not name its base model", "Add --base MODEL.")
        try:
            return locate_model(named, files, "host")
        except InputError as problem:
            raise HostError(
                f"the base model that the adapter names cannot be used: {problem.message}", "Add --base MODEL."
            ) from None
    host = locate_model(base, files, "host")
    if named is not None and named not in (base, host.repo_id) and Path(named).name != host.name:
        progress.warn(
            f"the adapter names {printable(public_name(named))} as its base; going on with {printable(host.label)}"
        )
    return host


def open_host(
    location: Location,
    adapters: Sequence[Adapter],
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    progress: Progress,
    opened_for: Adapter | None = None,
) -> tuple[Host, list[Adapter]]:
    """Load the host and find the places of all adapters in it.

    Args:
        location: of the host.
        adapters: to be bound to it.
        device, dtype, trust_remote_code: see `load_host`.
        progress: receives warnings.
        opened_for: an adapter that is to run on it, too, but is not bound here.

    Returns:
        The host, and the adapters bound to it.

    Raises:
        HostError: it cannot be loaded, or does not fit an adapter.
    """
    progress.stage("host")
    running = [*adapters, opened_for] if opened_for else adapters
    modules = {target.module for adapter in running for target in adapter.targets}
    host = load_host(location, device, dtype, trust_remote_code, modules=modules)
    host.batch_size.warn = progress.warn
    replication = common_replication([adapter.replication for adapter in running])
    host.repeats = grow(host.model, replication)
    if replication is not None:
        progress.warn(
            f"the adapter repeats layers (layer_replication): the host is run and measured with the same "
            f"{len(replication.sources)} layers"
        )
    structure = structure_of(host.model, host.repeats)
    bound = [_bound(adapter, host, structure) for adapter in adapters]
    if not host.has_template:
        progress.warn("the host's tokenizer has no chat template; prompts are put as 'User: … Assistant:'")
    return host, bound


def common_replication(replications: Sequence[Replication | None]) -> Replication | None:
    """Which layers all adapters repeat that run on one host.

    Raises:
        UnsupportedError: they do not agree.
    """
    found = set(replications)
    if len(found) > 1:
        raise UnsupportedError(
            "the adapters repeat different layers of the host (layer_replication)", "Give each of them on its own."
        )
    return found.pop() if found else None


def _bound(adapter: Adapter, host: Host, structure: Structure) -> Adapter:
    bound = bind(adapter, structure)
    if not bound.needs_weights:
        return bound
    return with_weights(bound, structure, lambda site: weight_of(host.model, site.place))


def model_record(location: Location, role: str, *, is_run: bool, trust_remote_code: bool) -> InputRecord:
    """Name, commit and hashes of a model: config and weights, and what shapes prompts and answers where it is run."""
    if location.gguf is not None:
        file = location.folder / location.gguf
        return InputRecord(location.label, location.commit, {file.name: sha256_of(file)})
    files = [location.folder / CONFIG_NAME, *weight_files(location.folder, role)]
    if is_run:
        files += files_matching(location.folder, RUN_FILES)
        if trust_remote_code:
            files += files_matching(location.folder, CODE_FILES)
    return InputRecord(location.label, location.commit, {file.name: sha256_of(file) for file in files if file.exists()})
