"""A model's safetensors, sharded or not, as named tensors on disk: headers first, values one tensor at a time.

Also matches adapted modules to weights, by name. Checkpoints differ from module names by a leading prefix at most
(`transformer.h.0…` in memory, `h.0…` on disk), so one prefix must explain all modules, and shapes must fit.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from csulora_cli.adapter import LoraModule
from csulora_cli.errors import HostError
from csulora_cli.files import is_regular, read_json_object
from csulora_cli.text import printable, some

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"


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
        self.tensors: dict[str, StoredTensor] = {}

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
            handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
            self._open[file] = handle
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = handle.get_slice(name)
                self.tensors[name] = StoredTensor(file, tuple(view.get_shape()), str(view.get_dtype()))
        except (SafetensorError, OSError) as problem:
            raise HostError(
                f"{printable(file)} of the {self.role} is not a safetensors file: {printable(problem)}",
                "Download the model again.",
            ) from None

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU."""
        tensor: Tensor = self._open[self.tensors[name].file].get_tensor(name)
        return tensor


def weight_files(folder: Path, role: str) -> list[Path]:
    """The safetensors files of a model folder, sorted.

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
    if index.exists():
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
    """The weight of an adapted module.

    Attributes:
        tensor: its name on disk.
        is_transposed: stored as (in, out), like Conv1D; None if the weight is square and nothing tells.
    """

    tensor: str
    is_transposed: bool | None


def match_weights(
    modules: Iterable[LoraModule], checkpoint: Checkpoint, fan_in_fan_out: bool = False
) -> dict[str, WeightMatch]:
    """Find the weight of every adapted module by name, and check its shape.

    Raises:
        HostError: some module has no weight of its name, or one of another shape; the message shows both sides.
    """
    modules = list(modules)
    to_disk = _common_renaming([module.name for module in modules], checkpoint)
    missing = [module.name for module in modules if f"{to_disk(module.name)}.weight" not in checkpoint.tensors]
    if missing:
        matched = len(modules) - len(missing)
        weights = sorted(name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2)
        raise HostError(
            f"{matched} of {len(modules)} adapted modules exist in the {checkpoint.role}: the adapter has "
            f"{some(missing, 2)}; the {checkpoint.role} has {some(weights, 2)}",
            "Give the model that the adapter was trained on.",
        )
    matches = {}
    for module in modules:
        name = f"{to_disk(module.name)}.weight"
        matches[module.name] = WeightMatch(name, _orientation(module, checkpoint, name))
    # A square weight says nothing; the rectangular ones of the same checkpoint do, since layer classes do not mix, and
    # if there are none, the config does where it says fan_in_fan_out.
    known = {match.is_transposed for match in matches.values()} - {None}
    answer = known.pop() if len(known) == 1 else True if not known and fan_in_fan_out else None
    return {
        name: WeightMatch(match.tensor, answer if match.is_transposed is None else match.is_transposed)
        for name, match in matches.items()
    }


def _orientation(module: LoraModule, checkpoint: Checkpoint, name: str) -> bool | None:
    shape = checkpoint.tensors[name].shape
    wanted = (module.out_features, module.in_features)
    if shape not in (wanted, wanted[::-1]):
        raise HostError(
            f"'{printable(name)}' of the {checkpoint.role} is {shape}, but the adapter changes a weight of {wanted}",
            "Give the model that the adapter was trained on.",
        )
    return None if shape[0] == shape[1] else shape != wanted


class _Renaming:
    """Module name -> name on disk: drop a leading prefix, or put one in front."""

    def __init__(self, drop: str = "", add: str = "") -> None:
        self.drop, self.add = drop, add

    def __call__(self, name: str) -> str:
        return self.add + name.removeprefix(self.drop)


def _common_renaming(names: list[str], checkpoint: Checkpoint) -> _Renaming:
    """The prefix change that explains most modules; names as they are win a tie."""
    candidates = [_Renaming()]
    first = names[0]
    parts = first.split(".")
    candidates += [_Renaming(drop=".".join(parts[:cut]) + ".") for cut in range(1, len(parts) - 1)]
    tail = f".{first}.weight"
    prefixes = sorted({name.removesuffix(tail) + "." for name in checkpoint.tensors if name.endswith(tail)}, key=len)
    candidates += [_Renaming(add=prefix) for prefix in prefixes]

    def score(renaming: _Renaming) -> int:
        return sum(f"{renaming(name)}.weight" in checkpoint.tensors for name in names)

    return max(candidates, key=score)
