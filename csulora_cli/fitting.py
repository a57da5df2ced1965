"""An adapter on its host: where its tensors belong, what of it depends on the host's weights, and what is carried."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from csulora_cli.adapter import Adapter, bind, read_adapter, with_merged_magnitudes, with_weights
from csulora_cli.checkpoint import CONFIG_NAME, Checkpoint, WeightMatch, holds_weight, match_weights, read_weight
from csulora_cli.engine.attach import is_copy, weight_of
from csulora_cli.engine.host import Host
from csulora_cli.engine.progress import Progress
from csulora_cli.errors import UnsupportedError
from csulora_cli.formats.carried import Carried
from csulora_cli.formats.site import Site
from csulora_cli.formats.structure import Structure, read_structure, structure_of
from csulora_cli.locate import Location
from csulora_cli.model_kind import check_model_kind, check_plain, is_plain
from csulora_cli.opening import open_host
from csulora_cli.report import CarriedRecord
from csulora_cli.settings import DoraMode
from csulora_cli.text import some

# An open checkpoint and where it has the weight of every site, by the site's name.
Matched = tuple[Checkpoint, dict[str, WeightMatch]]


class Fitting:
    """Fits one adapter to its host, step by step: `match`, `load` if the host is to run, `settle`.

    Attributes:
        adapter: as far as it is fitted.
        host: the loaded host, or None.
        matched: the host's checkpoint and the unaligned model's, with the weights of all sites.
    """

    def __init__(
        self, adapter: Adapter, host_at: Location, unaligned_at: Location | None, trust_remote_code: bool
    ) -> None:
        self.adapter = adapter
        self.host: Host | None = None
        self.matched: list[Matched] = []
        self._host_at, self._unaligned_at = host_at, unaligned_at
        self._trust_remote_code = trust_remote_code
        self._structure: Structure | None = None

    @property
    def structure(self) -> Structure:
        """The host's modules, from its config unless the host is already loaded."""
        if self._structure is None:
            check_model_kind(self._host_at, "host")
            modules = {target.module for target in self.adapter.targets}
            self._structure = read_structure(self._host_at, self._trust_remote_code, self.adapter.replication, modules)
        return self._structure

    @property
    def _has_config(self) -> bool:
        return (self._host_at.folder / CONFIG_NAME).exists()

    def _bind(self, structure: Structure) -> None:
        self._structure = structure
        self.adapter = bind(self.adapter, structure)

    def match(self, stack: ExitStack) -> None:
        """Open the checkpoints (headers only) and find every adapted weight in them, before anything is loaded.

        Where only the host is given no weight on disk is needed: names and shapes are checked where they are those in
        memory, and the rest when the host is loaded.

        Args:
            stack: closes the checkpoints.

        Raises:
            HostError: a model is of a kind that is refused, unreadable, or has not all weights in the adapter's sizes.
            AdapterError: what the host shows to be wrong in the adapter.
        """
        models = [(self._host_at, "host")]
        if self._unaligned_at is not None:
            models.append((self._unaligned_at, "unaligned model"))
        for location, role in models:
            check_model_kind(location, role)
            if self._unaligned_at is not None:
                check_plain(location, role)
        has_plain_host = is_plain(self._host_at)
        if self.adapter.needs_structure or not has_plain_host:
            self._bind(self.structure)
        if not has_plain_host:
            return  # what is on disk tells nothing of what is in memory
        checkpoints = [stack.enter_context(Checkpoint(location.folder, role)) for location, role in models]
        if self._structure is None and not all(map(self._is_named_as_on_disk, checkpoints)):
            self._bind(self.structure)
        if self._structure is None or self._unaligned_at is not None:
            self.matched = [(checkpoint, self._match(checkpoint)) for checkpoint in checkpoints]

    def _match(self, checkpoint: Checkpoint) -> dict[str, WeightMatch]:
        # PEFT heeds it only where the layer's class agrees, which the host's config tells if there is one.
        is_swapped = not self._has_config and bool(self.adapter.config.get("fan_in_fan_out"))
        if self._structure is None:
            return match_weights(self.adapter.sites, checkpoint, is_swapped)
        if self._structure.stored is not None:
            checkpoint.convert(self._structure.stored)
        return match_weights(self.adapter.sites, checkpoint, is_swapped, self._structure.stored_names)

    def _is_named_as_on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether names alone tell which weights are meant; else only the model in memory does, where there is one.

        A file names a shared weight once, and some models are saved under other names than they have in memory.
        Values that change under one name are those of stacked experts alone (transformers 5.23), which need the model.
        """
        return not self._has_config or all(site.place.weight in checkpoint.tensors for site in self.adapter.sites)

    def oriented(self) -> tuple[Matched, Matched]:
        """Both matches with square weights settled by the class of their modules."""
        host, unaligned = self.matched
        return self._oriented(host), self._oriented(unaligned)

    def _oriented(self, matched: Matched) -> Matched:
        checkpoint, matches = matched
        if all(match.is_transposed is not None for match in matches.values()):
            return matched
        return checkpoint, {name: self._settled(name, match) for name, match in matches.items()}

    def _settled(self, name: str, match: WeightMatch) -> WeightMatch:
        if match.is_transposed is not None:
            return match
        module = self.structure.modules.get(name)
        return replace(match, is_transposed=module is not None and module.is_conv1d)

    def load(self, device: torch.device, dtype: str, progress: Progress) -> Host:
        """Load the host and find the places of all tensors in it.

        Raises:
            HostError: it cannot be loaded, or does not fit the adapter.
        """
        self.host, _ = open_host(self._host_at, [], device, dtype, self._trust_remote_code, progress, self.adapter)
        self._bind(structure_of(self.host.model, self.host.repeats))
        return self.host

    def settle(self, mode: DoraMode, progress: Progress) -> tuple[CarriedRecord, ...]:
        """Settle what depends on the host's weights, from the loaded host where there is one, else from its file.

        Args:
            mode: what is done with the magnitudes of DoRA.
            progress: receives warnings.

        Returns:
            What is carried.
        """
        if self.adapter.needs_weights:
            self._bind(self.structure)
            if self.adapter.has_magnitudes and mode is DoraMode.MERGE_SVD:
                self.adapter = with_merged_magnitudes(self.adapter, self.structure, self.weight_of)
            elif self.adapter.has_magnitudes:
                progress.warn(
                    "the adapter uses DoRA: the gain that its magnitudes give each row of the host's weights stays, "
                    "whatever harm it holds; the update beside it is repaired"
                )
            self.adapter = with_weights(self.adapter, self.structure, self.weight_of)
        return carried_records(self.adapter, self._is_copy)

    def weight_of(self, site: Site) -> Tensor:
        """A site's weight in the host, as (out, in) in float32."""
        if self.host is not None:
            return weight_of(self.host.model, site.place)
        checkpoint, matches = self._oriented(self.matched[0])
        return read_weight(checkpoint, matches[site.name])

    def _is_copy(self, entry: Carried) -> bool:
        if self.host is not None:
            return is_copy(self.host.model, entry)
        return holds_weight(self.matched[0][0], self.structure.stored_names(str(entry.weight)), entry)

    def reopened(self, folder: Path) -> Adapter:
        """What was written, read and fitted like the adapter."""
        return self.fitted(read_adapter(folder))

    def fitted(self, written: Adapter) -> Adapter:
        """An adapter of the same layout, fitted like the adapter."""
        if self._structure is None:
            return written
        return with_weights(bind(written, self._structure), self._structure, self.weight_of)


def check_magnitudes(adapter: Adapter, mode: DoraMode, is_strict: bool) -> None:
    """Refuse DoRA where that is asked for.

    Raises:
        UnsupportedError: the adapter uses DoRA, and the settings refuse it.
    """
    if not adapter.has_magnitudes or not (is_strict or mode is DoraMode.REFUSE):
        return
    option = "--strict" if is_strict else "--dora refuse"
    raise UnsupportedError(
        f"{option}: the adapter uses DoRA, whose magnitudes scale the host's weights",
        "With --dora keep they stay and the update beside them is repaired; see also --dora merge-svd.",
    )


def carried_records(adapter: Adapter, is_same: Callable[[Carried], bool]) -> tuple[CarriedRecord, ...]:
    """What each carried tensor does.

    Args:
        adapter: bound to the host.
        is_same: whether a carried tensor holds the values that the host has in its place.
    """
    records = []
    for entry in adapter.carried:
        effect = "training" if entry.weight is None else "copy" if is_same(entry) else "replaces"
        records.append(CarriedRecord(entry.key, effect, entry.weight))
    biases = [target for target in adapter.targets if target.key_bias is not None]
    records += [CarriedRecord(str(target.key_bias), "bias", target.module) for target in biases]
    return tuple(records)


def tell_active(records: Sequence[CarriedRecord], is_strict: bool, progress: Progress) -> None:
    """Say what acts beside the low-rank updates, or refuse it.

    Raises:
        UnsupportedError: there is something, and `is_strict`.
    """
    active = [record.key for record in records if record.is_active]
    if not active:
        return
    if is_strict:
        raise UnsupportedError(
            f"--strict: the adapter carries {len(active)} tensors beside its low-rank updates: {some(active, 2)}",
            "Leave --strict out to carry them as they are; what they do is not repaired.",
        )
    count = "1 tensor acts" if len(active) == 1 else f"{len(active)} tensors act"
    progress.warn(
        f"{count} beside the low-rank updates, carried along unrepaired with any harm in it: {some(active, 2)}"
    )
