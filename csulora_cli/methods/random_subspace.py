"""Controls: keep-in and keep-out on random directions, as many as the displacement's and with its singular values.

If the displacement's directions mattered only by their number, these would do as well ("Safety Subspaces are Not
Linearly Distinct", arXiv 2505.14185, reports just that of other repairs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from csulora_cli.engine.attach import Factors
from csulora_cli.formats.site import Site
from csulora_cli.methods import csulora_keep_in, csulora_keep_out
from csulora_cli.methods.method import DirectionsMethod, Family, random_basis, seeded
from csulora_cli.solver.displacement import Directions


def randomised(name: str, directions: Directions) -> Directions:
    """Random orthonormal U (out, k) and V (in, k) in the place of a module's own; k, Σ and ‖D‖ stay."""
    generator = seeded(name)
    left = random_basis(directions.left.shape[0], directions.rank, generator)
    right = random_basis(directions.right.shape[0], directions.rank, generator)
    return replace(directions, left=left, right=right).compact()


def keep_in(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """keep-in, randomised."""
    return csulora_keep_in.repair(modules, _all_randomised(directions), strength)


def keep_out(modules: Sequence[Site], directions: Mapping[str, Directions], strength: float) -> dict[str, Factors]:
    """keep-out, randomised."""
    return csulora_keep_out.repair(modules, _all_randomised(directions), strength)


def _all_randomised(directions: Mapping[str, Directions]) -> dict[str, Directions]:
    return {name: randomised(name, entry) for name, entry in directions.items()}


METHODS = tuple(
    DirectionsMethod(
        name=f"random-{own.name}",
        family=Family.CONTROL,
        summary=f"{own.name} on random directions",
        symbol=own.symbol,
        grid=own.grid,
        default=own.default,
        has_auto=own.has_auto,
        keeps_blocks=own.keeps_blocks,
        repair=repair,
    )
    for own, repair in ((csulora_keep_in.METHODS[0], keep_in), (csulora_keep_out.METHODS[0], keep_out))
)
