"""How much of a transfer may be under way: about a second of its link, however fast or slow that is.

The device measures, in both directions: an upload is acknowledged as it is written, a download asked for piece by
piece. What is under way and not yet answered for is the window. It is lost when the link is cut, and everything else
on the connection waits behind it; on the other hand, a link is only used fully while the window lasts a round trip.

Once a round trip, the window becomes `rate · (round trip + 1 s)` and a little, but at most twice what it was. The rate
is the largest of the last round trip, as in BBR (Cardwell et al., "BBR: Congestion-Based Congestion Control", 2016).
The round trip is that without a queue of our own. An answer that is far too late shrinks the window at once. It also
stays below 1/20 of what passes between two cuts, so that not much is sent twice on a link that is cut again and again;
before the first cut, below a quarter of what has passed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

LEAST_WINDOW_BYTES = 2 << 10
FIRST_WINDOW_BYTES = 4 << 10
MOST_WINDOW_BYTES = 2 << 20
LEAST_PIECE_BYTES = 1 << 10
MOST_PIECE_BYTES = 1 << 20
TARGET_S = 1.0
LATE = 2.0  # times what a window should take
LOSS = 20  # what passes between two cuts is so many times as much as what is lost in one
FIRST_LOSS = 4  # what is known of a link that was never cut: so much has passed
_PIECES = 4  # in a window
_SHORTEST_S = 1e-6  # of what a clock can tell


class Pace:
    """The pace of one direction of a link. It outlives streams: what it has learnt holds for the next one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window = FIRST_WINDOW_BYTES
        self._round_trip_s = math.inf
        self._run = 0  # bytes since the last cut
        self._between_cuts: int | None = None
        self._rate = 0.0  # of this round trip: the largest
        self._shortest_s = math.inf  # and its shortest wait for an answer
        self._was_full = False
        self.start()

    @property
    def window(self) -> int:
        """Bytes that may be under way, `LEAST_WINDOW_BYTES` to `MOST_WINDOW_BYTES`."""
        if self._between_cuts is None:
            most = max(FIRST_WINDOW_BYTES, self._run // FIRST_LOSS)
        else:
            most = max(self._between_cuts, self._run) // LOSS
        return max(LEAST_WINDOW_BYTES, min(self._window, most, MOST_WINDOW_BYTES))

    @property
    def piece(self) -> int:
        """Bytes of one message, `LEAST_PIECE_BYTES` to `MOST_PIECE_BYTES`."""
        return max(LEAST_PIECE_BYTES, min(self.window // _PIECES, MOST_PIECE_BYTES))

    @property
    def next_piece(self) -> int:
        """Bytes that should be sent now; 0 while enough is under way."""
        room = self.window - self.under_way
        return min(self.piece, room) if 2 * room >= self.piece else 0

    @property
    def under_way(self) -> int:
        """Bytes that are sent, or asked for, and have not arrived."""
        return self._sent - self._arrived

    @property
    def moved(self) -> int:
        """Bytes of this stream that have arrived."""
        return self._arrived

    def start(self) -> None:
        """A stream begins: nothing is under way."""
        self._sent = self._arrived = 0
        self._waiting: deque[tuple[int, float, int]] = deque()  # its end, when it was sent, what had arrived then
        self._begin_round()

    def sent(self, size: int) -> None:
        """So many bytes more are under way."""
        self._waiting.append((self._sent + size, self._clock(), self._arrived))
        self._sent += size
        self._was_full = self._was_full or not self.next_piece

    def arrived(self, size: int) -> None:
        """So many bytes, the oldest that were under way, have arrived."""
        now = self._clock()
        self._arrived += size
        self._run += size
        while self._waiting and self._waiting[0][0] <= self._arrived:
            _, since, before = self._waiting.popleft()
            seconds = max(_SHORTEST_S, now - since)
            rate = (self._arrived - before) / seconds
            self._rate = max(self._rate, rate)
            self._shortest_s = min(self._shortest_s, seconds)
            if seconds > LATE * (self._round_trip_s + TARGET_S):
                self._rate = rate
                self._window = max(LEAST_WINDOW_BYTES, min(self._window, self._goal(rate)))
        if self._arrived >= self._round_end and self._rate:
            self._end_round()

    def cut(self) -> None:
        """The stream has ended before its end. What comes next may be another link."""
        if self._run:
            self._between_cuts = self._run
        self._run = 0
        self._window = FIRST_WINDOW_BYTES
        self._round_trip_s = math.inf
        self.start()

    def _begin_round(self) -> None:
        self._round_end = self._sent
        self._rate = 0.0
        self._shortest_s = math.inf
        self._was_full = False

    def _end_round(self) -> None:
        if self.window == LEAST_WINDOW_BYTES:  # hardly a queue of ours: it is as long as that
            self._round_trip_s = self._shortest_s
        self._round_trip_s = min(self._round_trip_s, self._shortest_s)
        goal = self._goal(self._rate)
        if goal > self._window or self._was_full:  # a transfer that had no more to send says little of its link
            self._window = max(LEAST_WINDOW_BYTES, min(goal, 2 * self.window))
        self._begin_round()

    def _goal(self, rate: float) -> int:
        """The window for a link of this rate, in bytes a second. The piece keeps a small window from standing still."""
        return int(min(rate * (self._round_trip_s + TARGET_S) + LEAST_PIECE_BYTES, MOST_WINDOW_BYTES))
