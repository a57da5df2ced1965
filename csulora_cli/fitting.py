"""An adapter on its host: what of it depends on the host's weights, and what it does beside its low-rank updates."""

from collections.abc import Callable, Sequence

from torch import Tensor

from csulora_cli.adapter import Adapter, with_merged_magnitudes, with_weights
from csulora_cli.engine.progress import Progress
from csulora_cli.errors import UnsupportedError
from csulora_cli.formats.carried import Carried
from csulora_cli.formats.site import Site
from csulora_cli.formats.structure import Structure
from csulora_cli.report import CarriedRecord
from csulora_cli.settings import DoraMode
from csulora_cli.text import some


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


def settle_weights(
    adapter: Adapter, structure: Structure, weight_of: Callable[[Site], Tensor], mode: DoraMode, progress: Progress
) -> Adapter:
    """The adapter with updates that no longer depend on the host's weights; says what DoRA keeps.

    Args:
        adapter: bound to the host.
        structure: of the host.
        weight_of: a site's weight in the host as (out, in).
        mode: what is done with the magnitudes of DoRA.
        progress: receives the warning.
    """
    if adapter.has_magnitudes and mode is DoraMode.MERGE_SVD:
        return with_merged_magnitudes(adapter, structure, weight_of)
    if adapter.has_magnitudes:
        progress.warn(
            "the adapter uses DoRA: the gain that its magnitudes give each row of the host's weights stays, whatever "
            "harm it holds; the update beside it is repaired"
        )
    return with_weights(adapter, structure, weight_of)


def carried_records(adapter: Adapter, is_copy: Callable[[Carried], bool]) -> tuple[CarriedRecord, ...]:
    """What each carried tensor does.

    Args:
        adapter: bound to the host.
        is_copy: whether a carried tensor holds the values that the host has in its place.
    """
    records = []
    for entry in adapter.carried:
        effect = "training" if entry.weight is None else "copy" if is_copy(entry) else "replaces"
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
    progress.warn(
        f"{len(active)} tensors act beside the low-rank updates and are carried as they are, with any harm that they "
        f"hold: {some(active, 2)}"
    )
