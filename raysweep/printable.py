"""Texts of others on a terminal or a page: what would steer it, or hide what is there, is shown as its code."""

from __future__ import annotations

import unicodedata

# Joiners that belong to words of Persian and Indic scripts, and to emoji.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    r"""A text without what a terminal obeys (ESC, OSC) and what turns or hides its neighbours (bidi, zero width).

    Line breaks and tabs stay; so do letters of every script.

    >>> printable("lr \x1b[2J 0.1 \u202e")
    'lr \\x1b[2J 0.1 \\u202e'
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter in "\n\t" or letter in _JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return letter
    return letter.encode("unicode_escape", "backslashreplace").decode()


def duration(seconds: float) -> str:
    """Minutes and seconds, after hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
