"""Texts as token ids: words hashed into a fixed number of ids, or the tokenizer of the job's file.

Hashed, an id is 2 + (BLAKE2b of 8 bytes, read little-endian, of the word's UTF-8) mod (vocabulary − 2). A word is what
is left of the text after Unicode normalisation (NFKC) and lower-casing, in the sense of Python's `str.lower`: a run of
letters, digits and underscores; a sign that is neither those nor white space; in scripts without spaces (Chinese,
Japanese) every character. Id 0 is padding, 1 stands for a text without any word.

With a tokenizer ids are its own if its id 0 is padding, else its own plus 1, so that 0 is padding in any case.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from fedepth.errors import ConfigError, DataError
from fedepth.files import NOT_JSON, read_regular
from fedepth.printable import printable
from fedepth.task import MOST_VOCABULARY, SMALLEST_VOCABULARY, TextSpec

PADDING = 0
NO_WORD = 1
MOST_TOKENIZER_BYTES = 16 << 20
_DIGEST_BYTES = 8
_CACHED_WORDS = 1 << 14
_LONGEST_CACHED = 40  # characters
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
_PADDING_NAMES = frozenset({"[pad]", "<pad>", "<|pad|>", "pad", "<blank>"})

Tokenize = Callable[[str], Sequence[int]]


def words(text: str) -> list[str]:
    """The words of a text, as they are hashed."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_id(word: str, vocabulary: int) -> int:
    """The id of a word, 2 to vocabulary − 1; see the module."""
    return _cached_id(word, vocabulary) if len(word) <= _LONGEST_CACHED else _word_id(word, vocabulary)


def _word_id(word: str, vocabulary: int) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
    return 2 + int.from_bytes(digest, "little") % (vocabulary - 2)


_cached_id = lru_cache(_CACHED_WORDS)(_word_id)


def joined(values: Sequence[str]) -> str:
    """The text of several columns: those that hold any, joined by spaces."""
    return " ".join(filter(None, map(str.strip, values)))


class _JsonTokenizer(msgspec.Struct):
    """What is looked at of a tokenizer file."""

    model: dict[str, Any]
    added_tokens: list[dict[str, Any]] = []
    padding: dict[str, Any] | None = None


def tokenizer_vocabulary(data: bytes, name: str) -> tuple[int, bool]:
    """How many ids a tokenizer file (`tokenizer.json`) needs, padding included, and whether its own id 0 is padding.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        read = msgspec.json.decode(data, type=_JsonTokenizer)
        vocabulary = read.model["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        added = {each["id"]: each["content"] for each in read.added_tokens}
        first = added.get(0) or next((word for word, each in _pairs(vocabulary) if each == 0), "")
        size = max([*ids, *added]) + 1
    except (*NOT_JSON, KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, NOT_JSON) else "it has no vocabulary"
        raise ConfigError(
            f"{name} is not a file of the tokenizers library: {what}; write one with Tokenizer.save()"
        ) from None
    pads = read.padding is not None and read.padding.get("pad_id") == 0
    is_padding = pads or str(first).casefold() in _PADDING_NAMES
    return size if is_padding else size + 1, is_padding


def _pairs(vocabulary: Any) -> Any:
    return vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], at) for at, each in enumerate(vocabulary))


def read_tokenizer(path: Path) -> str:
    """The contents of a tokenizer file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not text.
    """
    try:
        return read_regular(path, MOST_TOKENIZER_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{printable(str(path))} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{printable(str(path))} is not a file of the tokenizers library: it is not text") from None


def tokenizer_digest(contents: str) -> str:
    """sha256 (hex) of a tokenizer file."""
    return hashlib.sha256(contents.encode()).hexdigest()


def open_tokenizer(spec: TextSpec, length: int, contents: str = "") -> Tokenize:
    """From a text to at most `length` ids, at least one, all in 1..vocabulary − 1.

    Args:
        contents: of the tokenizer file, where the job has one.

    Raises:
        DataError: the contents are not those that the job names, the tokenizers library is missing or refuses them, or
            they add so much of their own that no word of a text is left.
    """
    least = NO_WORD + 1 if spec.tokenizer else SMALLEST_VOCABULARY
    if not least <= spec.vocabulary <= MOST_VOCABULARY:
        raise DataError(
            f"the job has a vocabulary of {spec.vocabulary} words, allowed are {least} to {MOST_VOCABULARY}"
        )
    if not spec.tokenizer:
        return lambda text: [word_id(word, spec.vocabulary) for word in words(text)[:length]] or [NO_WORD]
    if tokenizer_digest(contents) != spec.tokenizer:
        raise DataError(
            f"the tokenizer that came with the model has sha256 {tokenizer_digest(contents)[:12]}…, the job names "
            f"{spec.tokenizer[:12]}…; start the coordinator again, which sends it again"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("the job's texts need the library tokenizers here: pip install 'fedepth[text]'") from None
    try:
        tokenizer = Tokenizer.from_str(contents)
    except Exception as error:  # noqa: BLE001 - the library has no type of its own
        raise DataError(f"the job's tokenizer cannot be used by tokenizers here: {error}") from None
    added = tokenizer.num_special_tokens_to_add(False)
    if added >= length:
        raise DataError(
            f"the job's tokenizer adds {added} ids of its own to every text, so that nothing of a text is left in "
            f"{length}; raise [text] length in the job file"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    _, is_padding = tokenizer_vocabulary(contents.encode(), "the job's tokenizer")
    return _Tokenizer(tokenizer, spec.vocabulary, 0 if is_padding else 1)


class _Tokenizer:
    def __init__(self, tokenizer: Any, vocabulary: int, shift: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._shift = shift

    def __call__(self, text: str) -> Sequence[int]:
        found = self._tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
        ids = [each + self._shift for each in found if each + self._shift != PADDING]
        if ids and max(ids) >= self._vocabulary:
            raise DataError(f"the job's tokenizer gives the id {max(ids)}, its file tells of {self._vocabulary}")
        return ids or [NO_WORD]
