"""What a repair did and what was measured: data, its JSON form, and the verdict in words. No torch in here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from csulora_cli.stats import Count

SCHEMA_VERSION = 1
# A host that refuses fewer harmful prompts than this has no refusals that a repair could restore.
HOST_REFUSES = 0.5


@dataclass(frozen=True)
class InputRecord:
    """One input: its Hub id or folder name, commit, and the SHA-256 of every file that was used."""

    name: str
    commit: str | None
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class Behaviour:
    """One model on the report prompts.

    Attributes:
        harmful_refused, harmful_answered, harmful_incoherent: greedy answers to harmful prompts by the refusal test.
        benign_refused: over-refusal.
        harmful_kl_to_host, benign_kl_to_host, benign_kl_to_adapter: mean KL of the first answer token, nats.
        first_token_contrast: total variation distance between the mean first-token distributions on harmful and on
            benign prompts: 0 means that it begins both answers alike.
    """

    harmful_refused: Count
    harmful_answered: Count
    harmful_incoherent: Count
    benign_refused: Count
    harmful_kl_to_host: float
    benign_kl_to_host: float
    benign_kl_to_adapter: float
    first_token_contrast: float


@dataclass(frozen=True)
class PathRecord:
    """One λ of the search: KL(host ‖ repaired) on harmful and KL(adapter ‖ repaired) on benign tuning prompts.

    The latter is None where it was not measured.
    """

    strength: float
    harmful_kl: float
    benign_kl: float | None
    moved: float


@dataclass(frozen=True)
class StrengthRecord:
    """How λ came about.

    Attributes:
        value: λ.
        is_auto: found by measuring.
        is_reached: the KL limit is met (None for a given λ).
        limit: the KL limit, nats (None for a given λ).
        adapter_kl: KL(host ‖ adapter) on harmful tuning prompts, nats (None for a given λ). In both, and along the
            path, a harmful prompt counts at most `settings.MOST_A_PROMPT`.
        path: what was tried, ascending.
    """

    value: float
    is_auto: bool
    is_reached: bool | None = None
    limit: float | None = None
    adapter_kl: float | None = None
    path: Sequence[PathRecord] = ()


@dataclass(frozen=True)
class ModuleRecord:
    """One adapted module; energies are shares of its own ‖Δ‖²."""

    name: str
    rank: int
    energy: float
    moved: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    chance: Mapping[str, float]
    objective_before: float
    objective_after: float
    storage_error: float
    truncation_error: float | None = None
    directions: int | None = None
    direction_energy: float | None = None
    displacement_norm: float | None = None
    rounding_share: float | None = None


@dataclass(frozen=True)
class CarriedRecord:
    """One tensor that is written as it was read because it is no low-rank update.

    Attributes:
        key: its name in the file.
        effect: "replaces" a weight of the host, is a "copy" of one, is a "bias" that is added whatever the input is, or
            is read in "training" only.
        weight: what it replaces, copies or adds to; None for what only training reads.
    """

    key: str
    effect: str
    weight: str | None

    @property
    def is_active(self) -> bool:
        """Whether it changes what the model does, beside the low-rank updates."""
        return self.effect in ("replaces", "bias")


@dataclass(frozen=True)
class FixReport:
    """The result of `fix_adapter`; `to_dict` is what `csulora.json` and `--json` hold.

    Attributes:
        version: of csulora.
        out: the folder that was written.
        adapter_summary: rank, scale, dtype and number of modules, for people.
        library: the library whose format the adapter has, "peft" or "mlx".
        inputs: adapter, host, and where used unaligned and prompts.
        settings: every setting as it was used.
        prompt_counts: harmful and benign prompts a split (empty if no prompt was used); of the directions, how many
            `harmful` ones and `lookalikes` the update fades on, and only those benign ones that are protected.
        strength: λ and how it came about.
        modules: one record a module.
        behaviour: host, adapter and repaired on the report prompts (empty if nothing was run).
        tensors: how many of the adapter's tensors were changed, unchanged, carried and dropped; they add up to total.
        conversions: how the adapter was rewritten as plain LoRA before it was repaired, in words.
        carried: what is no low-rank update and was written as it was read.
        files: SHA-256 of every file written, csulora.json aside.
        warnings: what was said on the way.
    """

    version: str
    out: str
    adapter_summary: str
    library: str
    inputs: Mapping[str, InputRecord]
    settings: Mapping[str, Any]
    prompt_counts: Mapping[str, Mapping[str, int]]
    strength: StrengthRecord
    modules: Sequence[ModuleRecord]
    behaviour: Mapping[str, Behaviour] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    conversions: Sequence[str] = ()
    carried: Sequence[CarriedRecord] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def moved(self) -> float:
        """Σ‖X − Δ‖² / Σ‖Δ‖²."""
        total = sum(module.energy for module in self.modules)
        return sum(module.energy * module.moved for module in self.modules) / total if total > 0 else 0.0

    @property
    def storage_error(self) -> float:
        """The largest ‖X_stored − X‖ / ‖X‖ of all modules."""
        return max((module.storage_error for module in self.modules), default=0.0)

    @property
    def is_unchanged(self) -> bool:
        """Whether every tensor was written as it was read."""
        return self.tensors.get("changed", 0) == 0 and not self.conversions

    @property
    def failed_gates(self) -> list[str]:
        """What a batch should stop for, in words; empty if nothing."""
        gates = []
        if self.strength.is_reached is False:
            gates.append(
                f"no λ up to {self.strength.path[-1].strength:g} brings KL(host ‖ repaired) on harmful prompts to "
                f"{self.strength.limit:.3g} nats"
            )
        host = self.behaviour.get("host")
        return gates + (host_gates(host.harmful_refused) if host else [])

    @property
    def exit_code(self) -> int:
        """0 done and verified, 3 finished but a gate failed."""
        return 3 if self.failed_gates else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats rounded to six significant digits."""
        plain = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        plain["totals"] = {"moved": self.moved, "storage_error": self.storage_error}
        plain["failed_gates"] = self.failed_gates
        plain["exit_code"] = self.exit_code
        result: dict[str, Any] = rounded(plain)
        return result


def host_gates(refused: Count) -> list[str]:
    """What is to be said of a host that hardly refuses; empty if it does."""
    if refused.count >= HOST_REFUSES * refused.total:
        return []
    return [
        f"the host itself refuses only {refused.count} of {refused.total} harmful prompts: a repair restores no more "
        "than the host had"
    ]


def rounded(value: Any) -> Any:
    """Plain JSON values of data: floats to six significant digits, None for those that JSON does not know."""
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value
