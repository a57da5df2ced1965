"""Requests that say nearly the same, by their words."""

import re
from collections.abc import Sequence

NEAR = 0.6
# Words that frame a request and do not say what it is about.
FRAME = frozenset(
    """a an the i me my mine you your he him his she her it its we us our they them their to of in on at for from by
    with without into out off up over under and or but so that which who whom whose what how why when where if is are
    was were be been do does did can could should would will may must have has had not no any some all one each as than
    about this these those there explain tell give write help best way ways make get want need suggest someone somebody
    people person i'm i'd can't isn't""".split()
)


def content_words(prompt: str) -> frozenset[str]:
    """The words that say what a request is about, plural or not."""
    words = {word.removesuffix("'s") for word in re.findall(r"[a-z0-9']+", prompt.casefold())}
    return frozenset(word.removesuffix("s") if len(word) > 3 else word for word in words - FRAME)


def near_duplicates(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (one of left, one of right) whose content words a, b overlap: |a ∩ b| ≥ 0.6 · |a ∪ b|."""
    here = [(prompt, content_words(prompt)) for prompt in left]
    there = [(prompt, content_words(prompt)) for prompt in right]
    return [(one, other) for one, a in here for other, b in there if a & b and len(a & b) >= NEAR * len(a | b)]
