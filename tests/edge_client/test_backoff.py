import asyncio

import pytest
from structlog.testing import capture_logs

from edge_client.backoff import Backoff, Clock, Reminder
from edge_client.call_errors import BusyError, ServerError, UnreachableError
from edge_client.config import RetryConfig
from fedepth.errors import TransportError
from fedepth.timeout import within


class FakeClock(Clock):
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


def pauses(seed: str, attempts: int) -> list[float]:
    clock = FakeClock()
    backoff = Backoff("host:1", RetryConfig(first_s=1, longest_s=300, remind_s=180), clock, seed)
    found = []
    for _ in range(attempts):
        before = clock.time
        asyncio.run(backoff.pause(TransportError("away")))
        found.append(clock.time - before)
    return found


def test_pauses_double_up_to_the_longest_with_jitter() -> None:
    for number, pause in enumerate(pauses("device", 12)):
        nominal = min(300, 2**number)
        assert 0.5 * nominal <= pause <= 1.5 * nominal


def test_devices_do_not_return_in_step_but_each_repeats_itself() -> None:
    assert pauses("one", 5) == pauses("one", 5)
    assert pauses("one", 5) != pauses("two", 5)


def test_an_outage_is_said_at_once_and_then_at_every_reminder() -> None:
    clock = FakeClock()
    backoff = Backoff("host:1", RetryConfig(first_s=1000, longest_s=1000, remind_s=180), clock, "device")
    with capture_logs() as logs:
        asyncio.run(backoff.pause(TransportError("away")))
    assert [line["away_s"] for line in logs] == [180.0 * n for n in range(len(logs))]
    assert len(logs) == 1 + int(clock.time // 180)
    assert (logs[0]["coordinator"], logs[0]["error"]) == ("host:1", "away")
    with capture_logs() as logs:
        backoff.reset()
        backoff.reset()
    assert [line["event"] for line in logs] == ["coordinator is back"]


def test_a_cancellation_that_comes_together_with_the_result_is_not_lost() -> None:
    async def play() -> None:
        ready = asyncio.Event()

        async def loop() -> None:
            while True:
                await within(60, ready.wait())
                ready.clear()

        task = asyncio.create_task(loop())
        for _ in range(5):
            await asyncio.sleep(0)
        ready.set()
        for _ in range(2):  # the step is done, its waiter not yet resumed
            await asyncio.sleep(0)
            task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done
        assert task.cancelled()

    asyncio.run(play())


def test_what_takes_too_long_is_cancelled() -> None:
    async def play() -> None:
        step = asyncio.ensure_future(asyncio.Event().wait())
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, step)
        await asyncio.wait([step])
        assert step.cancelled()

    asyncio.run(play())


def test_a_coordinator_that_says_when_is_asked_then() -> None:
    clock = FakeClock()
    backoff = Backoff("host:1", RetryConfig(first_s=1, longest_s=300, remind_s=180), clock, "device")
    for _ in range(20):
        before = clock.time
        asyncio.run(backoff.pause(BusyError("full", 20.0)))
        assert 20.0 <= clock.time - before <= 30.0
    before = clock.time
    asyncio.run(backoff.pause(BusyError("full")))  # without a time, as for any other error
    assert 150.0 <= clock.time - before <= 450.0


def test_away_busy_and_in_error_are_told_apart_and_each_at_once() -> None:
    backoff = Backoff("host:1", RetryConfig(first_s=1, longest_s=1, remind_s=180), FakeClock(), "device")
    errors = [UnreachableError("a"), UnreachableError("b"), BusyError("c"), ServerError("d"), TransportError("e")]
    with capture_logs() as logs:
        for error in errors:
            asyncio.run(backoff.pause(error))
    assert [(line["event"], line["error"]) for line in logs] == [
        ("coordinator cannot be reached; retrying until it answers", "a"),
        ("coordinator is busy; retrying until it is not", "c"),
        ("coordinator answers with an error; retrying until it does not", "d"),
    ]


def test_a_reminder_is_due_at_once_when_the_words_change_and_after_a_while() -> None:
    clock = FakeClock()
    reminder = Reminder(clock, 180.0)
    assert not reminder.over()
    assert reminder.due("12 MB free")
    clock.time = 179.0
    assert not reminder.due("13.5 MB free")  # only the number
    assert reminder.due("paused")
    clock.time = 179.0 + 180.0
    assert reminder.due("paused")
    assert reminder.over() and not reminder.over()
    assert reminder.due("paused")
