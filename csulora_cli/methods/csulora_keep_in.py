"""csulora, source weights, keep-in: what lies outside the displacement's singular directions fades.

    X = F + R/(1 + λρ_R) + O/(1 + λρ_O)

The three-way split and the attenuation by relative energy are CSULoRA's (arXiv 2605.30640, abstract); two-sided
projectors, the choice of k and the penalty are our reading of it. Truncated to the adapter's rank.
"""

from collections.abc import Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.weights_source import keep_in
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DirectionsMethod, Family, logarithmic
from csulora_cli.settings import DEFAULT_WEIGHTS_STRENGTH, RankMode
from csulora_cli.solver.displacement import Directions


def repair(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """The closest updates at λ."""
    return {module.name: keep_in(module, directions[module.name], strength, RankMode.KEEP)[0] for module in modules}


METHODS = (
    DirectionsMethod(
        name="keep-in",
        family=Family.CSULORA,
        summary="fades outside the displacement's directions",
        symbol="λ",
        grid=logarithmic(1, 10_000),
        default=DEFAULT_WEIGHTS_STRENGTH,
        has_auto=True,
        keeps_blocks=False,
        repair=repair,
    ),
)
