"""What a trace says of clients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedepth.errors import ConfigError
from fedepth.simulation.trace import Conditions, Trace, load_trace

NAMES = ("a", "b")


def loaded(folder: Path, text: str) -> Trace:
    path = folder / "trace.jsonl"
    path.write_text(text)
    return load_trace(path, NAMES)


def test_a_line_of_its_own_comes_before_that_of_everybody(tmp_path: Path) -> None:
    trace = loaded(
        tmp_path,
        '{"client": "*", "images_per_second": 40}\n\n{"client": "b", "dropout": 0.5}\n{"round": 2, "clients": ["a"]}\n',
    )
    assert trace.of("a").images_per_second == 40 and trace.of("b") == Conditions("b", dropout=0.5)
    assert [trace.may_be_drawn("b", number) for number in (1, 2)] == [True, False]
    assert Trace().of("a") == Conditions("a")


def test_times_repeat() -> None:
    night = Conditions("a", available=((10.0, 20.0),), every_s=100.0)
    assert [night.is_there(now) for now in (0, 10, 19.9, 20, 110, 220)] == [False, True, True, False, True, False]
    assert [night.next_change(now) for now in (0, 10, 20, 115)] == [10, 20, 110, 120]
    assert Conditions("a", available=((10.0, 20.0),)).next_change(20) == math.inf


def test_dropping_out_is_decided_by_seed_round_client_and_attempt() -> None:
    trace = Trace({"a": Conditions("a", dropout=0.3), "b": Conditions("b", dropout=1.0)})
    draws = [trace.drops_out(1, number, "a", 1) for number in range(1000)]
    assert draws == [trace.drops_out(1, number, "a", 1) for number in range(1000)]
    assert 250 < sum(draw is not None for draw in draws) < 350
    assert trace.drops_out(1, 1, "b", 1) is not None and trace.drops_out(1, 1, "c", 1) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"client": "c"}', "line 1: there is no client 'c'"),
        ('{"client": "a"}\n{"client": "a", "speed": 1}', "line 2: Object contains unknown field `speed`"),
        ('{"client": "a", "dropout": 2}', "dropout must be from 0 to 1, is 2"),
        ('{"client": "a", "images_per_second": 0}', "images_per_second must be above 0, is 0"),
        ('{"client": "a", "available": [[5, 1]]}', "available from 5.0 to 1.0 is not within the run"),
        ('{"round": 1, "clients": ["x"]}', "there is no client 'x'"),
        ("nonsense", "line 1: "),
        ('{"client": "a", "dropout": 1}\n{"client": "a"}', "line 2: there is another line about client 'a'"),
        ('{"round": 2, "clients": ["a"]}\n{"round": 2, "clients": []}', "line 2: there is another line about round 2"),
        ('{"round": 0, "clients": ["a"]}', "rounds count from 1, this is 0"),
        ('{"round": 1, "clients": ["*"]}', "name clients here"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)
