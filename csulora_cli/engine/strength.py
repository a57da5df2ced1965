"""`--strength auto`: the smallest λ on a path at which the repaired model answers harmful prompts as the host does."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# Half-octave steps: fine enough for "the smallest", and the same on every machine, which bisecting floats is not.
PLACES_PER_OCTAVE = 2
PATH = tuple(float(f"{2 ** (step / PLACES_PER_OCTAVE):.3g}") for step in range(-8, 29))

# Where the limit is out of reach, the smallest λ is taken that lowers KL by this share of what the strongest one does:
# beyond the point at which KL levels off λ costs more than it gains.
LEVELLED_OFF = 0.98
# Differences below this share of the adapter's KL are no gain.
LEAST_GAIN = 0.001


@dataclass(frozen=True)
class PathPoint:
    """One λ that was tried.

    Attributes:
        strength: λ.
        harmful_kl: mean KL(host ‖ repaired) of the first answer token on harmful tuning prompts, nats.
        benign_kl: mean KL(adapter ‖ repaired) on benign tuning prompts, nats: what the repair costs; None where that
            was not measured.
        moved: ‖X − Δ‖² / ‖Δ‖².
    """

    strength: float
    harmful_kl: float
    benign_kl: float | None
    moved: float


@dataclass(frozen=True)
class Search:
    """How λ was found.

    Attributes:
        chosen: the point that was taken.
        is_reached: whether it meets the limit; if not, it is the smallest λ that lowers KL by `LEVELLED_OFF` of what
            the strongest one does.
        limit: the KL that had to be met, nats.
        points: every λ that was tried, ascending.
    """

    chosen: PathPoint
    is_reached: bool
    limit: float
    points: tuple[PathPoint, ...]


def smallest_strength(try_strength: Callable[[float], PathPoint], limit: float, adapter_kl: float) -> Search:
    """Search `PATH` for the smallest λ whose harmful KL is at most `limit`; `adapter_kl` is that of λ = 0.

    KL falls along the path up to noise, so a point that meets the limit bounds the answer from above, and one that does
    not bounds it from below: on a falling curve any order of tries finds what a scan of the whole path would. Tries
    follow the interpolated curve and are as many as plain bisection needs, plus one, at worst; as many again to find
    where the curve levels off if it never meets the limit.
    """
    tried: dict[int, PathPoint] = {}

    def point(index: int) -> PathPoint:
        if index not in tried:
            tried[index] = try_strength(PATH[index])
        return tried[index]

    def first_within(bound: float, floor: float) -> int:
        """The place of the smallest λ with a KL of at most `bound`; the path's length stands for "none".

        The curve is taken to fall towards `floor`, which decides how many tries it takes, not what is found.
        """
        high = min((index for index, known in tried.items() if known.harmful_kl <= bound), default=len(PATH))
        low = 1 + max((index for index in tried if index < high), default=-1)
        tries = (high - low).bit_length() + 1  # bisection takes one less
        while low < high:
            tries -= 1
            # Whichever way this try goes, bisection must be able to finish with those that are left.
            first, last = max(low, high - 2**tries), min(high - 1, low + 2**tries - 1)
            crossing = _crossing(tried.get(low - 1), tried.get(high), low, high, (bound, floor))
            index = min(max(math.ceil(crossing), first), last)
            if point(index).harmful_kl <= bound:
                high = index
            else:
                low = index + 1
        return low

    found = first_within(limit, 0.0)
    if found == len(PATH):
        strongest = len(PATH) - 1
        level = point(strongest).harmful_kl
        found = min(first_within(_levelled_off(level, adapter_kl), level), strongest)
    chosen = point(found)
    is_reached = chosen.harmful_kl <= limit  # on a noisy curve the second search can find what the first one missed
    return Search(chosen, is_reached, limit, tuple(tried[index] for index in sorted(tried)))


def _levelled_off(level: float, adapter_kl: float) -> float:
    """The KL below which a larger λ gains little, from the KL of the strongest λ and of λ = 0."""
    return level + max((1 - LEVELLED_OFF) * (adapter_kl - level), LEAST_GAIN * adapter_kl)


def _crossing(
    below: PathPoint | None, above: PathPoint | None, low: int, high: int, target: tuple[float, float]
) -> float:
    """Where KL should fall to the bound, as a place on the path: log(KL − floor) is taken to be linear in log λ.

    Args:
        below, above: the points at `low` − 1 and at `high`, if they were tried. From one of them alone the curve is
            taken to fall as 1/λ, unless that leads past the middle of what is left: then the far end is tried upwards,
            because it shows whether there is a crossing at all, and the middle downwards.
        low, high: between which places the answer lies.
        target: the KL that is looked for, and what the curve falls to.
    """
    over, under = _excess(below, *target), _excess(above, *target)
    middle = (low + high) // 2
    if over is not None and under is not None and over > under:
        return low - 1 + (high - low + 1) * over / (over - under)
    if over is not None and under is None:
        place = low - 1 + over * PLACES_PER_OCTAVE
        return place if place <= middle else high - 1 if above is None else middle
    if under is not None and below is None:
        return max(high + under * PLACES_PER_OCTAVE, middle)
    return middle


def _excess(point: PathPoint | None, bound: float, floor: float) -> float | None:
    """log₂((KL − floor)/(bound − floor)), or None where there is no such number."""
    if point is None or not floor < point.harmful_kl < math.inf or not floor < bound < math.inf:
        return None
    return math.log2(point.harmful_kl - floor) - math.log2(bound - floor)
