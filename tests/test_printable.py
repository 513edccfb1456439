"""Text from outside cannot steer a terminal or break a line."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.printable import as_typed, printable, quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("kitchen Pi № 4 – Küche 厨房 🙂", "kitchen Pi № 4 – Küche 厨房 🙂", id="letters of the world"),
        pytest.param("👩\u200d💻 می\u200cخواهم", "👩\u200d💻 می\u200cخواهم", id="joined emoji and letters"),
        pytest.param("\x1b[2Jgone", r"\x1b[2Jgone", id="clears the screen"),
        pytest.param("a\x9b31mb", r"a\x9b31mb", id="the same in one C1 code"),
        pytest.param("one\ntwo\r\tthree\x00", r"one\ntwo\r\tthree\x00", id="lines"),
        pytest.param("one\u2028two\u2029three\x85", r"one\u2028two\u2029three\x85", id="lines of Unicode"),
        pytest.param("gpj.\u202eexe", r"gpj.\u202eexe", id="right to left"),
        pytest.param("a\u2066b\u2069", r"a\u2066b\u2069", id="isolated"),
        pytest.param("\ud800", r"\ud800", id="half a character"),
        pytest.param("[red]", "[red]", id="markup is the table's affair"),
    ],
)
def test_what_a_terminal_acts_on_is_written_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@settings(derandomize=True, deadline=None, max_examples=200)
@given(text=st.text(st.characters(), max_size=40))
def test_what_is_printable_stays_and_nothing_else_is_left(text: str) -> None:
    shown = printable(text)
    assert shown.replace("\u200c", "").replace("\u200d", "").isprintable()
    assert printable(shown) == shown
    assert len(shown.splitlines()) <= 1
    shown.encode()


def test_a_quotation_is_short_whatever_it_quotes() -> None:
    assert quoted("a\nb") == r"'a\nb'"
    assert quoted("x" * 200) == f"'{'x' * 200}'"
    assert quoted("x" * (1 << 20)) == f"'{'x' * 200}…'"
    assert quoted("abcdef", 3) == "'abc…'"


@pytest.mark.parametrize("name", ["a", "a b", "it's", "q\"'\\ $x`y`", "new\nline\x1b[2J", "tab\t'\\n"])
def test_what_is_to_be_typed_means_what_it_should(name: str) -> None:
    typed = as_typed(name)
    assert typed.isprintable()
    told = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, text=True, check=True)
    assert told.stdout == name
