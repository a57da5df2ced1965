"""Hostile strings become printable; numbers read as people write them."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from csulora_cli.text import number, printable, some, words_of

QUICK = settings(max_examples=50, deadline=None)

ANYTHING = st.text(st.characters(exclude_categories=()))


@QUICK
@given(ANYTHING, st.integers(3, 300))
def test_printable_is_one_short_line_without_controls(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")  # lone surrogates would raise


@QUICK
@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=200))
def test_printable_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x00\x07\x7f\x85\x9b", "\\x00\\x07\\x7f\\x85\\x9b"),
        ("\u202egpj.exe\u2066", "\\u202egpj.exe\\u2066"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028and\u2029paragraph", "line\\u2028and\\u2029paragraph"),
        ("\ud800", "\\ud800"),
        ("\ue000\U000e0041", "\\ue000\\U000e0041"),
        ("Größe λ 漢字 🙂", "Größe λ 漢字 🙂"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_keeps_its_ends() -> None:
    shown = printable("start" + "x" * 10**6 + "end", 21)
    assert shown == "startxxxxx…xxxxxxxend"


def test_printable_takes_anything_that_has_a_str() -> None:
    assert printable(None) == "None"
    assert printable(ValueError("two\nlines")) == "two\\nlines"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        (["a\n"] * 12, "a\\n, a\\n, a\\n and 9 more"),
    ],
)
def test_some_names(names: list[str], shown: str) -> None:
    assert some(names) == shown


def test_some_with_another_count() -> None:
    assert some(["a", "b", "c"], 1) == "a and 2 more"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.0, "0"), (1, "1"), (2.0, "2"), (0.5, "0.5"), (1 / 3, "0.333"), (-1.25, "-1.25"),
        (12.345, "12.3"), (123.45, "123"), (999, "999"), (999.4, "999"), (1234.5, "1234"), (54321, "54321"),
        (0.001, "0.001"), (0.00123, "0.00123"), (0.000999, "1.0e-03"), (1e5, "1.0e+05"), (-2.5e-7, "-2.5e-07"),
        (1e-300, "1.0e-300"), (float("inf"), "inf"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


@QUICK
@given(st.floats(1e-3, 99999))
@example(999.7)
@example(99999.0)
def test_everyday_sizes_have_no_exponent(value: float) -> None:
    shown = number(value)
    assert "e" not in shown
    assert float(shown) == pytest.approx(value, rel=0.006)


def test_words_are_the_same_however_they_are_set() -> None:
    assert words_of("How do I\u00a0open it?") == words_of("  HOW do i open it ") == "how do i open it"
    assert words_of("How do I open it?") != words_of("How do I open them?")
    assert words_of("What is 12 + 7?") != words_of("What is 12 / 7?")
    assert words_of("C++ code") != words_of("C# code")
    assert words_of("\u0915\u093f\u0924\u093e\u092c") != words_of("\u0915\u0940\u0924\u093e\u092c")
    assert words_of("STRASSE") == words_of("straße")
    assert (words_of("???"), words_of("!")) == ("???", "!")
