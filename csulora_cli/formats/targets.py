"""Targets: each low-rank update of an adapter file, with its tensors, its layout and the sites that it consists of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from csulora_cli.errors import AdapterError, HostError, UnsupportedError
from csulora_cli.formats import config as fields
from csulora_cli.formats.config import CONFIG_NAME, UNSUPPORTED_HINT
from csulora_cli.formats.layouts import Layout, groups_of, layout_of
from csulora_cli.formats.names import PREFIX, Group, Name, Role, group_names, parse_name
from csulora_cli.formats.site import Kind, Place, Site
from csulora_cli.formats.structure import Structure
from csulora_cli.text import number, printable, some

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OTHER_HOST = "Give the model that the adapter was trained on."
# Parts of names of LoRA tensors that are no plain factors, and the name that users know them by.
_FEATURES = {
    "lora_diag": "KaSA",
}


@dataclass(frozen=True)
class Target:
    """One low-rank update as the file holds it.

    Attributes:
        module: the adapted module in the host.
        key_a, key_b: the names of A and B in the file.
        lora_a, lora_b: as stored.
        layout: how they are stored.
        key_bias: the name of the bias of `lora_bias`, or None.
        key_magnitude: the name of the magnitudes of DoRA, or None.
        magnitude: those magnitudes, (out,), as stored.
        sites: what the solver sees; empty as long as only the host can tell (a parameter, the end of a tie).
    """

    module: str
    key_a: str
    key_b: str
    lora_a: Tensor
    lora_b: Tensor
    layout: Layout
    sites: tuple[Site, ...]
    key_bias: str | None = None
    key_magnitude: str | None = None
    magnitude: Tensor | None = None


def find_targets(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], structure: Structure | None = None
) -> tuple[Target, ...]:
    """Pair the factors and give each site its scale, as PEFT does.

    Args:
        config: of the adapter, its fields checked.
        tensors: of the file, under canonical names.
        structure: of the host, or None to check only what can be checked without it.

    Raises:
        AdapterError: unpaired or ill-shaped factors, a wrong rank, NaN or Inf.
        UnsupportedError: a tensor that is neither a factor nor anything that can be carried.
        HostError: the host has no such module, or one of another kind or size.
    """
    names = [parse_name(key) or _not_canonical(key) for key in tensors]
    groups = group_names(names)
    if structure is not None:
        check_modules(sorted({group.module for group in groups}), structure)
    return tuple(_target(config, tensors, group, groups, structure) for group in groups)


def check_modules(names: Sequence[str], structure: Structure) -> None:
    """Check that the host has all adapted modules.

    Raises:
        HostError: it lacks some; the message shows both sides.
    """
    if missing := [name for name in names if name not in structure.modules]:
        others = [name for name, module in structure.modules.items() if module.layer is not None]
        raise HostError(
            f"{len(missing)} of {len(names)} adapted modules are not in the host: the adapter has {some(missing, 2)}; "
            f"the host has {some(others, 2)}",
            _OTHER_HOST,
        )


def _target(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    group: Group,
    groups: Sequence[Group],
    structure: Structure | None,
) -> Target:
    _check_roles(group)
    _check_flags(config, group)
    key_a, key_b = group.names[Role.FACTOR_A].key, group.names[Role.FACTOR_B].key
    lora_a, lora_b = tensors[key_a], tensors[key_b]
    for letter, tensor in (("A", lora_a), ("B", lora_b)):
        check_values(group.module, letter, tensor)
    is_targeted = fields.is_targeted(config, group.module)
    is_parameter = not is_targeted and fields.may_own_parameters(config, group.module)
    # The other end of a shared weight need not be targeted; which one that is only the host can tell.
    may_be_tied = structure is None and bool(config.get("ensure_weight_tying"))
    if not is_targeted and not is_parameter and not may_be_tied:
        raise AdapterError(
            f"{CONFIG_NAME} does not target '{printable(group.module)}', which the weights hold an update of",
            "PEFT would ignore these tensors: correct target_modules, or remove them.",
        )
    layout = layout_of(group.names[Role.FACTOR_A].suffix, lora_a.ndim, is_parameter)
    if group.names[Role.FACTOR_B].suffix != layout.suffixes[1]:
        raise AdapterError(f"{printable(key_a)} and {printable(key_b)} are factors of different layers")
    if group.depth and not is_parameter:
        raise UnsupportedError(f"{printable(key_a)} adapts a layer inside another adapter", UNSUPPORTED_HINT)
    unbound = Target(group.module, key_a, key_b, lora_a, lora_b, layout, ())
    bias = _bias(group, tensors, unbound)
    if Role.MAGNITUDE in group.names:
        unbound = _with_magnitude(group, tensors, unbound)
    if not is_targeted and not is_parameter:
        return unbound
    if not is_parameter:
        place = Place(group.module, layout.kind)
        if layout.kind is Kind.CONVOLUTION:
            place = replace(place, groups=groups_of(lora_a, lora_b))
        target = _with_sites(config, unbound, group.module, [place])
        if bias is not None:
            target = replace(target, sites=(replace(target.sites[0], bias=bias),), key_bias=group.names[Role.BIAS].key)
        if structure is not None:
            _check_module(target, structure)
        return target
    if structure is None:
        return unbound
    return _bind_parameter(config, unbound, group, groups, structure)


def _check_roles(group: Group) -> None:
    if Role.OTHER in group.names:
        raise _unsupported_tensor(group.names[Role.OTHER])
    for role in (Role.FACTOR_A, Role.FACTOR_B):
        if role not in group.names:
            raise AdapterError(
                f"module '{printable(group.module)}' has no lora_{role}", "Save or download the adapter again."
            )


# Tensors that PEFT reads only if the config says so, and those without which it would make up some of its own.
_FLAGS = ((Role.BIAS, "lora_bias", False), (Role.MAGNITUDE, "use_dora", True))


def _check_flags(config: Mapping[str, Any], group: Group) -> None:
    for role, field, is_needed in _FLAGS:
        is_on, is_there = bool(config.get(field)), role in group.names
        if is_there != is_on and (is_there or is_needed):
            raise AdapterError(
                f"{field} is {str(is_on).lower()} in {CONFIG_NAME}, but '{printable(group.module)}' has "
                f"{'a' if is_there else 'no'} lora {role}",
                "The config and the weights do not belong together; download both again.",
            )


def check_values(module: str, letter: str, tensor: Tensor) -> None:
    """Check the dtype, the shape and the values of a factor.

    Raises:
        AdapterError: no shape of a factor, NaN or Inf.
        UnsupportedError: a dtype that is not repaired.
    """
    if tensor.dtype not in DTYPES:
        raise UnsupportedError(
            f"lora_{letter} of '{printable(module)}' is stored as {str(tensor.dtype).removeprefix('torch.')}",
            "csulora repairs float32, float16 and bfloat16 adapters.",
        )
    if not 2 <= tensor.ndim <= 5 or 0 in tensor.shape:
        raise AdapterError(
            f"lora_{letter} of '{printable(module)}' has shape {printable(tuple(tensor.shape), 60)}, "
            "not two sizes above zero",
            "A sharded training run may have saved an unfinished adapter; save it again.",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(
            f"lora_{letter} of '{printable(module)}' holds NaN or Inf",
            "Training diverged or the file is damaged: use another checkpoint.",
        )


def _bias(group: Group, tensors: Mapping[str, Tensor], target: Target) -> Tensor | None:
    """The bias of `lora_bias`, which PEFT knows for linear layers and convolutions."""
    if Role.BIAS not in group.names:
        return None
    bias = tensors[group.names[Role.BIAS].key]
    if target.layout.kind not in (Kind.LINEAR, Kind.CONVOLUTION):
        raise UnsupportedError(
            f"'{printable(group.names[Role.BIAS].key)}' is a LoRA bias of a {target.layout.name}, which PEFT has not",
            UNSUPPORTED_HINT,
        )
    if bias.dtype not in DTYPES or tuple(bias.shape) != (target.lora_b.shape[0],) or not bias.isfinite().all():
        raise AdapterError(
            f"'{printable(group.names[Role.BIAS].key)}' is no bias of {target.lora_b.shape[0]} finite numbers",
            "The file is damaged: use another one.",
        )
    return bias


def _with_magnitude(group: Group, tensors: Mapping[str, Tensor], target: Target) -> Target:
    """The target with its magnitudes of DoRA, which are repaired on linear layers."""
    name = group.names[Role.MAGNITUDE]
    magnitude = tensors[name.key]
    if target.layout.kind is not Kind.LINEAR or Role.BIAS in group.names:
        raise UnsupportedError(
            f"the adapter uses DoRA on a layer that is not plainly linear: '{printable(name.key)}'", UNSUPPORTED_HINT
        )
    rows = target.lora_b.shape[0]
    if magnitude.dtype not in DTYPES or magnitude.numel() != rows or not magnitude.isfinite().all():
        raise AdapterError(
            f"'{printable(name.key)}' is no magnitude of {rows} finite numbers", "The file is damaged: use another one."
        )
    return replace(target, key_magnitude=name.key, magnitude=magnitude.flatten())


def _with_sites(config: Mapping[str, Any], target: Target, name: str, places: Sequence[Place]) -> Target:
    """The target with one site a place; `name` is what PEFT's patterns see."""
    rank = fields.rank_of(config, name)
    if not target.layout.fits(target.lora_a, target.lora_b, rank):
        raise AdapterError(
            f"module '{printable(name)}' should have rank {rank} by {CONFIG_NAME}, but lora_A is "
            f"{tuple(target.lora_a.shape)} and lora_B is {tuple(target.lora_b.shape)}",
            "The config and the weights do not belong together; download both again.",
        )
    pairs = target.layout.unpack(target.lora_a, target.lora_b, rank)
    if len(pairs) != len(places):
        raise HostError(
            f"'{printable(name)}' has {len(places)} experts in the host, but {len(pairs)} of rank {rank} in the "
            "adapter",
            _OTHER_HOST,
        )
    alpha = fields.alpha_of(config, name)
    scale = fields.scale_of(config, rank, alpha)
    sites = []
    for (lora_a, lora_b), place in zip(pairs, places, strict=True):
        own = name if place.expert is None else f"{name}[{place.expert}]"
        site = Site(own, lora_a, lora_b, alpha, scale, place)
        site.check_size()
        sites.append(site)
    return replace(target, sites=tuple(sites))


def _bind_parameter(
    config: Mapping[str, Any], target: Target, group: Group, groups: Sequence[Group], structure: Structure
) -> Target:
    """Find which parameter a wrapper adapts: PEFT wraps a module once a targeted parameter, the first one innermost."""
    module = structure.modules[target.module]
    wanted = fields.targeted_parameters(config, target.module, module.shapes)
    depths = [other.depth for other in groups if other.module == group.module]
    if sorted(depths) != list(range(len(wanted))):
        raise HostError(
            f"{CONFIG_NAME} targets {len(wanted)} parameters of '{printable(target.module)}', but the file holds "
            f"updates of {len(depths)}",
            "The config, the weights and the host do not belong together.",
        )
    parameter = wanted[len(wanted) - 1 - group.depth]
    shape = module.shapes[parameter]
    is_swapped = len(shape) == 3 and module.is_transposed
    rows, columns = shape[-2:]
    expected = (columns, rows) if is_swapped else (rows, columns)
    if len(shape) not in (2, 3) or (target.lora_b.shape[0], target.lora_a.shape[1]) != expected:
        raise _other_size(f"{target.module}.{parameter}", shape, target)
    experts = range(shape[0]) if len(shape) == 3 else [None]
    places = [Place(target.module, Kind.PARAMETER, parameter, expert, is_swapped) for expert in experts]
    return _with_sites(config, target, f"{target.module}.{parameter}", places)


_LAYERS = {Kind.LINEAR: "linear", Kind.EMBEDDING: "embedding", Kind.CONVOLUTION: "convolution"}


def _check_module(target: Target, structure: Structure) -> None:
    module = structure.modules[target.module]
    kind = target.layout.kind
    if module.layer != _LAYERS[kind]:
        raise HostError(
            f"module '{printable(target.module)}' of the host is a {printable(module.kind)}, but the adapter holds an "
            f"update of {kind} layers",
            _OTHER_HOST,
        )
    if module.has_gaps:
        raise UnsupportedError(
            f"'{printable(target.module)}' is a convolution with dilation, beside which PEFT cannot run an update",
            UNSUPPORTED_HINT,
        )
    groups = target.sites[0].place.groups
    if groups != module.groups:
        raise HostError(
            f"'{printable(target.module)}' of the host is a convolution of {module.groups} groups, but the adapter "
            f"holds an update of {groups}",
            _OTHER_HOST,
        )
    out_features, in_features = target.lora_b.shape[0], target.lora_a.shape[1]
    kernel = tuple(target.lora_a.shape[2:])
    is_swapped = kind is Kind.EMBEDDING or module.is_conv1d
    expected = (in_features, out_features) if is_swapped else (out_features, in_features // groups, *kernel)
    if module.shapes.get("weight") != expected:
        raise _other_size(f"{target.module}.weight", module.shapes.get("weight"), target)


def _other_size(weight: str, shape: tuple[int, ...] | None, target: Target) -> HostError:
    return HostError(
        f"'{printable(weight)}' of the host is {shape}, but the adapter changes it by lora_B "
        f"{tuple(target.lora_b.shape)} times lora_A {tuple(target.lora_a.shape)}",
        _OTHER_HOST,
    )


def _not_canonical(key: str) -> Name:
    raise UnsupportedError(
        f"tensor '{printable(key)}' is not named as PEFT names LoRA factors",
        f"Expected names like {PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight.",
    )


def _unsupported_tensor(name: Name) -> UnsupportedError:
    for part, feature in _FEATURES.items():
        if part in name.key:
            return UnsupportedError(f"the adapter uses {feature}: tensor '{printable(name.key)}'", UNSUPPORTED_HINT)
    return UnsupportedError(
        f"tensor '{printable(name.key)}' is not named as PEFT names LoRA factors",
        f"Expected names like {PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight.",
    )


def describe_sites(sites: Sequence[Site]) -> str:
    """Ranks and scales for people: `rank 8, scale 2`."""
    ranks = "/".join(str(rank) for rank in sorted({site.rank for site in sites}))
    scales = sorted({site.scale for site in sites})
    scale = number(scales[0]) if len(scales) == 1 else f"{number(scales[0])} to {number(scales[-1])}"
    return f"rank {ranks}, scale {scale}"
