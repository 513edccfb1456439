"""Settings in TOML files: reading them, and saying what is wrong, in which field and on which line."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedepth.errors import ConfigError
from fedepth.files import read_regular
from fedepth.printable import printable, quoted, shortened

MOST_BYTES = 4 << 20
_MOST_LINE = 100  # characters of a line that are shown

# "Expected `int`, got `str` - at `$.job.rounds[0]`": how msgspec words a violation.
_VIOLATION = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)
# "Invalid value (at line 3, column 8)": how tomllib words where it gave up.
_PLACE = re.compile(r"^(?P<what>.*?) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.DOTALL)
_HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*(?P<name>[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?P<more>(\s*\.\s*[\w"'-]+)*)\s*=""")

# What a file begins with that is something else than text.
_SIGNATURES = (
    (b"PK\x03\x04", "is a ZIP file or a document of a word processor"),
    (b"\xd0\xcf\x11\xe0", "is a document of a word processor"),
    (b"%PDF", "is a PDF document"),
    (b"{\\rtf", "is a document in rich text"),
    (b"\x1f\x8b", "is compressed with gzip"),
    (b"SQLite format 3\0", "is a SQLite database"),
)
# Longest first: UTF-32 begins as UTF-16 does.
_OTHER_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# Characters that editors, word processors and web pages put where TOML wants plain ones.
_LOOKALIKES = {
    **dict.fromkeys("“”„‟«»＂", 'a typographic quotation mark; write "'),
    **dict.fromkeys("‘’‚‛＇´", "a typographic apostrophe; write ' or \""),
    **dict.fromkeys("–—−", "a dash; write -"),
    "＝": "a full-width sign; write =",
    "，": "a full-width comma; write ,",
    **dict.fromkeys("\u00a0\u2007\u202f\u3000\u2002\u2003\u2009", "a space of another kind; write a plain space"),
    **dict.fromkeys("\ufeff\u200b\u200c\u200d\u2060\u00ad", "an invisible character; delete it"),
}
_HINTS = (
    (re.compile(r"=\s*(True|False)\b"), "TOML writes true and false"),
    (re.compile(r"=\s*(None|null|nil)\b", re.IGNORECASE), "TOML has no null: leave the line out"),
    (re.compile(r'=\s*"[^"]*\\'), r"a backslash in a text stands in 'single quotes', or twice"),
    (re.compile(r"=\s*\d+,\d"), "numbers are written as 0.5 and 10000"),
    (re.compile(r"=\s*\.\d"), "numbers are written as 0.5"),
    (re.compile(r"=\s*[A-Za-z_~/.]"), 'a text stands in quotes, as name = "demo"'),
    (re.compile(r"""^\s*[\w-]+\s*:"""), "TOML writes name = value"),
    (re.compile(r"^\s*(//|/\*|--|;)"), "a comment begins with #"),
    (re.compile(r"=\s*(#.*)?$"), "the value is missing"),
)


@dataclass(frozen=True)
class SettingsFile:
    """A TOML file that has been read.

    Attributes:
        name: how messages call it.
        tables: what it says.
    """

    path: Path
    name: str
    tables: dict[str, Any]
    text: str

    @property
    def folder(self) -> Path:
        """Where relative paths in it count from."""
        return self.path.absolute().parent

    def place(self, section: str, field: str = "") -> str:
        """The end of a message: " (line 3, column 1: 'rounds = 0')"; "" if the place is not found.

        Both may be as msgspec writes them, `mean[0]`. The line of the section is shown for a field that is missing.
        """
        section, field = (name.partition("[")[0] for name in (section, field))
        found = _find(self.text.splitlines(), section, field)
        if found is None:
            return ""
        line, column, shown = found
        return f" (line {line}, column {column}: {quoted(shown.strip(), _MOST_LINE)})"


def read_settings(path: Path, name: str) -> SettingsFile:
    """Reads a TOML file. A byte-order mark in front, which some editors write, is no part of it.

    Args:
        name: how messages about its contents call it.

    Raises:
        ConfigError: it cannot be read, has more than MOST_BYTES, or is not TOML; says what it is instead, or names the
            line and column, and shows the line.
    """
    # An idle agent, which was given its settings, loads no parser.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    data = _bytes_of(path)
    text = _text_of(data, name)
    # What TOML takes for the end of a line is \n or \r\n; tomllib counts lines in the same way.
    try:
        # A TOMLDecodeError is a ValueError, as is Python's own about an integer of 4,301 digits.
        file = SettingsFile(path, name, tomllib.loads(text), text)
    except ValueError as error:
        raise ConfigError(f"{name}: is not valid TOML{_what_is_wrong(text, str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{name}: is not valid TOML: brackets are nested too deeply") from None
    _check_integers(file, "", "", file.tables)
    return file


def settings_path(folder: Path, text: str) -> Path:
    """A path out of a settings file, absolute; a relative one counts from `folder`, and ~ is the home directory.

    Raises:
        ConfigError: no file can have this path.
    """
    if not text:
        raise ConfigError("the path is empty; write one, or leave the line out")
    try:
        path = (folder / Path(text).expanduser()).resolve()
        path.exists()
        str(path).encode("utf-8")
    # Too long; a NUL in it, or bytes that are no text; no such home, or links in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{error}".rstrip(".")
        instead = "; write the path in full" if text.startswith("~") else ""
        raise ConfigError(f"{quoted(text)} is not a path: {why}{instead}") from None
    return path


def violation(message: str) -> tuple[str, str]:
    """A message of msgspec's as the path of the field ("" if it names none) and what is wrong there."""
    match = _VIOLATION.match(message)
    assert match is not None
    return match["path"] or "", match["what"]


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the closest one, or all that there are.

    Names such as "memory.cap" are compared by their last word, which may merely stand in the wrong section.
    """
    import difflib  # where something is wrong, and never in an idle agent

    everything = sorted(known)
    names = {name.rpartition(".")[2]: name for name in everything}
    near = difflib.get_close_matches(word.rpartition(".")[2], names, n=1, cutoff=0.5)
    return f"; did you mean {names[near[0]]}?" if near else f"; there are {', '.join(everything)}"


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular(path, MOST_BYTES)
    except IsADirectoryError as error:
        raise ConfigError(f"{_in_full(path)}: cannot be read: {error.strerror}; name the file in it") from None
    except OSError as error:
        raise ConfigError(f"{_in_full(path)}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path with a NUL in it
        raise ConfigError(f"{quoted(str(path))}: cannot be read: {error}") from None


def _check_integers(file: SettingsFile, section: str, field: str, value: Any) -> None:
    """TOML's integers have 64 bits (https://toml.io/en/v1.0.0#integer), and so have those that we send and record."""
    if isinstance(value, dict):
        section = f"{section}.{field}".strip(".")
        for name, inner in value.items():
            _check_integers(file, section, name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_integers(file, section, field, inner)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        full = printable(f"[{section}] {field}" if section else field)
        raise ConfigError(
            f"{file.name}: {full}: is beyond the integers of TOML, which have 64 bits; write one from "
            f"{-(1 << 63)} to {(1 << 63) - 1}{file.place(section, field)}"
        )


def _in_full(path: Path) -> str:
    with contextlib.suppress(OSError):  # the working directory may be gone
        path = path.absolute()
    return printable(str(path))


def _text_of(data: bytes, name: str) -> str:
    for signature, what in _SIGNATURES:
        if data.startswith(signature):
            raise ConfigError(f"{name}: is not valid TOML: it {what}; save it as plain text")
    encoding = next((kind for mark, kind in _OTHER_ENCODINGS if data.startswith(mark)), "")
    if not encoding and len(data) > 3 and 3 * data.count(0) > len(data):
        encoding = "UTF-16"  # without its mark: every other byte of a Latin text is 0
    if encoding:
        raise ConfigError(f"{name}: is not valid TOML: it is saved as {encoding}; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line, column = data.count(b"\n", 0, start) + 1, len(data[start : error.start].decode()) + 1
        shown = data[start:].partition(b"\n")[0].decode("utf-8", "backslashreplace")
        meant = bytes([data[error.start]]).decode("cp1252", "replace")
        guess = f" (in Windows and Latin-1 files it is {quoted(meant)})" if meant.isprintable() else ""
        raise ConfigError(
            f"{name}: is not valid TOML at line {line}, column {column}: byte 0x{data[error.start]:02x} is not "
            f"UTF-8{guess}; save the file as UTF-8; the line is {_shown(shown)}"
        ) from None


def _what_is_wrong(text: str, message: str) -> str:
    """The rest of a message about text that is not TOML."""
    other = _other_format(text)
    if other:
        return f": it is {other}; a TOML file has sections as [memory] and lines as name = value"
    match = _PLACE.match(message)
    if match is None:
        return f": {shortened(message)}"
    lines = text.replace("\r\n", "\n").split("\n")
    if match["line"]:
        line, column = int(match["line"]), int(match["column"])
    else:
        written = [number for number, each in enumerate(lines, 1) if each.strip()]
        line = written[-1] if written else 1
        column = len(lines[line - 1]) + 1
    shown = lines[line - 1] if line <= len(lines) else ""
    what = f"{match['what'][:1].lower()}{match['what'][1:]}"
    hint = _hint(shown, column)
    # printable(): of another parser's words it may quote what it met.
    return f" at line {line}, column {column}: {shortened(what)}{hint}; the line is {_shown(shown)}"


def _hint(line: str, column: int) -> str:
    if "\r" in line:
        return "; lines end with a carriage return alone: save the file with line ends of Unix or Windows"
    # What stands inside a text that is well quoted is no mistake: only what comes where the parser gave up, or before.
    for place, character in enumerate(line, 1):
        if character in _LOOKALIKES and (place >= column - 1 or character not in "–—−"):
            return f"; {quoted(character)} at column {place} is {_LOOKALIKES[character]}"
    return next((f"; {hint}" for pattern, hint in _HINTS if pattern.search(line)), "")


def _other_format(text: str) -> str:
    """What a text that is not TOML is instead, as far as that is certain."""
    start = text.lstrip()
    if start.startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            return "JSON"
        if re.match(r'\{\s*("[^"]*"|//|/\*|\})', start):
            return "JSON"
    if re.match(r"<(\?xml|!DOCTYPE|[A-Za-z]+[\s>])", start, re.IGNORECASE):
        return "XML or a web page"
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        return ""
    # `name: value` and `- item`, and not one line of TOML's.
    yaml = sum(bool(re.match(r"""\s*(- +)?["']?[\w.-]+["']?\s*:(\s|$)|\s*- |---|\.\.\.""", line)) for line in lines)
    toml = any(_KEY.match(line) or _HEADER.match(line) for line in lines)
    return "YAML" if not toml and 2 * yaml > len(lines) else ""


def _shown(line: str) -> str:
    return quoted(line.strip(), _MOST_LINE)


def _find(lines: list[str], section: str, field: str) -> tuple[int, int, str] | None:
    """Line, column and text of a field, or of its section's header. Good for showing, not for deciding."""
    wanted = (*section.split("."), field) if section and field else (section or field,)
    header: tuple[str, ...] = ()
    fallback: tuple[int, int, str] | None = None
    for number, line in enumerate(lines, 1):
        head = _HEADER.match(line)
        if head:
            header = _names(head["name"])
            if header == wanted:
                return number, 1 + len(line) - len(line.lstrip()), line
            if header == wanted[:-1]:
                fallback = fallback or (number, 1 + len(line) - len(line.lstrip()), line)
            continue
        key = _KEY.match(line)
        if key:
            names = (*header, *_names(key["name"] + key["more"]))
            at = number, key.start("name") + 1, line
            if names == wanted:
                return at
            if names == wanted[: len(names)]:  # of `job = {rounds = 0}`, all of it
                fallback = fallback or at
    return fallback


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("\"'") for name in dotted.split("."))
