"""`rank_pattern` and `alpha_pattern` as PEFT reads them, with a time limit.

PEFT (0.15 and later) takes the first key, in file order, for which `re.match(rf"(.*\\.)?({key})$", name)` holds; both
dicts are searched independently. The keys of a downloaded adapter are untrusted regular expressions, so each search
may take `MATCH_SECONDS` at the most.
"""

from collections.abc import Mapping

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
        if len(key) > MAX_KEY:
            raise AdapterError(
                f"{field} key '{printable(key, 80)}' has {len(key)} characters", f"At most {MAX_KEY} are read."
            )
        try:
            if regex.match(rf"(.*\.)?({key})$", name, timeout=MATCH_SECONDS):
                return value
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise AdapterError(
                f"{field} key '{printable(key)}' is no regular expression: {printable(error)}",
                "Fix the key in adapter_config.json.",
            ) from None
        except TimeoutError:
            raise AdapterError(
                f"{field} key '{printable(key)}' takes more than {MATCH_SECONDS:g} s to match",
                "Write the module's plain name as the key in adapter_config.json.",
            ) from None
    return default
