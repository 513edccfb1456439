"""Settings that somebody typed, or that an editor, a script or a bad disk has made something else of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.config import load
from fedepth.errors import ConfigError
from fedepth.job import load_config, model_spec, training_spec
from fedepth.job_sections import JobConfig
from tests.fuzz.damage import damaged, fuzzing

JOB = """[job]
name = "demo"
rounds = 4
quorum = 2
round_deadline_s = 60.5
policy = "auto"
[model]
name = "digits-cnn"
classes = ["a", "b"]
input_shape = [1, 8, 8]
mean = [0.3]
std = [0.4]
[training]
batch = 16
optimizer = "sgd"
cache_type = "uint8"
[test]
data = "digits"
[limits]
devices = 5
"""
CLIENT = """coordinator = "192.168.1.10:8970"
data = "data"
state = "state"
name = "kitchen"
[memory]
cap = "300MiB"
fraction = 0.9
[trainer]
linger_s = 60
allocator = "auto"
[retry]
first_s = 1
"""
TOKENS = [
    *("[job]", "[", "[[job]]", "=", "\n", '"', "'''", "{", "}", ",", ".", "#", "\\u0000", "\\ud800", "\x00", "\ufeff"),
    *("nan", "-inf", "1e999", "-1", "0", "9" * 30, "9" * 5000, "1979-05-27", "07:32:00", "true", "0x" + "f" * 40),
    *("job", "rounds", "seed", "memory", "cap", "coordinator", "data", "~nobody-of-this-name", "/" * 5000, "é" * 300),
]
Load = Callable[[Path], object]


def load_job(path: Path) -> JobConfig:
    """And what is made of it right after."""
    config = load_config(path)
    model_spec(config)
    training_spec(config, 1)
    return config


FILES = pytest.mark.parametrize(("load", "text"), [(load_job, JOB), (load, CLIENT)], ids=["job", "client"])


def use(load: Load, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        load(path)
    except ConfigError as error:
        assert len(str(error)) < 1000 + len(str(path))


@FILES
def test_the_files_that_are_damaged_below_are_good(tmp_path: Path, load: Load, text: str) -> None:
    (tmp_path / "file.toml").write_text(text)
    load(tmp_path / "file.toml")


@FILES
def test_damaged_files(tmp_path: Path, load: Load, text: str) -> None:
    @fuzzing(200)
    @given(damaged(text.encode()))
    def try_one(data: bytes) -> None:
        use(load, tmp_path / "file.toml", data)

    try_one()


@FILES
def test_other_words_in_place_of_a_line_or_a_value(tmp_path: Path, load: Load, text: str) -> None:
    lines = text.splitlines()

    @fuzzing(200)
    @given(st.integers(0, len(lines) - 1), st.lists(st.sampled_from(TOKENS), max_size=4), st.booleans())
    def try_one(at: int, words: list[str], keep_name: bool) -> None:
        name, equals, _ = lines[at].partition("=")
        line = (name + equals if keep_name else "") + "".join(words)
        changed = "\n".join([*lines[:at], line, *lines[at + 1 :]])
        use(load, tmp_path / "file.toml", changed.encode("utf-8", "surrogatepass"))

    try_one()


@FILES
def test_any_bytes(tmp_path: Path, load: Load, text: str) -> None:
    @fuzzing(60)
    @given(st.binary(max_size=80))
    def try_one(data: bytes) -> None:
        use(load, tmp_path / "file.toml", data)

    try_one()


@FILES
@pytest.mark.parametrize("data", [b"\xff\xfe", b"\x00", b"a = " + b"[" * 50_000, b"a" * 100_000, b"a." * 20_000])
def test_files_that_nobody_typed(tmp_path: Path, load: Load, text: str, data: bytes) -> None:
    use(load, tmp_path / "file.toml", data)
    use(load, tmp_path / "file.toml", b"\xef\xbb\xbf" + data)


@FILES
def test_what_is_no_file_is_refused(tmp_path: Path, load: Load, text: str) -> None:
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(100 << 20)
    paths: list[Any] = [tmp_path, tmp_path / "large.toml", tmp_path / "none", tmp_path / "a\0b", tmp_path / ("x" * 300)]
    for path in paths:
        with pytest.raises(ConfigError):
            load(path)
