"""RESTA (ACL 2024, arXiv 2402.11746) written as an adapter: the safety vector is added back.

    W + Δ + γ·D

D has full rank, and an adapter has not, so it is cut to its leading singular directions (those that hold
`DEFAULT_SUBSPACE_ENERGY` of ‖D‖², as everywhere in csulora). The result Δ + γ·UΣVᵀ is exact at rank r + k. DARE, which
drops entries of the update before, is not used: RESTA is published with and without it.
"""

from collections.abc import Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DirectionsMethod, Family, logarithmic, with_displacement
from csulora_cli.solver.displacement import Directions


def repair(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """Add γ = `strength` times the displacement."""
    return {module.name: with_displacement(module, directions[module.name], strength) for module in modules}


METHODS = (
    DirectionsMethod(
        name="resta",
        family=Family.PEER,
        summary="adds the displacement back",
        symbol="γ",
        grid=logarithmic(0.25, 4),
        default=1.0,
        keeps_blocks=False,
        repair=repair,
    ),
)
