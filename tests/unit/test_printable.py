"""What may reach a terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysweep.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain lr=0.1 [/] [bold]", "plain lr=0.1 [/] [bold]"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("a\rb\nc\td", "a\\rb\nc\td"),
        ("\ud800", r"\ud800"),
        ("שלום سلام می‌خواهم é 👩‍🔬", "שלום سلام می‌خواهم é 👩‍🔬"),
    ],
)
def test_steering_characters_are_shown_as_codes(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters(codec=None)))
def test_nothing_steers_and_all_can_be_written(text):
    shown = printable(text)
    shown.encode()
    assert not {letter for letter in shown if unicodedata.category(letter) in ("Cc", "Cs")} - {"\n", "\t"}
    assert not set(shown) & set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
