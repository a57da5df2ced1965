"""Kinds of adapter that are rewritten as plain LoRA when they are read, because the closest update has no such form.

Each conversion leaves the update as it is and gives a config and tensors that PEFT reads as that update.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csulora_cli.errors import AdapterError, InputError, UnsupportedError
from csulora_cli.formats.config import CONFIG_NAME, UNSUPPORTED_HINT
from csulora_cli.formats.magnitude import merged_factors
from csulora_cli.formats.names import Role, parse_name
from csulora_cli.formats.site import Kind, Site
from csulora_cli.formats.spelling import canonical_keys, renamed_config, renamed_tensors, respellings
from csulora_cli.formats.structure import Structure
from csulora_cli.formats.targets import Target, find_targets
from csulora_cli.text import printable, some

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Content:
    """What an adapter folder holds, and how it was rewritten.

    Attributes:
        config: of the adapter.
        tensors: under canonical names.
        conversions: what was done, in words.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    conversions: tuple[str, ...] = ()


def convert(content: Content) -> Content:
    """All conversions that need no host."""
    return _with_dense_blocks(_with_wider_dtypes(with_canonical_keys(_without_null_patterns(content))))


def _without_null_patterns(content: Content) -> Content:
    """`{}` in the place of null, which PEFT cannot load."""
    nulls = [field for field in ("rank_pattern", "alpha_pattern") if content.config.get(field, {}) is None]
    if not nulls:
        return content
    empty: dict[str, Any] = {field: {} for field in nulls}
    words = f"{' and '.join(nulls)} empty in the place of null"
    return Content({**content.config, **empty}, content.tensors, (*content.conversions, words))


def _with_wider_dtypes(content: Content) -> Content:
    """Factors in eight bits as bfloat16, which holds each of their values; PEFT widens them when it loads them."""
    found = [key for key, tensor in content.tensors.items() if tensor.dtype in _EIGHT_BITS]
    if not found:
        return content
    wider = {key: content.tensors[key].to(torch.bfloat16) for key in found}
    return Content(
        content.config,
        {**content.tensors, **wider},
        (*content.conversions, f"{len(found)} tensors of eight bits stored as bfloat16"),
    )


def _with_dense_blocks(content: Content) -> Content:
    """BD-LoRA: a block-diagonal factor with its zeros. The closest update has no blocks in A, so all are filled in."""
    settings = content.config.get("use_bdlora")
    if not settings:
        return content
    blocks, by_factor = _block_settings(settings)
    tensors = dict(content.tensors)
    for key, tensor in content.tensors.items():
        name = parse_name(key)
        patterns = by_factor.get(name.role, []) if name is not None else []
        if name is None or not any(pattern in name.module for pattern in patterns):
            continue
        if tensor.ndim != 2 or tensor.shape[0] % blocks:
            raise AdapterError(
                f"'{printable(key)}' has shape {tuple(tensor.shape)}, which {blocks} blocks do not divide",
                "The config and the weights do not belong together; download both again.",
            )
        tensors[key] = torch.block_diag(*tensor.chunk(blocks))  # type: ignore[no-untyped-call]
    return Content(
        {**content.config, "use_bdlora": None},
        tensors,
        (*content.conversions, f"BD-LoRA of {blocks} blocks as plain LoRA"),
    )


def _block_settings(settings: Any) -> tuple[int, dict[Role, list[str]]]:
    if isinstance(settings, dict):
        blocks = settings.get("nblocks", 1)
        names = [settings.get(f"target_modules_bd_{letter}") or [] for letter in "ab"]
        if type(blocks) is int and blocks > 0 and all(isinstance(own, list) for own in names):
            return blocks, dict(zip((Role.FACTOR_A, Role.FACTOR_B), names, strict=True))
    raise AdapterError(f"use_bdlora in {CONFIG_NAME} does not say which factors have how many blocks")


def without_initial(content: Content, targets: tuple[Target, ...], weight_of: Callable[[Site], Tensor]) -> Content:
    """PiSSA and OLoRA as plain LoRA of twice the rank.

    PEFT computes factors B₀, A₀ from the base weight W each time that it loads such an adapter and runs it on
    W − s·B₀A₀. The update of W is s(BA − B₀A₀) = s·[B, −B₀][A; A₀].

    Args:
        content: with `init_lora_weights` pissa or olora.
        targets: of this content.
        weight_of: a site's weight as (out, in).

    Raises:
        UnsupportedError: a layer for which PEFT derives no such factors.
    """
    init = str(content.config["init_lora_weights"])
    tensors = dict(content.tensors)
    for target in targets:
        if target.layout.kind is not Kind.LINEAR:
            raise UnsupportedError(
                f"'{printable(target.module)}' is no linear layer, for which PEFT has no {init}", UNSUPPORTED_HINT
            )
        (site,) = target.sites
        first_a, first_b = initial_factors(weight_of(site).float(), site.rank, site.scale, init)
        tensors[target.key_a] = torch.cat([target.lora_a, first_a.to(target.lora_a.dtype)])
        tensors[target.key_b] = torch.cat([target.lora_b, -first_b.to(target.lora_b.dtype)], dim=1)
    return Content(
        _twice_the_rank(content.config), tensors, (*content.conversions, f"{init} as plain LoRA of twice the rank")
    )


def without_magnitudes(content: Content, targets: tuple[Target, ...], weight_of: Callable[[Site], Tensor]) -> Content:
    """DoRA as plain LoRA of the same rank: the truncated update of each weight, with how much that leaves out.

    Args:
        content: with `use_dora`.
        targets: of this content, without gains.
        weight_of: a site's weight as (out, in).
    """
    tensors = dict(content.tensors)
    total = missed = 0.0
    for target in targets:
        if target.magnitude is None or target.key_magnitude is None:
            continue
        (site,) = target.sites
        if site.scale == 0:
            raise UnsupportedError("a DoRA adapter with a scale of 0 has no plain form", UNSUPPORTED_HINT)
        lora_a, lora_b, norm, lost = merged_factors(
            weight_of(site), site.lora_a, site.lora_b, site.scale, target.magnitude
        )
        tensors[target.key_a], tensors[target.key_b] = lora_a.to(site.lora_a.dtype), lora_b.to(site.lora_b.dtype)
        del tensors[target.key_magnitude]
        total, missed = total + norm, missed + lost
    share = (missed / total) ** 0.5 if total > 0 else 0.0
    words = f"DoRA as plain LoRA of the same rank, missing {100 * share:.2g}% of the update's norm"
    return Content({**content.config, "use_dora": False}, tensors, (*content.conversions, words))


def initial_factors(weight: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) that PEFT starts PiSSA or OLoRA from.

    Args:
        weight: W, (out, in), float32.
        rank: r.
        scale: s > 0.
        init: "pissa": s·B₀A₀ is the best approximation of W of rank r; "olora": B₀A₀ is the first r columns of Q and
            rows of R in W = QR.
    """
    if scale <= 0:
        raise UnsupportedError(f"an adapter with init_lora_weights {init} and a scale of {scale:g}", UNSUPPORTED_HINT)
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    root = (sigma[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _twice_the_rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same scales at twice the rank: alpha grows by 2, with rsLoRA by √2."""
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        **config,
        "r": 2 * config.get("r", 8),
        "lora_alpha": growth * config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: growth * value for key, value in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }


def with_canonical_keys(content: Content) -> Content:
    """The same content under the names that PEFT writes, as far as names alone tell."""
    tensors, rules = canonical_keys(content.tensors)
    return Content(content.config, tensors, (*content.conversions, *rules))


def respelled(content: Content, structure: Structure) -> Content:
    """The same content with the host's names for the modules.

    Raises:
        UnsupportedError: two known spellings fit the host.
        HostError: none does (from `find_targets`, which names samples of both sides).
    """
    modules = sorted({name.module for key in content.tensors if (name := parse_name(key)) is not None})
    fitting = [
        candidate
        for rule, names in respellings(modules, structure.modules)
        if _fits(candidate := _renamed(content, names, rule), structure)
    ]
    if len(fitting) > 1:
        raise UnsupportedError(
            f"the adapter's modules can be {len(fitting)} sets of modules of the host: {some(modules, 2)}",
            "Rename the tensors to the names that PEFT writes for this host.",
        )
    return fitting[0] if fitting else content


def _renamed(content: Content, names: Mapping[str, str], rule: str) -> Content:
    adapted = {target.module: names[target.module] for target in find_targets(content.config, content.tensors)}
    return Content(
        renamed_config(content.config, adapted),
        renamed_tensors(content.tensors, names),
        (*content.conversions, rule),
    )


def _fits(content: Content, structure: Structure) -> bool:
    try:
        find_targets(content.config, content.tensors, structure)
    except InputError:
        return False
    return True
