"""Texts as token ids: the hash is part of the format, so its numbers are written down here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.data.text import (
    joined,
    open_tokenizer,
    read_tokenizer,
    tokenizer_digest,
    tokenizer_vocabulary,
    word_id,
    words,
)
from fedepth.errors import ConfigError, DataError
from fedepth.task import TextSpec

HASHED = TextSpec("label", ("text",), 8192)
has_tokenizers = pytest.mark.skipif(
    importlib.util.find_spec("tokenizers") is None, reason="needs the library tokenizers, of fedepth[text]"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat sat.", ["the", "cat", "sat", "."]),
        ("  Tabs\tand\nlines ", ["tabs", "and", "lines"]),
        ("ﬁne ＡＢＣ ²", ["fine", "abc", "2"]),  # NFKC
        ("STRASSE Straße İ", ["strasse", "straße", "i", "\u0307"]),
        ("e\u0301t\u00e9", ["été"]),
        ("snake_case 3.14", ["snake_case", "3", ".", "14"]),
        ("不错 go", ["不", "错", "go"]),
        ("good👍!", ["good", "👍", "!"]),
        ("", []),
        (" \u00a0\u3000", []),
    ],
)
def test_words_are_normalised_lowered_and_split(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("word", "vocabulary", "expected"), [("the", 8192, 3392), ("cat", 8192, 2471), ("été", 8192, 702), ("the", 4, 2)]
)
def test_a_word_has_one_id_for_ever(word: str, vocabulary: int, expected: int) -> None:
    # As `printf the | b2sum -l 64` says it.
    assert word_id(word, vocabulary) == expected


def test_a_text_has_at_most_so_many_ids_and_at_least_one() -> None:
    tokens = open_tokenizer(HASHED, 3)
    the, cat = word_id("the", 8192), word_id("cat", 8192)
    assert tokens("The cat") == [the, cat]
    assert tokens("the cat the cat") == [the, cat, the]
    assert tokens("\u200b") != [] and tokens("   ") == [1]


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(4, 70_000))
def test_any_text_has_ids_within_the_vocabulary(text: str, vocabulary: int) -> None:
    ids = open_tokenizer(TextSpec("l", ("t",), vocabulary), 16)(text)
    assert 1 <= len(ids) <= 16
    assert all(1 <= each < vocabulary for each in ids)


def test_columns_are_joined_by_spaces() -> None:
    assert joined([" a ", "", "b"]) == "a b"
    assert joined(["", " "]) == ""


WORD_LEVEL = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 3, "content": "[CLS]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True},
    ],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "cat": 1, "dog": 2, "[CLS]": 3}, "unk_token": "[UNK]"},
}  # fmt: skip


def padded() -> dict[str, object]:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "cat": 2, "[CLS]": 3}
    return {**WORD_LEVEL, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}}


def test_a_tokenizer_says_how_many_ids_it_needs() -> None:
    assert tokenizer_vocabulary(json.dumps(WORD_LEVEL).encode(), "t.json") == (5, False)
    assert tokenizer_vocabulary(json.dumps(padded()).encode(), "t.json") == (4, True)
    unigram = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["a", -1.0]]}}
    assert tokenizer_vocabulary(json.dumps(unigram).encode(), "t.json") == (2, True)
    explicit = {**WORD_LEVEL, "padding": {"pad_id": 0, "pad_token": "[UNK]"}}
    assert tokenizer_vocabulary(json.dumps(explicit).encode(), "t.json") == (4, True)


@pytest.mark.parametrize(
    "contents", [b"", b"{}", b"[]", b'{"model": 3}', b'{"model": {}}', b'{"model": {"vocab": 3}}', b"\xff", b"[" * 9999]
)
def test_what_is_no_tokenizer_is_refused(contents: bytes) -> None:
    with pytest.raises(ConfigError, match=r"t.json is not a file of the tokenizers library"):
        tokenizer_vocabulary(contents, "t.json")


@has_tokenizers
@pytest.mark.parametrize(("tokenizer", "expected"), [(WORD_LEVEL, [2, 3, 1]), (padded(), [2, 1, 1])])
def test_ids_of_a_tokenizer_leave_0_to_padding(tokenizer: dict[str, object], expected: list[int]) -> None:
    contents = json.dumps(tokenizer)
    vocabulary, _ = tokenizer_vocabulary(contents.encode(), "t.json")
    spec = TextSpec("label", ("text",), vocabulary, tokenizer_digest(contents))
    tokens = open_tokenizer(spec, 3, contents)
    assert list(tokens("Cat dog bird cat")) == expected
    assert list(tokens("")) == [1]


@has_tokenizers
def test_a_tokenizer_that_leaves_no_room_for_a_word_is_refused() -> None:
    """With [CLS] and [SEP] around a text, the library truncates to nothing, and not at all below that."""
    word, text = {"SpecialToken": {"id": "cat", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    around = {
        "type": "TemplateProcessing",
        "single": [word, text, word],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"cat": {"id": "cat", "ids": [1], "tokens": ["cat"]}},
    }
    contents = json.dumps({**WORD_LEVEL, "post_processor": around})
    spec = TextSpec("label", ("text",), 5, tokenizer_digest(contents))
    for length in (1, 2):
        with pytest.raises(DataError, match=f"adds 2 ids of its own to every text, .* left in {length}; raise"):
            open_tokenizer(spec, length, contents)
    assert list(open_tokenizer(spec, 3, contents)("dog bird")) == [2, 3, 2]


@pytest.mark.parametrize("vocabulary", [-1, 0, 2, 3, 1 << 40])
def test_a_vocabulary_that_no_job_has(vocabulary: int) -> None:
    with pytest.raises(DataError, match="allowed are 4 to 1048576"):
        open_tokenizer(TextSpec("label", ("text",), vocabulary), 3)


def test_another_tokenizer_than_the_jobs_is_not_used() -> None:
    spec = TextSpec("label", ("text",), 5, "0" * 64)
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{12}…, the job names 000000000000…"):
        open_tokenizer(spec, 3, json.dumps(WORD_LEVEL))


@has_tokenizers
def test_what_the_library_refuses_is_said() -> None:
    contents = json.dumps({"model": {"type": "None", "vocab": {"a": 0}}})
    with pytest.raises(DataError, match="the job's tokenizer cannot be used by tokenizers here"):
        open_tokenizer(TextSpec("label", ("text",), 2, tokenizer_digest(contents)), 3, contents)


def test_a_tokenizer_file_is_bounded_and_text(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is not text"):
        read_tokenizer(path)
    with open(path, "wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ConfigError, match="cannot be read: has more than 16777216 bytes"):
        read_tokenizer(path)
