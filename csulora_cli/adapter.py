"""Read a LoRA adapter folder: its two files, every low-rank update with its scale, and what is carried along.

Nothing is ever unpickled, and `adapter_config.json` is read as plain JSON: PEFT's own config class imports optional
packages and forgives unknown fields. `read_adapter` checks what can be checked without the host, `bind` the rest.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from csulora_cli.errors import AdapterError, UnsupportedError
from csulora_cli.files import MAX_JSON_BYTES, leaves_folder, parse_json_object, read_bytes
from csulora_cli.formats.carried import Carried
from csulora_cli.formats.config import CONFIG_NAME, DERIVED_INITS, UNSUPPORTED_HINT, default_alpha
from csulora_cli.formats.conversions import Content, without_initial, without_magnitudes
from csulora_cli.formats.dialect import MLX, PEFT, Dialect, dialect_of
from csulora_cli.formats.magnitude import gain_of
from csulora_cli.formats.replication import Repeats, Replication, replication_of
from csulora_cli.formats.site import Kind, Site
from csulora_cli.formats.structure import Structure
from csulora_cli.formats.targets import Target, describe_sites
from csulora_cli.patterns import time_limit
from csulora_cli.tensorfile import read_tensor_file
from csulora_cli.text import printable, some

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as read from its folder.

    Attributes:
        folder: where it lies.
        config: `adapter_config.json` as parsed, or as a conversion left it.
        tensors: all tensors of the file, under canonical names, or as a conversion left them.
        dialect: the format of the folder.
        targets: every low-rank update, sorted by module.
        carried: what is no low-rank update; known once the adapter is bound to a host.
        conversions: how config and tensors differ from what the files hold, in words.
        sha256: hexadecimal digests of the two files that were read, by file name.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    dialect: Dialect
    targets: tuple[Target, ...]
    carried: tuple[Carried, ...]
    conversions: tuple[str, ...]
    sha256: Mapping[str, str]

    @property
    def sites(self) -> tuple[Site, ...]:
        """What the solver sees, in the order of the targets."""
        return tuple(site for target in self.targets for site in target.sites)

    @property
    def content(self) -> Content:
        """Config and tensors, for a conversion."""
        return Content(self.config, self.tensors, self.conversions)

    @property
    def base(self) -> str | None:
        """The base model that the config names, or None. Untrusted text."""
        base = self.config.get(self.dialect.base_field)
        return base if isinstance(base, str) and base else None

    @property
    def replication(self) -> Replication | None:
        """Which layers of the host it repeats, or None."""
        return replication_of(self.config)

    @property
    def dtypes(self) -> list[str]:
        """The stored dtypes of the factors, without the `torch.` in front."""
        return sorted({str(t.dtype).removeprefix("torch.") for m in self.targets for t in (m.lora_a, m.lora_b)})

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({site.rank for site in self.sites})

    @property
    def has_magnitudes(self) -> bool:
        """Whether it uses DoRA."""
        return any(target.magnitude is not None for target in self.targets)

    @property
    def needs_weights(self) -> bool:
        """Whether the update depends on the host's weights, and has not been computed from them yet."""
        return self.config.get("init_lora_weights") in DERIVED_INITS or any(
            target.magnitude is not None and site.gain is None for target in self.targets for site in target.sites
        )

    @property
    def needs_structure(self) -> bool:
        """Whether names alone do not tell where in the host every tensor belongs."""
        known = {
            key
            for target in self.targets
            for key in (target.key_a, target.key_b, target.key_bias, target.key_magnitude)
        }
        is_open = self.config.get("ensure_weight_tying") or self.replication is not None
        if is_open or any(not target.sites for target in self.targets):
            return True
        return not known.issuperset(self.tensors) or any(t.layout.kind is not Kind.LINEAR for t in self.targets)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder and check everything that can be checked without the host.

    Raises:
        AdapterError: a file is missing, unreadable, malformed, or holds values that are no adapter.
        UnsupportedError: the adapter uses a feature that is not repaired.
    """
    _check_link(folder / CONFIG_NAME)
    if not os.path.lexists(folder / CONFIG_NAME):
        raise AdapterError(f"{CONFIG_NAME} is missing in {printable(folder)}", _folder_hint(PEFT.weights_name))
    config_bytes = read_bytes(folder / CONFIG_NAME, AdapterError, MAX_JSON_BYTES)
    config = parse_json_object(config_bytes, folder / CONFIG_NAME, AdapterError)
    dialect = dialect_of(config)
    with _naming(CONFIG_NAME), time_limit():
        dialect.check(config)
    path = folder / dialect.weights_name
    _check_link(path)
    if not os.path.lexists(path):
        raise _no_weights(path)
    weights = read_tensor_file(path, AdapterError)
    with _naming(path.name), time_limit():
        content = dialect.convert(Content(config, weights.tensors))
        targets = dialect.find_targets(content.config, content.tensors, None)
    if not targets:
        raise _no_factors(path.name, weights.tensors)
    sha256 = {CONFIG_NAME: _digest(config_bytes), path.name: weights.sha256}
    return Adapter(folder, dict(content.config), content.tensors, dialect, targets, (), content.conversions, sha256)


def rewritten(adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter with other values in its layout, to be bound again: what would be read if they were written."""
    return _with(adapter, Content(config, tensors, adapter.conversions))


def _check_link(path: Path) -> None:
    if leaves_folder(path):
        raise AdapterError(
            f"{printable(path)} is a link that leaves the folder",
            "Put a copy of the file there: a downloaded link could name any file of this machine.",
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of the file that was read in front of refusals that name none."""
    try:
        yield
    except AdapterError as problem:
        if any(file in problem.message for file in (CONFIG_NAME, PEFT.weights_name, MLX.weights_name)):
            raise
        raise type(problem)(f"{name}: {problem.message}", problem.hint) from None


def bind(adapter: Adapter, structure: Structure) -> Adapter:
    """The adapter with every tensor's place in the host known and checked, under the host's names for its modules.

    Raises:
        HostError: the host has no such module or parameter, or one of another kind or size.
        AdapterError: what the host shows to be wrong in the adapter.
        UnsupportedError: the adapter uses a feature that is not repaired.
    """
    if any(target.module not in structure.modules for target in adapter.targets):
        adapter = _with(adapter, adapter.dialect.respell(adapter.content, structure))
    if adapter.config.get("ensure_weight_tying"):
        adapter = _with(adapter, adapter.dialect.untie(adapter.content, structure))
    bound = replace(
        adapter,
        targets=adapter.dialect.find_targets(adapter.config, adapter.tensors, structure),
        carried=adapter.dialect.find_carried(adapter.config, adapter.tensors, structure),
    )
    if structure.repeats is not None:
        _check_repeated(bound, structure.repeats)
    return bound


def with_weights(adapter: Adapter, structure: Structure, weight_of: Callable[[Site], Tensor]) -> Adapter:
    """A bound adapter whose updates no longer depend on the host's weights.

    PiSSA and OLoRA become plain LoRA; the sites of DoRA get their gains.

    Args:
        adapter: a bound one.
        structure: what it is bound to.
        weight_of: a site's weight in the host as (out, in).

    Raises:
        UnsupportedError: see `conversions.without_initial`.
    """
    if adapter.config.get("init_lora_weights") in DERIVED_INITS:
        adapter = bind(_with(adapter, without_initial(adapter.content, adapter.targets, weight_of)), structure)
    return replace(adapter, targets=tuple(_with_gain(target, weight_of) for target in adapter.targets))


def _with_gain(target: Target, weight_of: Callable[[Site], Tensor]) -> Target:
    if target.magnitude is None:
        return target
    (site,) = target.sites
    gain = gain_of(weight_of(site), site.lora_a, site.lora_b, site.scale, target.magnitude)
    lora_b = (gain[:, None] * site.lora_b.double()).float()
    return replace(target, sites=(replace(site, lora_b=lora_b, gain=gain),))


def with_merged_magnitudes(adapter: Adapter, structure: Structure, weight_of: Callable[[Site], Tensor]) -> Adapter:
    """A bound adapter whose DoRA updates are replaced by the best plain ones of the same rank, magnitudes included."""
    return bind(_with(adapter, without_magnitudes(adapter.content, adapter.targets, weight_of)), structure)


def _with(adapter: Adapter, content: Content) -> Adapter:
    """The adapter of other content, to be bound again."""
    return replace(
        adapter,
        config=dict(content.config),
        tensors=content.tensors,
        targets=adapter.dialect.find_targets(content.config, content.tensors, None),
        carried=(),
        conversions=content.conversions,
    )


def _check_repeated(adapter: Adapter, repeats: Repeats) -> None:
    """What changes a weight of a repeated layer itself changes it in all copies, in an order that only PEFT knows."""
    init = adapter.config.get("init_lora_weights")
    replaced = [] if adapter.config.get("modules_to_save") else [entry.weight or "" for entry in adapter.carried]
    if init in DERIVED_INITS:
        beside = f"init_lora_weights {init}"
    elif adapter.config.get("bias", "none") != "none":
        beside = f"bias {printable(adapter.config['bias'])}"
    elif any(repeats.holds(weight) for weight in replaced):
        beside = "whole weights of these layers"
    else:
        return
    raise UnsupportedError(f"the adapter repeats layers (layer_replication) and has {beside}", UNSUPPORTED_HINT)


def describe(adapter: Adapter) -> str:
    """One line for people: rank, scale or its spread, dtype, number of sites."""
    return f"LoRA {describe_sites(adapter.sites)}, {some(adapter.dtypes)}, {len(adapter.sites)} modules"


def scale_options(adapter: Adapter) -> list[str]:
    """The settings by which some update of a PEFT adapter has another scale than lora_alpha/r for an alpha above 0.

    Not every server heeds them.
    """
    if adapter.dialect is not PEFT:
        return []
    alpha = default_alpha(adapter.config)
    uses = {
        "rsLoRA": bool(adapter.config.get("use_rslora")) and any(site.rank > 1 for site in adapter.sites),
        "alpha_pattern": any(site.alpha != alpha for site in adapter.sites),
        "a lora_alpha of 0": alpha == 0,
    }
    return [option for option, is_used in uses.items() if is_used]


def _no_factors(weights_name: str, tensors: Mapping[str, Tensor]) -> AdapterError:
    if not tensors:
        return AdapterError(
            f"{weights_name} holds no tensors",
            "Save the adapter again; ZeRO-3 training needs stage3_gather_16bit_weights_on_model_save.",
        )
    return UnsupportedError(
        f"{weights_name} holds no LoRA factors, only {some(sorted(tensors), 2)}",
        "There is no low-rank update to repair: these tensors replace weights of the base.",
    )


def _folder_hint(weights_name: str) -> str:
    return f"An adapter folder holds {CONFIG_NAME} and {weights_name}, each in one piece."


def _no_weights(path: Path) -> AdapterError:
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLE_ENDINGS)]:
        return AdapterError(
            f"{printable(folder)} has only {some(pickles, 2)}, a pickle, which can run code when it is opened",
            "Convert it on a machine you can lose: load it in PEFT and call "
            "save_pretrained(..., safe_serialization=True).",
        )
    others = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    found = f"; there is {some(others, 2)}" if others else ""
    return AdapterError(f"{path.name} is missing in {printable(folder)}{found}", _folder_hint(path.name))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
