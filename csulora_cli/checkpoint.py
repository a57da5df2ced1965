"""A model's safetensors, sharded or not, as named tensors on disk: headers first, values one tensor at a time.

Also matches adapted sites to weights, by name. What transformers stores in another form is converted as it does when
it loads a model. Beyond that, names differ from those of modules by a leading prefix at most (`transformer.h.0…` in
memory, `h.0…` on disk), so one prefix must explain all modules, and shapes must fit.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora_cli.errors import HostError
from csulora_cli.files import Stamp, is_regular, read_json_object
from csulora_cli.formats.carried import Carried
from csulora_cli.formats.layouts import block_diagonal
from csulora_cli.formats.site import Kind, Site
from csulora_cli.formats.stored import Recipe, StoredForm
from csulora_cli.text import printable, some

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# Bits of the significand, the hidden one included: the spacing around w is 2^(exponent(w) - bits).
PRECISION = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it looks like; its values stay on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """Read access to a folder of safetensors. Use as a context manager; files are memory-mapped while it is open."""

    def __init__(self, folder: Path, role: str) -> None:
        self.folder = folder
        self.role = role
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self._stamps: dict[Path, Stamp] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, Path] = {}
        self._recipes: dict[str, Recipe] = {}

    def __enter__(self) -> "Checkpoint":
        try:
            for file in weight_files(self.folder, self.role):
                self._add(file)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def _add(self, file: Path) -> None:
        try:
            self._stamps[file] = Stamp.of(file)
            handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
            self._open[file] = handle
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = handle.get_slice(name)
                self._files[name] = file
                self.tensors[name] = StoredTensor(file, tuple(view.get_shape()), str(view.get_dtype()))
        except (SafetensorError, OSError) as problem:
            raise HostError(
                f"{printable(file)} of the {self.role} is not a safetensors file: {printable(problem)}",
                "Download the model again.",
            ) from None

    def convert(self, form: StoredForm) -> None:
        """Also give the parameters that transformers would make of what is stored, under the names of the model.

        Raises:
            HostError: the tensors of one do not fit together.
        """
        stored = dict(self.tensors)

        def outline(name: str, _part: int | None) -> Tensor:
            return torch.empty(stored[name].shape, device="meta")

        for recipe in form.recipes(stored):
            own = [stored[name] for name in recipe.names]
            coarsest = min((tensor.dtype for tensor in own), key=lambda dtype: PRECISION.get(dtype, 0))
            shape = tuple(recipe.make(outline).shape)
            self.tensors[recipe.parameter] = StoredTensor(own[0].file, shape, coarsest)
            self._recipes[recipe.parameter] = recipe

    def read(self, name: str, part: int | None = None) -> Tensor:
        """One tensor, or one part of it along its first dimension, in its stored dtype, on the CPU.

        Raises:
            HostError: its file was changed since it was opened.
        """
        if name in self._recipes:
            return self._recipes[name].make(self._read_stored, part)
        return self._read_stored(name, part)

    def _read_stored(self, name: str, part: int | None) -> Tensor:
        file = self._files[name]
        self._stamps[file].check(HostError)  # to read what is cut off from a mapped file would end the process
        handle = self._open[file]
        tensor: Tensor = handle.get_tensor(name) if part is None else handle.get_slice(name)[part]
        return tensor


def weight_files(folder: Path, role: str) -> list[Path]:
    """The safetensors files of a model folder, sorted: the one that holds all, as for transformers, else the shards.

    Args:
        folder: the model.
        role: what to call it in messages ("host", "unaligned model").

    Raises:
        HostError: no safetensors, only pickles, or an index that names missing or outside files.
    """
    if not folder.is_dir():
        raise HostError(
            f"the {role} {printable(folder)} is not a folder", "Give a local folder or a Hub id (org/name)."
        )
    index = folder / INDEX_NAME
    if not is_regular(folder / SINGLE_NAME) and index.exists():
        weight_map = read_json_object(index, HostError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise HostError(f"{printable(index)} has no weight_map", "Download the model again.")
        names = sorted({str(value) for value in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise HostError(f"{printable(index)} names files that are no shards: {some(outside)}")
    else:
        names = [SINGLE_NAME]
    missing = [name for name in names if not is_regular(folder / name)]
    if missing and not index.exists() and any(folder.glob("*.bin")):
        raise HostError(
            f"the {role} {printable(folder)} has its weights only as pickles (*.bin)",
            "Convert it to safetensors first (transformers: save_pretrained).",
        )
    if missing:
        raise HostError(
            f"the {role} {printable(folder)} lacks {some(missing)}",
            "A model folder holds config.json and safetensors weights.",
        )
    return [folder / name for name in names]


@dataclass(frozen=True)
class WeightMatch:
    """The weight of an adapted site.

    Attributes:
        tensor: its name on disk.
        is_transposed: stored as (in, out), like Conv1D; None if the weight is square and nothing tells.
        expert: which part of the tensor it is, or None for all of it.
        groups: of a convolution, whose weight is stored without the zeros between its groups.
    """

    tensor: str
    is_transposed: bool | None
    expert: int | None = None
    groups: int = 1


def match_weights(
    sites: Iterable[Site],
    checkpoint: Checkpoint,
    fan_in_fan_out: bool = False,
    names_of: Callable[[str], Sequence[str]] | None = None,
) -> dict[str, WeightMatch]:
    """Find the weight of every adapted site by name, and check its shape.

    Args:
        sites: of the adapter.
        checkpoint: an open one.
        fan_in_fan_out: what the adapter says of square weights that nothing else tells about.
        names_of: the names under one of which a checkpoint has a weight (`Structure.stored_names`); None: its own.

    Raises:
        HostError: some site has no weight of its name, or one of another shape; the message shows both sides.
    """
    sites = list(sites)
    names = {site.name: names_of(site.place.weight) if names_of else (site.place.weight,) for site in sites}
    to_disk = common_renaming([own[0] for own in names.values()], checkpoint)
    found = {
        site: next((to_disk(name) for name in own if to_disk(name) in checkpoint.tensors), None)
        for site, own in names.items()
    }
    if missing := [name for name, weight in found.items() if weight is None]:
        raise _no_weights(missing, len(sites), checkpoint)
    matches = {site.name: _match(site, checkpoint, str(found[site.name])) for site in sites}
    # A square weight says nothing; the rectangular ones of the same checkpoint do, since layer classes do not mix, and
    # if there are none, the config does where it says fan_in_fan_out.
    known = {matches[site.name].is_transposed for site in sites if site.place.kind is Kind.LINEAR} - {None}
    answer = known.pop() if len(known) == 1 else True if not known and fan_in_fan_out else None
    return {
        name: replace(match, is_transposed=answer if match.is_transposed is None else match.is_transposed)
        for name, match in matches.items()
    }


def _no_weights(missing: list[str], count: int, checkpoint: Checkpoint) -> HostError:
    weights = sorted(name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) >= 2)
    return HostError(
        f"{count - len(missing)} of {count} adapted modules exist in the {checkpoint.role}: the adapter has "
        f"{some(missing, 2)}; the {checkpoint.role} has {some(weights, 2)}",
        "Give the model that the adapter was trained on.",
    )


def _match(site: Site, checkpoint: Checkpoint, name: str) -> WeightMatch:
    """The weight of one site; its orientation is known but for linear layers, where the shape may tell."""
    shape, place = checkpoint.tensors[name].shape, site.place
    wanted = (site.out_features, site.in_features)
    if place.kind is Kind.LINEAR:
        if shape not in (wanted, wanted[::-1]):
            raise _other_shape(site, checkpoint, name)
        return WeightMatch(name, None if shape[0] == shape[1] else shape != wanted)
    is_transposed = place.is_transposed or place.kind is Kind.EMBEDDING
    matrix = shape if place.expert is None else shape[1:]
    flat = (matrix[0], place.groups * math.prod(matrix[1:])) if matrix else ()
    if flat != (wanted[::-1] if is_transposed else wanted) or (place.expert or 0) >= shape[0]:
        raise _other_shape(site, checkpoint, name)
    return WeightMatch(name, is_transposed, place.expert, place.groups)


def _other_shape(site: Site, checkpoint: Checkpoint, name: str) -> HostError:
    return HostError(
        f"'{printable(name)}' of the {checkpoint.role} is {checkpoint.tensors[name].shape}, but the adapter changes a "
        f"weight of {(site.out_features, site.in_features)}",
        "Give the model that the adapter was trained on.",
    )


def read_weight(checkpoint: Checkpoint, match: WeightMatch) -> Tensor:
    """A site's weight as (out, in) in float32; of a convolution with groups on all channels, as its update is.

    Raises:
        HostError: it is stored in a form that cannot be computed with.
    """
    stored = checkpoint.tensors[match.tensor]
    if stored.dtype not in PRECISION:
        raise HostError(
            f"'{printable(match.tensor)}' of the {checkpoint.role} is stored as {printable(stored.dtype)}",
            "csulora computes with weights in float32, float16 and bfloat16.",
        )
    weight = block_diagonal(checkpoint.read(match.tensor, match.expert).float().flatten(1), match.groups)
    return weight.mT if match.is_transposed else weight


def holds_weight(checkpoint: Checkpoint, names: Sequence[str], entry: Carried) -> bool:
    """Whether a carried tensor holds the same values as the weight that it replaces, in the checkpoint's dtype.

    Args:
        checkpoint: an open one.
        names: of the weight in the host.
        entry: the carried tensor.
    """
    for name in names:
        on_disk = common_renaming([name], checkpoint)(name)
        if on_disk in checkpoint.tensors:
            own = checkpoint.read(on_disk)
            own = own if entry.rows is None else own[list(entry.rows)]
            return own.shape == entry.tensor.shape and torch.equal(entry.tensor.to(own.dtype), own)
    return False


class Renaming:
    """Name in the host -> name on disk: drop a leading prefix, or put one in front."""

    def __init__(self, drop: str = "", add: str = "") -> None:
        self.drop, self.add = drop, add

    def __call__(self, name: str) -> str:
        """The name on disk."""
        return self.add + name.removeprefix(self.drop)


def common_renaming(names: list[str], checkpoint: Checkpoint) -> Renaming:
    """The prefix change that explains most weights; names as they are win a tie."""
    candidates = [Renaming()]
    first = names[0]
    parts = first.split(".")
    candidates += [Renaming(drop=".".join(parts[:cut]) + ".") for cut in range(1, len(parts) - 2)]
    tail = f".{first}"
    prefixes = sorted({name.removesuffix(first) for name in checkpoint.tensors if name.endswith(tail)}, key=len)
    candidates += [Renaming(add=prefix) for prefix in prefixes]

    def score(renaming: Renaming) -> int:
        return sum(renaming(name) in checkpoint.tensors for name in names)

    return max(candidates, key=score)
