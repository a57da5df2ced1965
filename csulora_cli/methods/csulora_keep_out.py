"""csulora, source weights, keep-out: the update fades where the displacement reads its input.

    A' = A − A V diag(λκ/(1 + λκ)) Vᵀ,   κ = in·σ²/‖D‖²,   B' = B

Our own formulation (`solver.attenuate`).
"""

from collections.abc import Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.weights_source import keep_out
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DirectionsMethod, Family, logarithmic
from csulora_cli.settings import DEFAULT_WEIGHTS_STRENGTH
from csulora_cli.solver.displacement import Directions


def repair(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """The closest updates at λ."""
    return {module.name: keep_out(module, directions[module.name], strength) for module in modules}


METHODS = (
    DirectionsMethod(
        name="keep-out",
        family=Family.CSULORA,
        summary="fades on the displacement's directions",
        symbol="λ",
        grid=logarithmic(0.1, 1000),
        default=DEFAULT_WEIGHTS_STRENGTH,
        has_auto=True,
        repair=repair,
    ),
)
