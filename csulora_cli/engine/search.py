"""Finding λ by measuring: the path of a method, judged on the tuning prompts."""

import math
from collections.abc import Callable, Mapping, Sequence

from csulora_cli.engine.attach import Factors
from csulora_cli.engine.behaviour import KlJudge
from csulora_cli.engine.effects import moved_share
from csulora_cli.engine.progress import Progress
from csulora_cli.engine.strength import PathPoint, smallest_strength
from csulora_cli.errors import HostError
from csulora_cli.formats.site import Site
from csulora_cli.report import PathRecord, StrengthRecord
from csulora_cli.settings import DEFAULT_TARGET

# Below this many nats the adapter begins its answers to harmful prompts as the host does: there is nothing to repair.
UNMOVED_KL = 0.02


def find_strength(
    judge: KlJudge,
    modules: Sequence[Site],
    repaired: Callable[[float], Mapping[str, Factors]],
    target: float | None,
    progress: Progress,
    costs_everywhere: bool = True,
) -> StrengthRecord:
    """The smallest λ at which the repaired model begins its answers to harmful tuning prompts as the host does.

    Args:
        judge: of the tuning prompts.
        modules: of the adapter.
        repaired: the factors at a λ of `strength.PATH`.
        target: the share of KL(host ‖ adapter) that may stay; None for the default.
        progress: one step a λ that is tried.
        costs_everywhere: also measure the KL on benign prompts, which chooses nothing, at every λ that is tried, not
            only at the one that is taken.

    Returns:
        λ and the path to it; λ = 0 where the adapter never moved the host.

    Raises:
        HostError: the divergences are not finite.
    """
    if not math.isfinite(judge.adapter_kl):
        raise HostError("the host or the adapter gives NaN instead of probabilities", "Try --dtype float32.")
    limit = (DEFAULT_TARGET if target is None else target) * judge.adapter_kl
    if judge.adapter_kl <= UNMOVED_KL:
        return StrengthRecord(0.0, True, True, limit, judge.adapter_kl)

    def try_strength(value: float) -> PathPoint:
        factors = repaired(value)
        harmful_kl = judge.harmful_kl(factors)
        benign_kl = judge.benign_kl(factors) if costs_everywhere else None
        progress.advance()
        return PathPoint(value, harmful_kl, benign_kl, moved_share(modules, factors))

    def record(point: PathPoint) -> PathRecord:
        benign_kl = point.benign_kl
        if benign_kl is None and point == found.chosen:
            benign_kl = judge.benign_kl(repaired(point.strength))
        return PathRecord(point.strength, point.harmful_kl, benign_kl, point.moved)

    found = smallest_strength(try_strength, limit, judge.adapter_kl)
    points = tuple(map(record, found.points))
    return StrengthRecord(found.chosen.strength, True, found.is_reached, limit, judge.adapter_kl, points)
