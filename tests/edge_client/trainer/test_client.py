import asyncio
import json
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_client.config import TrainerConfig
from edge_client.trainer.client import TrainerKeeper, TrainerProcess
from fedepth.errors import ChildError

FAKE_TRAINER = Path(__file__).parents[1] / "fake_trainer.py"


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    (tmp_path / "scenes").write_text(json.dumps([{"do": "ok"}]))
    return [sys.executable, str(FAKE_TRAINER), str(tmp_path / "scenes"), str(tmp_path / "journal")]


def test_an_idle_trainer_is_stopped_after_its_time(argv: list[str]) -> None:
    async def play() -> None:
        keeper = TrainerKeeper(TrainerConfig(linger_s=0.0), argv)
        first = await keeper.take()
        assert first.alive
        assert first.held_bytes > 0
        keeper.rest()
        while keeper.held_bytes:
            await asyncio.sleep(0)
        second = await keeper.take()  # waits until the first has ended: never two at a time
        assert not first.alive
        assert second.pid != first.pid
        await keeper.drop()
        assert not second.alive

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_trainer_that_has_ended_is_not_told_as_idle(argv: list[str]) -> None:
    async def play() -> None:
        keeper = TrainerKeeper(TrainerConfig(linger_s=0.0), argv)
        trainer = await keeper.take()
        await trainer.kill()
        keeper.rest()
        for _ in range(3):  # turns of the loop, in which a timer of no seconds ends
            await asyncio.sleep(0)
        assert (await keeper.take()).pid != trainer.pid
        await keeper.drop()

    with capture_logs() as told:
        asyncio.run(asyncio.wait_for(play(), 60))
    assert [line["event"] for line in told] == ["trainer started", "trainer started"]


SLOW_TO_END = """
import sys, time
print('{"event": "ready", "start_bytes": 1, "allocator": "none"}', flush=True)
sys.stdin.read()
time.sleep(0.3)
"""


def test_a_task_that_is_given_up_while_the_last_trainer_ends_costs_the_next_nothing() -> None:
    async def scene() -> None:
        keeper = TrainerKeeper(TrainerConfig(linger_s=0.0), [sys.executable, "-c", SLOW_TO_END])
        first = await keeper.take()
        keeper.rest()
        while keeper._stopping is None:
            await asyncio.sleep(0)
        given_up = asyncio.ensure_future(keeper.take())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait({given_up})
        assert first.alive
        second = await keeper.take()
        assert not first.alive  # two at a time need twice the memory
        assert second.alive
        await keeper.close()

    asyncio.run(asyncio.wait_for(scene(), 60))


def test_a_lingering_trainer_is_taken_again(argv: list[str]) -> None:
    async def play() -> None:
        keeper = TrainerKeeper(TrainerConfig(linger_s=60), argv)
        first = await keeper.take()
        keeper.rest()
        assert await keeper.take() is first
        await keeper.drop()

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_start_goes_on_when_nobody_waits_for_it_any_more(argv: list[str]) -> None:
    """Else a device whose trainer starts slowly would never have one where rounds are short."""

    async def play() -> None:
        keeper = TrainerKeeper(TrainerConfig(linger_s=60), argv)
        for _ in range(3):
            given_up = asyncio.ensure_future(keeper.take())
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait({given_up})
            await keeper.drop()
        pid = (await keeper.take()).pid
        assert (await keeper.take()).pid == pid
        await keeper.close()
        starting = asyncio.ensure_future(keeper.take())
        await asyncio.sleep(0)
        await keeper.close()
        with pytest.raises(asyncio.CancelledError):
            await starting

    with capture_logs() as logs:
        asyncio.run(asyncio.wait_for(play(), 60))
    assert [line["event"] for line in logs] == ["trainer started"]


@pytest.mark.parametrize("line", ['{"event": "done"}', '{"event": "ready"}', "[]"])
def test_what_does_not_say_ready_is_ended(line: str) -> None:
    argv = [sys.executable, "-c", f"print({line!r}, flush=True); input()"]
    with pytest.raises(ChildError, match="did not say that it is ready"):
        asyncio.run(TrainerProcess.start(TrainerConfig(), argv))


def test_a_trainer_that_cannot_be_started_is_an_error_of_the_child() -> None:
    with pytest.raises(ChildError, match="the trainer cannot be started: No such file or directory"):
        asyncio.run(TrainerProcess.start(TrainerConfig(), ["/does/not/exist"]))


def test_a_line_without_end_is_an_error_of_the_child() -> None:
    argv = [sys.executable, "-c", "print('x' * (5 << 20), flush=True)"]
    with pytest.raises(ChildError, match="wrote a line of over 4194304 bytes"):
        asyncio.run(TrainerProcess.start(TrainerConfig(), argv))
