"""Who does best: Pareto domination, and the best of many points at a level of safety. Plain numbers, no torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """One point of one method, reduced to what is compared.

    Attributes:
        method: whose point it is.
        attack_success: share in [0, 1]; less is better.
        retention: of the adapter's task, cut to [0, 1]; more is better. None where it is undefined.
        summary: the summary score, which decides among equals. None where it is undefined.
    """

    method: str
    attack_success: float
    retention: float | None
    summary: float | None


def dominated(points: Sequence[Standing]) -> list[bool]:
    """Which points are dominated: another one is at least as good in both axes and better in one.

    A point without a retention is neither dominated nor dominates.
    """
    return [any(_dominates(other, point) for other in points) for point in points]


def _dominates(first: Standing, second: Standing) -> bool:
    if first.retention is None or second.retention is None:
        return False
    safer, kept = second.attack_success - first.attack_success, first.retention - second.retention
    return safer >= 0 and kept >= 0 and (safer > 0 or kept > 0)


def best(points: Sequence[Standing], limit: float, methods: Collection[str]) -> int | None:
    """The place of the point of these methods that keeps most at ASR <= `limit`; None if there is none.

    Among points that keep the same, the higher summary score, then the smaller ASR, then the earlier one.
    """
    able = [
        index
        for index, point in enumerate(points)
        if point.method in methods and point.attack_success <= limit and point.retention is not None
    ]
    return max(able, key=lambda index: (*_merit(points[index]), -index), default=None)


def winners(points: Sequence[Standing], limit: float) -> tuple[int, ...]:
    """The places of the best point of each method that keeps as much as any at ASR <= `limit`; best first."""
    found = [best(points, limit, {name}) for name in dict.fromkeys(point.method for point in points)]
    places = [index for index in found if index is not None]
    most = max((points[index].retention or 0.0 for index in places), default=0.0)
    tied = [index for index in places if points[index].retention == most]
    return tuple(sorted(tied, key=lambda index: (*(-merit for merit in _merit(points[index])), index)))


def _merit(point: Standing) -> tuple[float, float, float]:
    return point.retention or 0.0, point.summary or 0.0, -point.attack_success
