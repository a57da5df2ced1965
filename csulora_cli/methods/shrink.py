"""Control: a uniform shrink, which looks at nothing.

X = c·Δ,   c = 1/(1 + λ):   the closest update to Δ if every direction costs the same, min ‖X − Δ‖² + λ‖X‖²

It is also run at the norm of what csulora leaves: a repair that does no better than that only made the update smaller.
"""

from collections.abc import Sequence
from dataclasses import replace

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import FactorsMethod, Family, logarithmic


def repair(modules: Sequence[Site], strength: float) -> dict[str, Factors]:
    """Divide every update by 1 + λ, λ = `strength`."""
    return {
        module.name: replace(Factors.of(module), lora_a=(module.lora_a.double() / (1 + strength)).float())
        for module in modules
    }


def strength_at(ratio: float) -> float:
    """λ with ‖X‖/‖Δ‖ = 1/(1 + λ) = `ratio`; below 0 for a ratio above 1, which a repair can have."""
    return 1 / ratio - 1


METHODS = (
    FactorsMethod(
        name="shrink",
        family=Family.CONTROL,
        summary="the whole update divided by 1+λ",
        symbol="λ",
        grid=logarithmic(0.1, 10),
        has_auto=True,
        at_norm=strength_at,
        repair=repair,
    ),
)
