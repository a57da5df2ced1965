"""`--strength auto`: the smallest λ on a path at which the repaired model answers harmful prompts as the host does."""

from collections.abc import Callable
from dataclasses import dataclass

# Half-octave steps: fine enough for "the smallest", and the same on every machine, which bisecting floats is not.
PATH = tuple(float(f"{2 ** (step / 2):.3g}") for step in range(-8, 29))

# Adapters that undo a host's refusals can be more than ten nats from it; a share of that alone would still allow every
# other answer to begin otherwise. At 0.07 nats the host's own first tokens keep 93 % of their probability.
LARGEST_LIMIT = 0.07


@dataclass(frozen=True)
class PathPoint:
    """One λ that was tried.

    Attributes:
        strength: λ.
        harmful_kl: mean KL(host ‖ repaired) of the first answer token on harmful tuning prompts, nats.
        benign_kl: mean KL(adapter ‖ repaired) on benign tuning prompts, nats: what the repair costs.
        moved: ‖X − Δ‖² / ‖Δ‖².
    """

    strength: float
    harmful_kl: float
    benign_kl: float
    moved: float


@dataclass(frozen=True)
class Search:
    """How λ was found.

    Attributes:
        chosen: the point that was taken.
        is_reached: whether it meets the limit; if not, it is the strongest λ of the path.
        limit: the KL that had to be met, nats.
        points: every λ that was tried, ascending.
    """

    chosen: PathPoint
    is_reached: bool
    limit: float
    points: tuple[PathPoint, ...]


def smallest_strength(try_strength: Callable[[float], PathPoint], limit: float) -> Search:
    """Bisect `PATH` for the smallest λ whose harmful KL is at most `limit`.

    KL falls along the path up to noise, so this takes log₂ of the path's length tries.
    """
    tried: dict[int, PathPoint] = {}

    def point(index: int) -> PathPoint:
        if index not in tried:
            tried[index] = try_strength(PATH[index])
        return tried[index]

    low, high = 0, len(PATH)  # the answer is in [low, high]; len(PATH) stands for "none"
    while low < high:
        middle = (low + high) // 2
        if point(middle).harmful_kl <= limit:
            high = middle
        else:
            low = middle + 1
    is_reached = low < len(PATH)
    chosen = point(min(low, len(PATH) - 1))
    return Search(chosen, is_reached, limit, tuple(tried[index] for index in sorted(tried)))
