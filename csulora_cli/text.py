"""Strings from files, the Hub and exceptions are hostile: this makes them fit to print."""

import unicodedata

# Cc control, Cf format (bidi marks, zero width), Cs surrogates, Co private, Zl and Zp line and paragraph separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(value: object, limit: int = 200) -> str:
    """`str(value)` on one line with every control, bidi and unassigned character written as an escape.

    Args:
        value: anything; its `str` is used.
        limit: the longest result, in characters; the middle of a longer one is replaced by an ellipsis.
    """
    text = str(value)
    if len(text) > 4 * limit:
        text = text[: 2 * limit] + text[-2 * limit :]
    out = "".join(_escaped(char) if unicodedata.category(char) in _UNPRINTABLE else char for char in text)
    if len(out) > limit:
        half = (limit - 1) // 2
        out = f"{out[:half]}…{out[-half:]}"
    return out


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if ord(char) > 0x7E or ord(char) < 0x20 else "\\x7f"


def words_of(text: str) -> str:
    """A text's words, numbers and symbols in lower case: the same however it is set and punctuated.

    A text that has none is itself.
    """
    kept = (char if unicodedata.category(char)[0] in "LMNS" else " " for char in text.casefold())
    return " ".join("".join(kept).split()) or text


def some(names: list[str], count: int = 3) -> str:
    """The first few names, printable, and how many more there are: `a, b, c and 12 more`."""
    shown = ", ".join(printable(name, 90) for name in names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def number(value: float) -> str:
    """A number as people write it: three significant digits, no trailing zeros, no exponent for everyday sizes."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return f"{value:.1e}"
