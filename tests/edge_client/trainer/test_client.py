import asyncio
import json
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_client.config import TrainerConfig
from edge_client.trainer import client
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


READY = '{"event": "ready", "start_bytes": 1, "allocator": "none"}'


async def said_by(code: str) -> object:
    """The first event of a trainer that is ready, and then does this."""
    trainer = await TrainerProcess.start(
        TrainerConfig(), [sys.executable, "-c", f"print({READY!r}, flush=True)\n{code}"]
    )
    try:
        return await trainer._receive()
    finally:
        await trainer.kill()


def test_a_trainer_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task would never end: the lease is renewed as long as the trainer lives."""
    monkeypatch.setattr(client, "HANG_S", 0.5)
    with pytest.raises(ChildError, match=r"has said nothing for 0\.5 s, and done nothing; does it wait for a disk"):
        asyncio.run(said_by("input()"))


def test_a_step_may_take_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "HANG_S", 1.0)  # in which even a busy machine gives it a tick of the clock
    works = "import time\nwhile time.process_time() < 2: pass\nprint('{}', flush=True)\ninput()"
    assert asyncio.run(said_by(works)) == {}


def test_a_trainer_that_cannot_be_started_is_an_error_of_the_child() -> None:
    with pytest.raises(ChildError, match="the trainer cannot be started: No such file or directory"):
        asyncio.run(TrainerProcess.start(TrainerConfig(), ["/does/not/exist"]))


def test_a_line_without_end_is_an_error_of_the_child() -> None:
    argv = [sys.executable, "-c", "print('x' * (5 << 20), flush=True)"]
    with pytest.raises(ChildError, match="wrote a line of over 4194304 bytes"):
        asyncio.run(TrainerProcess.start(TrainerConfig(), argv))
