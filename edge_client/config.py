"""The agent's settings: one TOML file, a few of them overridden on the command line.

coordinator = "192.168.1.10:8970"
data = "/srv/fedepth/data"
state = "/var/lib/fedepth"
name = "kitchen"      # a certificate's name goes before it
insecure = false      # true: plain text, without a certificate; the coordinator must do the same
most_damaged = 0.05   # share of image files or rows that may be damaged; they are left out
[memory]
cap = "300MiB"        # what training may add; 0 for no cap
reserve = "64MiB"     # left to others
fraction = 0.9        # part of the available memory that may be used at all
[trainer]
linger_s = 60         # how long an idle trainer stays in memory
threads = 0           # 0 leaves the choice to torch
enforce = true        # stop a stage that goes over its budget
allocator = "auto"    # the one that calibration chooses; or "tcmalloc" or "glibc" by name
[retry]
first_s = 1
longest_s = 300
remind_s = 180
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from fedepth.address import parse_address
from fedepth.data.damage import MOST_DAMAGED
from fedepth.errors import ConfigError
from fedepth.files import user_folder
from fedepth.printable import printable, quoted, shortened
from fedepth.settings import SettingsFile, read_settings, settings_path, suggestion, violation
from fedepth.sizes import parse_size
from fedepth.task import MOST_DEVICE_NAME

_MOST_THREADS = 4096
_LONGEST_LINGER_S = 365 * 86400
_FIRST_WORD = re.compile(r"\w+")
_UNKNOWN = re.compile(r"unknown field `(?P<field>[^`]+)`(?: - at `\$\.?(?P<path>[^`]*)`)?")


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much of the device's memory training may use. Sizes are bytes or text such as "300MiB"."""

    cap: str | int = 0
    reserve: str | int = "64MiB"
    fraction: float = 0.9

    def __post_init__(self) -> None:
        for field in ("cap", "reserve"):
            try:
                parse_size(getattr(self, field))
            except ConfigError as error:
                raise ValueError(f"{field}: {error}") from None
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, but must be above 0 and at most 1")

    @property
    def cap_bytes(self) -> int:
        return parse_size(self.cap)

    @property
    def reserve_bytes(self) -> int:
        return parse_size(self.reserve)


class TrainerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the trainer process runs."""

    linger_s: float = 60.0
    threads: int = 0
    enforce: bool = True
    allocator: Literal["auto", "glibc", "tcmalloc"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.linger_s <= _LONGEST_LINGER_S:
            raise ValueError(f"linger_s is {self.linger_s}, but must be between 0 and {_LONGEST_LINGER_S} (a year)")
        if not 0 <= self.threads <= _MOST_THREADS:
            raise ValueError(
                f"threads is {self.threads}, but must be between 0 and {_MOST_THREADS} (0 lets torch choose)"
            )


class RetryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pauses between attempts to reach the coordinator, and how often the log says that it is away."""

    first_s: float = 1.0
    longest_s: float = 300.0
    remind_s: float = 180.0

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.longest_s or not math.isfinite(self.longest_s):
            raise ValueError(
                f"first_s is {self.first_s}, but must be above 0 and at most longest_s ({self.longest_s}), a "
                "finite number"
            )
        if not 0 < self.remind_s < math.inf:  # nor NaN, which TOML knows
            raise ValueError(f"remind_s is {self.remind_s}, but must be above 0 and finite")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an operator can set. See the module's docstring for the file."""

    coordinator: str = ""
    data: str = ""
    state: str = ""
    name: str = ""
    insecure: bool = False
    most_damaged: float = MOST_DAMAGED
    memory: MemoryConfig = MemoryConfig()
    trainer: TrainerConfig = TrainerConfig()
    retry: RetryConfig = RetryConfig()

    def __post_init__(self) -> None:
        if len(self.name) > MOST_DEVICE_NAME or printable(self.name) != self.name:
            raise ValueError(
                f"name is {quoted(self.name)}, but must have at most {MOST_DEVICE_NAME} characters, which can be shown"
            )
        if not 0 <= self.most_damaged <= 1:  # nor NaN
            raise ValueError(f"most_damaged is {self.most_damaged}, but must be between 0 and 1")
        if not self.coordinator:
            return
        try:
            address = parse_address(self.coordinator)
        except ConfigError as error:
            raise ValueError(f"coordinator: {error}") from None
        msgspec.structs.force_setattr(self, "coordinator", str(address))  # one spelling in messages and logs

    @property
    def state_dir(self) -> Path:
        return Path(self.state) if self.state else default_state_dir()

    @property
    def data_dir(self) -> Path:
        return Path(self.data)


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings in `path`, with `overrides` ("memory.cap" and so on) put over them.

    Relative paths in the file count from the file's folder, those in `overrides` from the working directory.

    Raises:
        ConfigError: unreadable, not TOML, an unknown field (names the closest one), or a value out of range.
    """
    file = read_settings(path, printable(str(path))) if path else None
    settings = _with_full_paths(file) if file else {}
    given = set(overrides or {})
    for field, value in (overrides or {}).items():
        section, _, name = field.rpartition(".")
        table = settings.setdefault(section, {}) if section else settings
        if not isinstance(table, dict):
            assert file is not None  # what comes from options is a table
            raise ConfigError(f"{file.name}: {section} must be a table{file.place(section)}")
        table[name] = value
    try:
        return msgspec.convert(settings, Config)
    except msgspec.ValidationError as error:
        field, what = _explain(str(error))
        if file is None or field in given:
            raise ConfigError(f"the command line: {what}") from None
        section, _, name = field.rpartition(".")
        raise ConfigError(f"{file.name}: {what}{file.place(section, name)}") from None


def check_runnable(config: Config) -> None:
    """What `run` needs and `probe` does not.

    Raises:
        ConfigError: no coordinator, or no data directory.
    """
    if not config.coordinator:
        raise ConfigError('coordinator is missing: give --coordinator HOST:PORT, or set coordinator = "HOST:PORT"')
    if not config.data:
        raise ConfigError('data is missing: give --data DIR, or set data = "DIR"')


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/fedepth-client`, else below ~/.local/state.

    Raises:
        StateError: there is no home directory.
    """
    return user_folder("XDG_STATE_HOME", ".local/state", "give --state DIR, or set HOME") / "fedepth-client"


def _with_full_paths(file: SettingsFile) -> dict[str, Any]:
    settings = dict(file.tables)
    for field in ("data", "state"):
        if isinstance(settings.get(field), str) and settings[field]:
            try:
                settings[field] = str(settings_path(file.folder, settings[field]))
            except ConfigError as error:
                raise ConfigError(f"{file.name}: {field}: {error}{file.place('', field)}") from None
    return settings


def _explain(message: str) -> tuple[str, str]:
    """The field that a message of msgspec's is about, and the message for people."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        section = unknown["path"] or ""
        field = f"{section}.{unknown['field']}" if section else unknown["field"]
        return field, f'unknown setting "{shortened(field)}"' + suggestion(field, _fields(Config))
    path, what = violation(message)
    # Our own messages begin with the field's name, those of msgspec with a capital letter.
    if what[:1].isupper():
        return path, f"{path}: {what}" if path else what
    name = _FIRST_WORD.match(what)
    field = f"{path}.{name[0]}" if path and name else name[0] if name else path
    return field, f"{path}.{what}" if path else what


def _fields(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name
