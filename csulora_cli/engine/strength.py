"""`--strength auto`: the smallest λ on a path at which the repaired model answers harmful prompts as the host does."""

from collections.abc import Callable
from dataclasses import dataclass

# Half-octave steps: fine enough for "the smallest", and the same on every machine, which bisecting floats is not.
PATH = tuple(float(f"{2 ** (step / 2):.3g}") for step in range(-8, 29))

# Adapters that undo a host's refusals can be more than ten nats from it; a share of that alone would still allow every
# other answer to begin otherwise. At 0.06 nats the host's own first tokens keep 94 % of their probability.
LARGEST_LIMIT = 0.06

# Where the limit is out of reach, λ beyond the point at which KL levels off only moves the update further.
PLATEAU = 1.05


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
        is_reached: whether it meets the limit; if not, it is the smallest λ whose KL is at most `PLATEAU` times that of
            the strongest one.
        limit: the KL that had to be met, nats.
        points: every λ that was tried, ascending.
    """

    chosen: PathPoint
    is_reached: bool
    limit: float
    points: tuple[PathPoint, ...]


def smallest_strength(try_strength: Callable[[float], PathPoint], limit: float) -> Search:
    """Bisect `PATH` for the smallest λ whose harmful KL is at most `limit`.

    KL falls along the path up to noise, so this takes log₂ of the path's length tries, and as many again to find where
    it levels off if it never meets the limit.
    """
    tried: dict[int, PathPoint] = {}

    def point(index: int) -> PathPoint:
        if index not in tried:
            tried[index] = try_strength(PATH[index])
        return tried[index]

    def first_within(bound: float) -> int:
        """The place of the smallest λ with a KL of at most `bound`; the path's length stands for "none"."""
        low, high = 0, len(PATH)
        while low < high:
            middle = (low + high) // 2
            if point(middle).harmful_kl <= bound:
                high = middle
            else:
                low = middle + 1
        return low

    found = first_within(limit)
    if found == len(PATH):
        strongest = len(PATH) - 1
        found = min(first_within(PLATEAU * point(strongest).harmful_kl), strongest)
    chosen = point(found)
    is_reached = chosen.harmful_kl <= limit  # on a noisy curve the second search can find what the first one missed
    return Search(chosen, is_reached, limit, tuple(tried[index] for index in sorted(tried)))
