"""csulora, source weights, keep-out: the update fades where the displacement reads its input.

    A' = A − A V diag(λκ/(1 + λκ)) Vᵀ,   κ = in·σ²/‖D‖²,   B' = B

Our own formulation (`solver.attenuate`). With β, prompts tell what of these directions fades: what A reads along V goes
through the filter of the prompts source, and the rest stays (`engine.prompts_source.Confined`).
"""

from collections.abc import Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.prompts_source import Confined
from csulora_cli.engine.weights_source import keep_out
from csulora_cli.formats.site import Site
from csulora_cli.methods.csulora_prompts import METHODS as _PROMPTS
from csulora_cli.methods.method import ConfinedMethod, DirectionsMethod, Family, logarithmic
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
    ConfinedMethod(
        name="keep-out-protect",
        family=Family.CSULORA,
        summary="keep-out where what looks harmful outweighs the rest",
        symbol=_PROMPTS[0].symbol,
        grid=_PROMPTS[0].grid,
        has_auto=True,
        solver=Confined,
    ),
)
