"""Kills at every named transition and failures of every call, on both sides, as tables; kills and stops at any time."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.faults.injection import Action, Calls, Rule
from benchmarks.faults.scenario import Kind, Scene, inject, recover

SERVER, AGENT = "fedepth-coordinator", "edge_client.daemon"
_PARTIAL, _PART = "*/spool/*/part-*.partial", "*/spool/*/part-*.safetensors"
_WAL = "*/job.sqlite-wal"
_SPOOL = "*/coordinator/spool/*-[0-9]"
_BEFORE, _AFTER = Action.KILL_BEFORE, Action.KILL_AFTER
_SEALED = Rule(Calls.RENAME, _PART, Action.OBSERVE, SERVER, count=0)
_AVERAGED = Rule(Calls.RENAME, "*/coordinator/weights/round-*", Action.OBSERVE, SERVER, count=0)
_STORAGE = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_NAMES = (errno.ENOSPC, errno.EIO, errno.EROFS)
_LOG = (errno.EPIPE, errno.ENOSPC, errno.EIO)


@dataclass(frozen=True)
class Point:
    """A call at which something happens.

    Attributes:
        upto: the call is drawn from the first so many.
        after: what must have been seen before.
    """

    name: str
    calls: Calls
    path: str
    action: Action = Action.FAIL
    upto: int = 1
    after: Rule | None = None
    errors: tuple[int, ...] = ()


SERVER_KILLS = (
    Point("a spool is made", Calls.MKDIR, _SPOOL, _AFTER),
    Point("a part is begun", Calls.OPEN, _PARTIAL, _AFTER),
    Point("a part is written", Calls.WRITE, _PARTIAL, _AFTER),
    Point("a part is written and not synced", Calls.SYNC, _PARTIAL, _BEFORE),
    Point("a part is synced and has no name", Calls.SYNC, _PARTIAL, _AFTER),
    Point("a part has its name, its folder is not synced", Calls.RENAME, _PART, _AFTER),
    Point("an update is written and not committed", Calls.SYNC, _WAL, _BEFORE, after=_SEALED),
    Point("an update is committed and not acknowledged", Calls.SYNC, _WAL, _AFTER, after=_SEALED),
    Point("anything is written and not committed", Calls.SYNC, _WAL, _BEFORE, upto=12),
    Point("anything is committed and not told", Calls.SYNC, _WAL, _AFTER, upto=12),
    Point("the average is being written", Calls.WRITE, "*/coordinator/weights/*", _AFTER, upto=4),
    Point("the average is written and not synced", Calls.SYNC, "*/coordinator/weights/*", _BEFORE),
    Point("the average is synced and has no name", Calls.RENAME, "*/coordinator/weights/round-*", _BEFORE),
    Point("the average has its name and no record", Calls.RENAME, "*/coordinator/weights/round-*", _AFTER),
    Point("the round is written and not committed", Calls.SYNC, _WAL, _BEFORE, after=_AVERAGED),
    Point("the round is committed and not told", Calls.SYNC, _WAL, _AFTER, after=_AVERAGED),
    Point("spools are being deleted", Calls.UNLINK, "*/coordinator/spool/*", _AFTER, upto=3),
)
AGENT_KILLS = (
    Point("weights are being fetched", Calls.WRITE, "*/weights/*.partial", _AFTER),
    Point("weights are fetched and have no name", Calls.SYNC, "*/weights/*.partial", _AFTER),
    Point("weights have their name", Calls.RENAME, "*/weights/*.safetensors", _AFTER),
    Point("a task's folder is made", Calls.MKDIR, "*/work/*", _AFTER),
    Point("a part is synced", Calls.SYNC, "*/part-*.safetensors", _AFTER),
    Point("an entry is written", Calls.WRITE, "*/.entry.json*", _AFTER),
    Point("an entry is synced and has no name", Calls.SYNC, "*/.entry.json*", _AFTER),
    Point("an entry has its name", Calls.RENAME, "*/entry.json", _AFTER),
    Point("an update is not in the outbox yet", Calls.RENAME, "*/outbox/[!.]*-[0-9]", _BEFORE),
    Point("an update is in the outbox, which is not synced", Calls.RENAME, "*/outbox/[!.]*-[0-9]", _AFTER),
    Point("an update is kept", Calls.SYNC, "*/outbox", _AFTER),
    Point("an update is acknowledged and still there", Calls.RENAME, "*/outbox/.done-*", _BEFORE),
    Point("an acknowledged update is out of the way", Calls.RENAME, "*/outbox/.done-*", _AFTER),
    Point("an acknowledged update is being deleted", Calls.UNLINK, "*/outbox/.done-*", _AFTER),
)
SERVER_FAILURES = (
    Point("making a spool", Calls.MKDIR, _SPOOL, errors=_NAMES),
    Point("opening a part", Calls.OPEN, _PARTIAL, errors=_NAMES),
    Point("writing a part", Calls.WRITE, _PARTIAL, errors=_STORAGE),
    Point("syncing a part", Calls.SYNC, _PARTIAL, errors=_STORAGE),
    Point("naming a part", Calls.RENAME, _PART, errors=_NAMES),
    Point("syncing a spool", Calls.SYNC, _SPOOL, errors=_STORAGE),
    Point("writing the record", Calls.WRITE, _WAL, upto=12, errors=_STORAGE),
    Point("committing", Calls.SYNC, _WAL, upto=8, errors=_STORAGE),
    Point("committing an update", Calls.SYNC, _WAL, after=_SEALED, errors=_STORAGE),
    Point("committing a round", Calls.SYNC, _WAL, after=_AVERAGED, errors=_STORAGE),
    Point("checkpointing the record", Calls.WRITE | Calls.SYNC, "*/job.sqlite", errors=_STORAGE),
    Point("writing the average", Calls.WRITE, "*/coordinator/weights/*", upto=3, errors=_STORAGE),
    Point("syncing the average", Calls.SYNC, "*/coordinator/weights*", upto=3, errors=_STORAGE),
    Point("naming the average", Calls.RENAME, "*/coordinator/weights/*", errors=_NAMES),
    Point("deleting spools", Calls.UNLINK, "*/coordinator/spool/*", upto=3, errors=(errno.EIO, errno.EROFS)),
    Point("logging", Calls.WRITE, "<stderr>", upto=20, errors=_LOG),
    Point("logging an accepted update", Calls.WRITE, "<stderr>", after=_SEALED, errors=_LOG),
    Point("anything that writes", Calls.all(), "*/coordinator/*", upto=20, errors=_STORAGE),
)
AGENT_FAILURES = (
    Point("opening a download", Calls.OPEN, "*/weights/*.partial", errors=_NAMES),
    Point("writing a download", Calls.WRITE, "*/weights/*.partial", errors=_STORAGE),
    Point("syncing a download", Calls.SYNC, "*/weights/*.partial", errors=_STORAGE),
    Point("naming a download", Calls.RENAME, "*/weights/*.safetensors", errors=_NAMES),
    Point("making a task's folder", Calls.MKDIR, "*/work/*", errors=_NAMES),
    Point("syncing a trained part", Calls.SYNC, "*/part-*.safetensors", errors=_STORAGE),
    Point("opening an entry", Calls.OPEN, "*/.entry.json*", errors=_NAMES),
    Point("writing an entry", Calls.WRITE, "*/.entry.json*", errors=_STORAGE),
    Point("syncing an entry", Calls.SYNC, "*/.entry.json*", errors=_STORAGE),
    Point("naming an entry", Calls.RENAME, "*/entry.json", errors=_NAMES),
    Point("keeping an update", Calls.RENAME, "*/outbox/[!.]*-[0-9]", errors=_NAMES),
    Point("syncing the outbox", Calls.SYNC, "*/outbox", errors=_STORAGE),
    Point("taking an update out", Calls.RENAME, "*/outbox/.done-*", errors=_NAMES),
    Point("deleting an update", Calls.UNLINK, "*/outbox/.done-*", errors=(errno.EIO, errno.EROFS)),
    Point("logging", Calls.WRITE, "<stderr>", upto=8, errors=_LOG),
    Point("anything that writes", Calls.all(), "*/device-*/*", upto=8, errors=_STORAGE),
)


def kinds() -> Iterator[Kind]:
    """Every kind of this module."""
    for point in SERVER_KILLS:
        yield Kind(f"coordinator killed: {point.name}", _kill("coordinator", point))
    for point in AGENT_KILLS:
        yield Kind(f"agent killed: {point.name}", _kill("", point))
    for point in SERVER_FAILURES:
        yield Kind(f"coordinator fails once: {point.name}", _fail("coordinator", point, lasting=False), times=1)
        yield Kind(f"coordinator fails for a while: {point.name}", _fail("coordinator", point, lasting=True))
    for point in AGENT_FAILURES:
        yield Kind(f"agent fails once: {point.name}", _fail("", point, lasting=False), times=1)
        yield Kind(f"agent fails for a while: {point.name}", _fail("", point, lasting=True), times=1)
    yield Kind("coordinator killed: at any time", _kill_any_time("coordinator"), times=4)
    yield Kind("coordinator killed: while it evaluates", _kill_evaluating, times=3)
    yield Kind("agent killed: at any time", _kill_any_time(""), times=4)
    yield Kind("everything killed at once", _kill_everything, times=2)
    for scene in ("die_before", "die_with_part", "die_after"):
        yield Kind(f"trainer killed: {scene}", _trainer_dies(scene), times=1)
    yield Kind("coordinator stopped and continued", _pause("coordinator"), times=2)
    yield Kind("agent stopped and continued", _pause(""), times=2)


def _kill(name: str, point: Point) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        first = scene.chance.randint(1, point.upto)
        rule = Rule(point.calls, point.path, point.action, SERVER if name else AGENT, first=first)
        inject(scene, name or scene.device(), rule, point.after)
        recover(scene)

    return play


def _fail(name: str, point: Point, *, lasting: bool) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        error, first = scene.chance.choice(point.errors), scene.chance.randint(1, point.upto)
        calls = scene.chance.choice((3, 0)) if lasting else 1
        seconds = scene.chance.uniform(1, 5) if not calls else 0.0
        program = "" if point.calls == Calls.all() else SERVER if name else AGENT
        rule = Rule(point.calls, point.path, Action.FAIL, program, error, first, calls)
        inject(scene, name or scene.device(), rule, point.after, seconds)
        recover(scene)

    return play


def _kill_any_time(name: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        time.sleep(scene.chance.uniform(0, 1.5))
        _killed(scene, name or scene.device())
        recover(scene)

    return play


def _kill_evaluating(scene: Scene) -> None:
    before = scene.federation.round()
    written = scene.federation.state / "weights"
    known = set(written.iterdir())
    scene.federation.wait_until(lambda: set(written.iterdir()) - known, 30, f"round {before} brings no weights")
    time.sleep(scene.chance.uniform(0, 0.2))
    _killed(scene, "coordinator")
    recover(scene)


def _kill_everything(scene: Scene) -> None:
    time.sleep(scene.chance.uniform(0, 1.0))
    for name in scene.federation.managed:
        _killed(scene, name)
    recover(scene)


def _killed(scene: Scene, name: str) -> None:
    if scene.federation.kill(name):
        scene.fired += 1
        scene.say(f"{name} killed in round {scene.federation.round()}")


def _trainer_dies(what: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        device = scene.device()
        trainings = scene.federation.folder / f"{device}.trainings"
        before = trainings.read_text().count(what)
        scene.federation.play(device, what)
        scene.federation.wait_until(lambda: trainings.read_text().count(what) > before, 30, f"{device} has no task")
        scene.federation.play(device, "")
        scene.fired += 1
        recover(scene)

    return play


def _pause(name: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        who = name or scene.device()
        seconds = scene.chance.uniform(1, 7)  # a lease is 4 s
        if scene.federation.kill(who, signal.SIGSTOP):
            scene.fired += 1
            scene.say(f"{who} stopped for {seconds:.1f} s")
            time.sleep(seconds)
            scene.federation.kill(who, signal.SIGCONT)
        recover(scene)

    return play
