"""The regular expressions of an adapter's config as PEFT reads them, with a time limit.

PEFT (0.15 and later) takes the first key of `rank_pattern` or `alpha_pattern`, in file order, for which
`re.match(rf"(.*\\.)?({key})$", name)` holds; both dicts are searched independently. All patterns of a downloaded
adapter are untrusted, so each search may take `MATCH_SECONDS` at the most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import regex

from csulora_cli.errors import AdapterError
from csulora_cli.text import printable

MATCH_SECONDS = 1.0
MAX_KEY = 2000


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
            f"{field} '{printable(shown, 80)}' has {len(shown)} characters", f"At most {MAX_KEY} are read."
        )
    try:
        return regex.match(pattern, name, timeout=MATCH_SECONDS)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise AdapterError(
            f"{field} '{printable(shown)}' is no regular expression: {printable(error)}",
            "Fix it in adapter_config.json.",
        ) from None
    except TimeoutError:
        raise AdapterError(
            f"{field} '{printable(shown)}' takes more than {MATCH_SECONDS:g} s to match",
            "Write the module's plain name in its place in adapter_config.json.",
        ) from None
