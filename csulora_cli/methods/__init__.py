"""Every repair that `csulora compare` knows: csulora's own, its peers, and controls. One small file each.

To add one: a file with a pure function and `METHODS`, and its name in the list below.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from csulora_cli.errors import UsageError
from csulora_cli.methods import (
    csulora_keep_in,
    csulora_keep_out,
    csulora_prompts,
    lssf,
    other_prompts,
    random_subspace,
    resta,
    rotated,
    s3lora,
    safelora,
    safelora_projector,
    shrink,
)
from csulora_cli.methods.method import ConfinedMethod, DirectionsMethod, DisplacementMethod, Method, MomentsMethod
from csulora_cli.promptset import Prompts
from csulora_cli.text import printable

_FILES = (
    csulora_prompts, csulora_keep_out, csulora_keep_in,
    safelora, safelora_projector, lssf, resta, s3lora,
    shrink, random_subspace, rotated, other_prompts,
)  # fmt: skip
REGISTRY: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}


def needs_displacement(method: Method) -> bool:
    """Whether a method can only run with the unaligned checkpoint."""
    return isinstance(method, (DirectionsMethod, DisplacementMethod, ConfinedMethod))


def needs_moments(method: Method) -> bool:
    """Whether a method can only run where prompts show what the modules read."""
    return isinstance(method, (MomentsMethod, ConfinedMethod))


@dataclass(frozen=True)
class Choice:
    """What is run, and what is not.

    Attributes:
        methods: in the registry's order.
        left_out: what each of the others does that the inputs do not allow, as a predicate, by name; empty where
            methods were named.
    """

    methods: tuple[Method, ...]
    left_out: Mapping[str, str]


def choose(
    names: tuple[str, ...] | None,
    has_unaligned: bool,
    has_groups: bool = False,
    to_prompts: str | None = None,
    directions: Prompts | None = None,
) -> Choice:
    """Methods by name; None takes all that the inputs allow.

    Args:
        names: of methods.
        has_unaligned: whether the unaligned checkpoint is given.
        has_groups: whether the adapter has an update of a convolution with groups.
        to_prompts: why the adapter cannot be repaired by what its modules read on prompts, as a predicate.
        directions: the direction prompts, once they are read; a control that fades on the same ones as csulora is none.

    Raises:
        UsageError: no name, an unknown one, or one that the inputs do not allow.
    """
    obstacles = {
        method.name: _obstacle(method, has_unaligned, has_groups, to_prompts, directions)
        for method in REGISTRY.values()
    }
    if names is None:
        left_out = {name: obstacle[0] for name, obstacle in obstacles.items() if obstacle is not None}
        return Choice(tuple(method for name, method in REGISTRY.items() if name not in left_out), left_out)
    if not names:
        raise UsageError("--methods names no method", f"Known: {', '.join(REGISTRY)}.")
    for name in names:
        if name not in REGISTRY:
            raise UsageError(f"--methods names {printable(name, 40)}", f"Known: {', '.join(REGISTRY)}.")
        if (obstacle := obstacles[name]) is not None:
            reason, hint = obstacle
            raise UsageError(f"the method {name} {reason}", hint)
    return Choice(tuple(method for name, method in REGISTRY.items() if name in names), {})


def _obstacle(
    method: Method, has_unaligned: bool, has_groups: bool, to_prompts: str | None, directions: Prompts | None
) -> tuple[str, str] | None:
    """What a method does that the inputs do not allow, as a predicate, and what to do about it."""
    if needs_displacement(method) and not has_unaligned:
        return "needs the unaligned checkpoint", "Add --unaligned MODEL."
    if has_groups and not method.keeps_blocks:
        reason = "makes a lora_B for which the adapter's convolutions with groups have no place"
        return reason, "Leave it out of --methods."
    if to_prompts is not None and needs_moments(method):
        return to_prompts, "Leave it out of --methods."
    if directions is not None and method in other_prompts.METHODS and method.fades_on(directions) == directions.faded:
        return "fades on the same prompts as prompts does", "Leave it out of --methods."
    return None
