"""Text from outside, made fit to be shown: nothing in it moves a cursor, starts a line or turns a word around.

Names, messages and paths come from other machines. A terminal obeys what stands in them, and a log line that one of
them breaks in two is two log lines.
"""

from __future__ import annotations

import codecs
import shlex

MOST_QUOTED = 200
PLAIN = "fedepth.plain"  # an error handler for encodings: what a terminal cannot show, in characters that it can

_SUBSTITUTES = {
    "…": "...",
    "→": "->",
    "←": "<-",
    "×": "x",
    "–": "-",
    "—": "-",
    "−": "-",
    "•": "*",
    "·": "*",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "━": "-",
    "─": "-",
    "│": "|",
}

# Format characters that emoji and several scripts are written with, and that no terminal acts on.
_JOINERS = frozenset("\u200c\u200d")

# Printable by the rules of Unicode, but nothing to see (Default_Ignorable_Code_Point, and a blank that is a symbol).
_UNSEEN = (
    ("\u034f", "\u034f"),
    ("\u115f", "\u1160"),
    ("\u17b4", "\u17b5"),
    ("\u180b", "\u180f"),
    ("\u2800", "\u2800"),
    ("\u3164", "\u3164"),
    ("\ufe00", "\ufe0f"),
    ("\uffa0", "\uffa0"),
    ("\U000e0100", "\U000e01ef"),
)


def printable(text: str) -> str:
    """`text` with escapes (`\\n`, `\\x1b`, `\\u202e`) for whatever is not printable.

    That is what `str.isprintable` says: control codes, bidi controls and other format characters, line separators,
    surrogates, code points that mean nothing, and all blanks but the space. Letters, signs and emoji stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _JOINERS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def visible(text: str, most: int = MOST_QUOTED) -> str:
    """In quotes, with escapes also for what is printable and yet cannot be seen: joiners, variation selectors, fillers.

    For names that are compared: two that look alike must not read alike.
    """
    shown = "".join(
        character.encode("unicode_escape").decode("ascii")
        if character in _JOINERS or any(first <= character <= last for first, last in _UNSEEN)
        else printable(character)
        for character in text[:most]
    )
    return f"'{shown}{'…' if len(text) > most else ''}'"


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """The first `most` characters of `text`, printable, for a message that says what is wrong with it."""
    return printable(text[:most]) + ("…" if len(text) > most else "")


def quoted(text: str, most: int = MOST_QUOTED) -> str:
    """The same in quotes."""
    return f"'{shortened(text, most)}'"


def as_typed(text: str) -> str:
    """`text` as one word of a command line that a message advises."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = printable(text.replace("\\", "\\\\").replace("'", "\\'"))
    return f"$'{escaped}'"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_SUBSTITUTES.get(each) or each.encode("unicode_escape").decode("ascii") for each in wrong), error.end


codecs.register_error(PLAIN, _plain)
