"""Every repair that `csulora compare` knows: csulora's own, its peers, and controls. One small file each.

To add one: a file with a pure function and `METHODS`, and its name in the list below.
"""

from csulora_cli.errors import UsageError
from csulora_cli.methods import (
    benign,
    csulora_keep_in,
    csulora_keep_out,
    csulora_prompts,
    lssf,
    random_subspace,
    resta,
    rotated,
    s3lora,
    safelora,
    safelora_projector,
    shrink,
)
from csulora_cli.methods.method import DirectionsMethod, DisplacementMethod, Method
from csulora_cli.text import printable

_FILES = (
    csulora_prompts, csulora_keep_out, csulora_keep_in,
    safelora, safelora_projector, lssf, resta, s3lora,
    shrink, random_subspace, rotated, benign,
)  # fmt: skip
REGISTRY: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}


def needs_displacement(method: Method) -> bool:
    """Whether a method can only run with the unaligned checkpoint."""
    return isinstance(method, (DirectionsMethod, DisplacementMethod))


def choose(names: tuple[str, ...] | None, has_unaligned: bool) -> tuple[Method, ...]:
    """Methods by name, in the registry's order; None takes all that the inputs allow.

    Raises:
        UsageError: no name, an unknown one, or one that needs the unaligned checkpoint where there is none.
    """
    if names is None:
        return tuple(method for method in REGISTRY.values() if has_unaligned or not needs_displacement(method))
    if not names:
        raise UsageError("--methods names no method", f"Known: {', '.join(REGISTRY)}.")
    for name in names:
        if name not in REGISTRY:
            raise UsageError(f"--methods names {printable(name, 40)}", f"Known: {', '.join(REGISTRY)}.")
        if needs_displacement(REGISTRY[name]) and not has_unaligned:
            raise UsageError(f"the method {name} needs the unaligned checkpoint", "Add --unaligned MODEL.")
    return tuple(method for name, method in REGISTRY.items() if name in names)
