"""The pace of a transfer on simulated links: bounds, full speed soon, and what it does when a link changes."""

from __future__ import annotations

import math
from collections import deque

from fedepth_wire.pace import (
    FIRST_WINDOW_BYTES,
    LEAST_PIECE_BYTES,
    LEAST_WINDOW_BYTES,
    MOST_PIECE_BYTES,
    MOST_WINDOW_BYTES,
    Pace,
)
from hypothesis import given, settings
from hypothesis import strategies as st


class Link:
    """A sender that keeps its window full, on a link with a queue: bytes go one after the other at the link's rate, and
    are answered for a round trip later."""

    def __init__(self, rate: float, round_trip_s: float) -> None:
        self.now = 0.0
        self.rate = rate
        self.round_trip_s = round_trip_s
        self.pace = Pace(lambda: self.now)
        self._answers: deque[tuple[float, int]] = deque()
        self._free_at = 0.0
        self._fill()

    def _fill(self) -> None:
        pace = self.pace
        while size := pace.next_piece:
            pace.sent(size)
            self._free_at = max(self.now, self._free_at) + size / self.rate
            self._answers.append((self._free_at + self.round_trip_s, size))

    def answer(self) -> None:
        """The next answer comes, and more is sent."""
        at, size = self._answers.popleft()
        self.now = max(self.now, at)
        self.pace.arrived(size)
        self._fill()

    def run(self, seconds: float) -> int:
        """Returns what arrived meanwhile."""
        end, before = self.now + seconds, self.pace.moved
        while self._answers[0][0] < end:
            self.answer()
        return self.pace.moved - before

    def cut(self) -> None:
        self.pace.cut()
        self._answers.clear()
        self._free_at = self.now
        self._fill()

    @property
    def queued_s(self) -> float:
        """How long what is under way takes."""
        return self.pace.under_way / self.rate


rates = st.floats(1.0, 1e9)
round_trips = st.floats(0.0, 5.0)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(rates, round_trips, st.lists(st.tuples(st.sampled_from(["answer", "cut", "rate"]), rates), max_size=60))
def test_its_bounds_hold_whatever_the_link_does(
    rate: float, round_trip_s: float, steps: list[tuple[str, float]]
) -> None:
    link = Link(rate, round_trip_s)
    for step, number in steps:
        before = link.pace.window
        if step == "answer":
            link.answer()
        elif step == "cut":
            link.cut()
            assert link.pace.window <= FIRST_WINDOW_BYTES
        else:
            link.rate = number
        pace = link.pace
        assert LEAST_WINDOW_BYTES <= pace.window <= min(MOST_WINDOW_BYTES, max(2 * before, FIRST_WINDOW_BYTES))
        assert LEAST_PIECE_BYTES <= pace.piece <= MOST_PIECE_BYTES
        assert pace.piece <= max(LEAST_PIECE_BYTES, pace.window // 4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.floats(2e3, 2e6), st.floats(0.001, 0.8))
def test_a_link_is_full_after_a_few_round_trips_and_its_queue_stays_short(rate: float, round_trip_s: float) -> None:
    link = Link(rate, round_trip_s)
    needed = max(1.0, rate * round_trip_s / FIRST_WINDOW_BYTES)  # growth; each time after a round trip and its queue
    link.run((math.log(needed, 1.25) + 10) * (round_trip_s + 2.0))
    for _ in range(20):
        assert link.run(10 * (round_trip_s + 1)) >= 0.9 * rate * 10 * (round_trip_s + 1) - 2 * link.pace.piece
        assert link.queued_s <= 2 * round_trip_s + 2.6


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.floats(1e6, 1e8), st.floats(0.001, 0.3), st.floats(2e3, 1e5))
def test_it_follows_a_link_that_becomes_a_thousand_times_slower_and_back(
    rate: float, round_trip_s: float, slow: float
) -> None:
    link = Link(rate, round_trip_s)
    link.run(20 * (round_trip_s + 0.1))
    link.rate = slow
    under_way = link.pace.under_way
    # What was under way must pass, and what its answers let follow; or the stream is over before.
    link.run(2 * under_way / slow + 10 * (round_trip_s + 2))
    assert link.queued_s <= 2 * round_trip_s + 2.6
    link.rate = rate
    link.run(30 * (round_trip_s + 2.6))
    assert link.run(1.0) >= 0.9 * min(rate, MOST_WINDOW_BYTES / (round_trip_s + 0.01)) - 2 * link.pace.piece


def test_it_follows_a_path_that_becomes_longer() -> None:
    link = Link(1e5, 0.01)
    link.run(30)
    link.round_trip_s = 4.0
    link.run(400)
    assert link.run(100) >= 0.7 * 1e5 * 100


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(40_000, 10_000_000), st.floats(1e4, 1e8), st.floats(0.001, 0.5))
def test_on_a_link_that_is_cut_again_and_again_a_twentieth_is_lost(
    between: int, rate: float, round_trip_s: float
) -> None:
    link = Link(rate, round_trip_s)
    lost = 0
    for number in range(6):
        begin = link.pace.moved
        while link.pace.moved + link.pace.under_way - begin < between:
            link.answer()
        if number:  # the first teaches
            lost += link.pace.under_way
        link.cut()
    assert lost <= 5 * max(between / 18 + LEAST_PIECE_BYTES, LEAST_WINDOW_BYTES)


def test_a_cut_before_anything_arrived_teaches_nothing() -> None:
    link = Link(1e8, 0.01)
    link.run(1.0)
    link.cut()
    for _ in range(5):
        link.cut()  # such as a coordinator that is away
    link.run(2.0)
    assert link.pace.window > 1 << 20
