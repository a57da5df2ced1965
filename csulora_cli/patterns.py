"""The regular expressions of an adapter's config as PEFT reads them, with a time limit.

PEFT (0.15 and later) takes the first key of `rank_pattern` or `alpha_pattern`, in file order, for which
`re.match(rf"(.*\\.)?({key})$", name)` holds; both dicts are searched independently. The patterns of a downloaded
adapter are untrusted regular expressions, so each search may take `MATCH_SECONDS` at the most, and all searches of one
adapter `TOTAL_SECONDS` (`time_limit`).

`regex` can stop a search, which `re` cannot, but it knows more syntax. What means something else to `re`, which is what
PEFT searches with, is refused.
"""

import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import regex

from csulora_cli.errors import AdapterError
from csulora_cli.text import printable

MATCH_SECONDS = 0.5
TOTAL_SECONDS = 5.0
MAX_KEY = 2000
# `regex` writes out repetitions of a given count when it compiles, nested ones all of them, and takes no time limit.
MAX_REPEATS = 10_000

_COUNT = re.compile(r"\{(\d+)(?:,(\d*))?\}")
# Fuzzy matching and POSIX classes to `regex`, plain characters to `re`.
_ONLY_REGEX = re.compile(r"\{[^}]*[a-zA-Z<>][^}]*\}|\[:\^?\w+:\]")
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def time_limit() -> Iterator[None]:
    """All searches inside together may take `TOTAL_SECONDS`."""
    token = _deadline.set(time.monotonic() + TOTAL_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def value_for(pattern: Mapping[str, float], name: str, default: float, field: str) -> float:
    """The value that a pattern dict gives to one module.

    Args:
        pattern: `rank_pattern` or `alpha_pattern`, in file order.
        name: the module's name in the host, without `base_model.model.`.
        default: what holds when no key matches.
        field: the dict's name, for the error message.

    Raises:
        AdapterError: a key is no regular expression, or matching it takes too long.
    """
    for key, value in pattern.items():
        if _match(key, rf"(.*\.)?({key})$", name, f"{field} key"):
            return value
    return default


def matches_whole(pattern: str, name: str, field: str) -> bool:
    """Whether a pattern matches all of a name.

    Raises:
        AdapterError: as `value_for`.
    """
    return _match(pattern, rf"(?:{pattern})\Z", name, field) is not None


def first_match(patterns: Sequence[str], name: str, group: str, field: str) -> str | None:
    """What a named group holds in the first of some patterns that matches the start of a name.

    Raises:
        AdapterError: as `value_for`.
    """
    for pattern in patterns:
        if (found := _match(pattern, pattern, name, field)) is not None:
            return str(found[group])
    return None


def _match(shown: str, pattern: str, name: str, field: str) -> Any:
    if len(shown) > MAX_KEY:
        raise AdapterError(
            f"adapter_config.json: {field} '{printable(shown, 80)}' has {len(shown)} characters",
            f"At most {MAX_KEY} are read.",
        )
    try:
        _check_syntax(pattern)
        seconds = min(MATCH_SECONDS, _deadline.get() - time.monotonic())
        if seconds <= 0:
            raise TimeoutError
        return regex.match(pattern, name, timeout=seconds)
    except (regex.error, re.error, RecursionError, OverflowError, MemoryError) as error:
        raise AdapterError(
            f"adapter_config.json: {field} '{printable(shown)}' is no regular expression: {printable(error)}",
            "Fix it in adapter_config.json.",
        ) from None
    except TimeoutError:
        raise AdapterError(
            f"adapter_config.json: {field} '{printable(shown)}' takes too long to match",
            "Write the module's plain name in its place in adapter_config.json.",
        ) from None


@lru_cache(maxsize=4096)
def _check_syntax(pattern: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # on syntax that may change its meaning one day
        re.compile(pattern)
    if _ONLY_REGEX.search(pattern):
        raise re.error("braces or classes that PEFT would read as plain characters")
    if math.prod(max(int(count or 1) for count in found) for found in _COUNT.findall(pattern)) > MAX_REPEATS:
        raise re.error(f"it asks for more than {MAX_REPEATS} repetitions")
