"""Write an adapter folder, complete or not at all, from bytes that depend only on inputs and settings."""

import contextlib
import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from csulora_cli.adapter import Adapter
from csulora_cli.engine.attach import Factors
from csulora_cli.errors import AdapterError, CsuloraError, ResourceError, UsageError
from csulora_cli.files import is_regular, leaves_folder, read_bytes
from csulora_cli.formats.config import CONFIG_NAME
from csulora_cli.formats.magnitude import row_norms
from csulora_cli.formats.site import Site
from csulora_cli.formats.targets import Target
from csulora_cli.locate import RUN_FILES
from csulora_cli.solver.lowrank import pad_rank
from csulora_cli.text import printable

REPORT_NAME = "csulora.json"
CARD_NAME = "README.md"
MAX_COPIED_BYTES = 64 * 2**20
# What may go along from the source folder: what a tokenizer, a chat template or a licence consists of.
COMPANIONS = (
    *RUN_FILES, "preprocessor_config.json", "processor_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md",
)  # fmt: skip
_RANK_MULTIPLE = 16
_PID = re.compile(r"[0-9]{1,9}")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO)


def check_apart(out: Path, *inputs: Path | None) -> None:
    """Check that no input would be removed with a former output.

    Args:
        out: the folder that is to be.
        inputs: files or folders that are read; None: no such input.

    Raises:
        UsageError: one is the output folder, or lies in it.
    """
    real = out.resolve()
    for path in inputs:
        if path is not None and real in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"--out {printable(out)} holds {printable(path)}, which is read", "Give another --out.")


def check_output(out: Path, adapter: Path, overwrite: bool) -> None:
    """Check early that the output folder can be written and nothing of value would be lost.

    Raises:
        UsageError: it exists and is not empty, is no adapter, or is (or holds, or lies in) the input.
    """
    shown = printable(out)
    real, source = out.resolve(), adapter.resolve()
    if real == source or real in source.parents or source in real.parents:
        raise UsageError(f"--out {shown} overlaps the adapter {printable(adapter)}", "Give another folder as --out.")
    if not out.exists():
        if file := next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None):
            raise UsageError(f"--out {shown} lies below {printable(file)}, which is not a folder")
        return
    if not out.is_dir():
        raise UsageError(f"--out {shown} is not a folder", "Give another name as --out.")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if not overwrite:
        raise UsageError(
            f"the output folder {shown} exists and is not empty", "Add --overwrite, or give another --out."
        )
    if REPORT_NAME not in names and CONFIG_NAME not in names:
        raise UsageError(f"--overwrite would remove {shown}, which holds no adapter", "Give another folder as --out.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        ResourceError: the disk is full or cannot be written, or the folder vanishes.
    """
    out = out.resolve()  # of a link, what it points to is replaced
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        staging.mkdir()
        with _noticing_loss(staging, out):
            yield staging
            for file in staging.iterdir():
                _sync(file)
            _sync(staging)
            _replace(staging, out)
        _sync(out.parent)
    except OSError as problem:
        if problem.errno not in DISK_ERRORS:
            raise
        raise ResourceError(
            f"cannot write {printable(out)}: {printable(problem.strerror)}", "Free space or give another --out."
        ) from None
    finally:
        _remove(staging)


@contextmanager
def _noticing_loss(staging: Path, out: Path) -> Iterator[None]:
    """Where the folder that is being written has vanished, that is what is wrong, whatever it led to."""
    try:
        yield
    except (OSError, CsuloraError):
        if staging.is_dir():
            raise
        raise ResourceError(
            f"cannot write {printable(out)}: what was written so far has vanished",
            "Run again, and keep other programs away from that place.",
        ) from None


def _replace(staging: Path, out: Path) -> None:
    """Put the finished folder in place; a former one stays until then."""
    former = out.parent / f".{out.name}.former-{os.getpid()}"
    try:
        if out.exists() and any(out.iterdir()):
            out.rename(former)
        staging.rename(out)
    finally:  # a signal can come between any two steps
        if former.exists() and not out.exists():
            former.rename(out)
        _remove(former)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there, to the end, also where a signal interrupts it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_abandoned(out: Path) -> None:
    """Remove what a killed run left beside `out`; bring a former output back if the new one never arrived."""
    for kind in ("former", "partial"):
        for leftover in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            pid = leftover.name.rpartition("-")[2]
            if not _PID.fullmatch(pid) or _is_alive(int(pid)):
                continue
            if kind == "former" and not out.exists():
                leftover.rename(out)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def stored_tensors(
    adapter: Adapter, factors: Mapping[str, Factors], weight_of: Callable[[Site], Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write, in the stored dtypes, and the config that goes with them.

    Where no rank changes, keys, shapes, dtypes and config are the input's, and a factor that did not change keeps its
    bits. Where ranks change, the uniform layout: one rank for all modules, a multiple of 16, alpha equal to it, so that
    the scale is 1 everywhere, and every module written. Whatever is no factor is written as it was read, but for what
    only training reads, which does not fit another rank.

    Args:
        adapter: a bound one.
        factors: of all sites.
        weight_of: a site's weight in the host as (out, in); only DoRA needs it, whose magnitudes follow the factors.
    """
    tensors = dict(adapter.tensors)
    if all(factors[site.name].lora_a.shape == site.lora_a.shape for site in adapter.sites):
        for target in adapter.targets:
            pairs = [(factors[site.name].lora_a, factors[site.name].lora_b) for site in target.sites]
            _put(tensors, target, pairs)
            if target.magnitude is not None and weight_of is not None:
                _put_magnitude(tensors, target, factors[target.sites[0].name], target.sites[0].scale, weight_of)
        return tensors, dict(adapter.config)
    widest = max(factors[site.name].lora_a.shape[0] for site in adapter.sites)
    rank = -(-widest // _RANK_MULTIPLE) * _RANK_MULTIPLE
    for target in adapter.targets:
        _put(tensors, target, [_uniform(factors[site.name], rank) for site in target.sites])
        if target.magnitude is not None and weight_of is not None:
            _put_magnitude(tensors, target, factors[target.sites[0].name], 1.0, weight_of)
        if target.key_bias is not None:  # the scale is 1 from here on
            bias = tensors[target.key_bias]
            tensors[target.key_bias] = (factors[target.sites[0].name].scale * bias.double()).to(bias.dtype)
    for entry in adapter.carried:
        if entry.weight is None:  # read in training only, and of the former rank
            del tensors[entry.key]
    return tensors, adapter.dialect.uniform(adapter.config, rank)


def _put_magnitude(
    tensors: dict[str, Tensor],
    target: Target,
    repaired: Factors,
    scale: float,
    weight_of: Callable[[Site], Tensor],
) -> None:
    """B without the gain that it has in a site, and the magnitudes with which the gain stays what it was."""
    (site,) = target.sites
    if site.gain is None or target.key_magnitude is None or target.magnitude is None:
        return
    if repaired.lora_b is site.lora_b and scale == site.scale:
        tensors[target.key_b] = target.lora_b
        if repaired.lora_a is site.lora_a:
            return
    else:
        stored = tensors[target.key_b].double()
        lora_b = torch.where(site.gain[:, None] == 0, 0.0, stored / site.gain[:, None])
        tensors[target.key_b] = lora_b.to(target.lora_b.dtype)
    norms = row_norms(weight_of(site), tensors[target.key_a], tensors[target.key_b], scale)
    magnitude = (site.gain * norms).to(target.magnitude.dtype)
    tensors[target.key_magnitude] = magnitude.reshape(tensors[target.key_magnitude].shape)


def _put(tensors: dict[str, Tensor], target: Target, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    lora_a, lora_b = target.layout.pack(pairs, target.lora_a.shape, target.lora_b.shape)
    tensors[target.key_a] = lora_a.to(target.lora_a.dtype)
    tensors[target.key_b] = lora_b.to(target.lora_b.dtype)


def _uniform(repaired: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """A and B at a larger rank, with the scale in them, half of it in each."""
    root = abs(repaired.scale) ** 0.5
    lora_b, lora_a = pad_rank(repaired.lora_b.double() * root, repaired.lora_a.double() * root, rank)
    return lora_a, lora_b if repaired.scale >= 0 else -lora_b


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes with the metadata that the ecosystem writes; the same tensors give the same bytes."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in sorted(tensors.items())}
    data: bytes = safetensors.torch.save(plain, metadata={"format": "pt"})
    return data


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy the small files that belong to an adapter, byte for byte. Returns their names, sorted.

    Links that leave the folder are not followed, but for those of the Hub cache.
    """
    copied = []
    for path in sorted(source.resolve().iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in COMPANIONS) or not is_regular(path):
            continue
        if path.name in (CARD_NAME, REPORT_NAME, CONFIG_NAME) or path.stat().st_size > MAX_COPIED_BYTES:
            continue
        if leaves_folder(path):
            continue
        (target / path.name).write_bytes(read_bytes(path, AdapterError, MAX_COPIED_BYTES))
        copied.append(path.name)
    return copied


def cast_error(
    sites: Sequence[Site], promised: Mapping[str, Factors], stored: Mapping[str, Factors]
) -> dict[str, float]:
    """‖X_stored − X‖ / ‖X‖ of every site (0 where X is 0)."""
    from csulora_cli.solver.lowrank import squared_distance, squared_norm

    errors = {}
    for site in sites:
        want, have = promised[site.name], stored[site.name]
        norm = want.scale**2 * squared_norm(want.lora_b, want.lora_a)
        gap = squared_distance(
            want.scale * want.lora_b.double(), want.lora_a, have.scale * have.lora_b.double(), have.lora_a
        )
        errors[site.name] = (gap / norm) ** 0.5 if norm > 0 else gap**0.5
    return errors


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every value of every tensor is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
