"""SafeLoRA (arXiv 2405.16833) with what its text speaks of: an orthogonal projector.

    P = U Uᵀ,      B ← P B   where cos(PBA, BA) <= τ,      else B as it is

U are the leading left singular directions of D. The published Ĉ = DDᵀ/‖D‖_F has the same range and other eigenvalues.
"""

from collections.abc import Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods.method import DirectionsMethod, Family, linear
from csulora_cli.methods.safelora import Projection, by_threshold, cosine
from csulora_cli.solver.displacement import Directions


def project(module: Site, directions: Directions) -> Projection:
    """PB and the cosine. Cost O(out·k·r)."""
    left = directions.left.double()
    mapped = left @ (left.mT @ module.lora_b.double())  # (out, r)
    return Projection(mapped.float(), cosine(mapped, module))


def repair(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """Replace B where the cosine is at most τ = `strength`."""
    projections = {module.name: project(module, directions[module.name]) for module in modules}
    return by_threshold(modules, projections, strength)


METHODS = (
    DirectionsMethod(
        name="safelora-projector",
        family=Family.PEER,
        summary="SafeLoRA with an orthogonal projector",
        symbol="τ",
        grid=linear(0.2, 1),
        default=0.5,
        keeps_blocks=False,
        repair=repair,
    ),
)
