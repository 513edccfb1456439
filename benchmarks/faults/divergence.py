"""Training that goes wrong: losses and weights that are no numbers, models that collapse, trainers that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.faults.evidence import entries
from benchmarks.faults.federation import RETENTION
from benchmarks.faults.scenario import LIMIT_S, Kind, Scene, recover

GIVE_UP_S = 90.0  # in which a job that can only diverge has to say so and stop
LEARNED = 0.35  # an accuracy from which a fall to chance, 0.1, is a collapse
MOST_TRIES = 2  # of a task that fails in the same way, per device and round


def kinds() -> Iterator[Kind]:
    """Every kind of this module."""
    for what in ("nan_loss", "nan_update"):
        yield Kind(f"one device: {what}", _misbehave(what, everyone=False))
        yield Kind(f"every device: {what}", _misbehave(what, everyone=True), times=1)
    yield Kind("every device: huge", _pause, shared=False, rounds=12, ends=False)
    yield Kind("every device: zero", _misbehave("zero", everyone=True), shared=False, rounds=12)
    yield Kind("one device: huge", _misbehave("huge", everyone=False), shared=False, rounds=12)
    yield Kind("one device: babble", _misbehave("babble", everyone=False), times=1)
    steep = {"rate": 1e6, "epochs": 10}
    yield Kind("a learning rate of 1e6", _diverge, False, times=1, ends=False, real_trainers=True, job=steep)
    yield Kind("trainer killed", _trainer_signal(signal.SIGKILL), shared=False, rounds=4, real_trainers=True)
    yield Kind("trainer stopped", _trainer_signal(signal.SIGSTOP), shared=False, times=1, rounds=4, real_trainers=True)


def collapse() -> Kind:
    """A kind of its own, the last of all, so that the others keep their seeds."""
    return Kind(
        "a model that collapses",
        _collapse,
        shared=False,
        rounds=1_000_000,
        ends=False,
        real_trainers=True,
        job={"epochs": 5, "extra": f"{RETENTION}[guard]\nlargest_drop = 0.15\npause_after = 100\n"},
    )


def _misbehave(what: str, *, everyone: bool) -> Callable[[Scene], None]:
    """Devices do something else for a round or two, and then train well again."""

    def play(scene: Scene) -> None:
        federation = scene.federation
        devices = federation.devices if everyone else [scene.device()]
        for device in devices:
            federation.play(device, what)
        name = f'"scene": "{what}"'
        for device in devices:
            path = federation.folder / f"{device}.trainings"
            before = path.read_text().count(name) if path.exists() else 0
            federation.wait_until(
                lambda path=path, before=before: path.exists() and path.read_text().count(name) > before,
                LIMIT_S,
                f"{device} has no task",
            )
        scene.fired += 1
        scene.say(f"{', '.join(devices)}: {what}")
        time.sleep(scene.chance.uniform(0.2, 1.5))
        for device in devices:
            federation.play(device, "")
        recover(scene, rounds=3)
        for each in federation.record()["rounds"]:
            if each["published"] and each["round"] and each["loss"] is None:
                scene.fail(f"round {each['round']} was published with the loss {each['loss']}")

    return play


def _pause(scene: Scene) -> None:
    """No model of three rounds in a row gives a finite loss: the last good one stays, and the job waits."""
    federation = scene.federation
    federation.wait_rounds(1, LIMIT_S)
    for device in federation.devices:
        federation.play(device, "huge")
    scene.fired += 1

    def paused() -> bool:
        status = federation.status()
        return status is not None and status.phase == "paused"

    federation.wait_until(paused, 2 * LIMIT_S, "a job none of whose models is sound is not paused")
    status = federation.status()
    assert status is not None
    good = [each for each in federation.record()["rounds"] if each["published"]][-1]
    if status.weights_digest != good["digest"]:
        scene.fail(f"the weights in force are not those of round {good['round']}, the last that was published")
    if "rollback" not in status.message:
        scene.fail(f"a paused job says {status.message!r}, and not what to do")


def _collapse(scene: Scene) -> None:
    """The average of a round is far worse than the model before it: that one stays, and the job goes on from it."""
    federation = scene.federation

    def learned() -> bool:
        status = federation.status()
        return status is not None and status.accuracy >= LEARNED

    federation.wait_until(learned, 4 * LIMIT_S, f"the model does not reach an accuracy of {LEARNED:g}")
    for device in federation.devices:
        federation.end(device)
        federation.replace_trainer(device)
        federation.play(device, "zero")
        federation.release(device)
    scene.fired += 1

    def refused() -> list[dict[str, Any]]:
        return [each for each in federation.record()["rounds"] if not each["published"]]

    federation.wait_until(refused, 2 * LIMIT_S, "no collapsed model was kept back")
    for device in federation.devices:
        federation.play(device, "")
    recover(scene, rounds=3)
    first = refused()[0]
    scene.say(f"round {first['round']} was not published: {first['note']}")
    if "largest_drop" not in first["note"] or not first["aside_digest"]:
        scene.fail(f"a collapsed model is kept back without its reason or its file: {first['note']}")
    rounds = {each["round"]: each for each in federation.record()["rounds"]}
    if first["digest"] != rounds[first["round"] - 1]["digest"]:
        scene.fail("the weights in force are not those of the round before the collapse")
    told = [each for each in entries(federation.journal("coordinator")) if each.get("event") == "not_published"]
    if not any(each.get("round") == first["round"] and len(each.get("devices", ())) >= 2 for each in told):
        scene.fail("the log does not say which devices took part in the round that was kept back")
    if not rounds[max(rounds)]["published"]:
        scene.fail("no model was published after the collapse")


def _diverge(scene: Scene) -> None:
    """Every device finds the same, so that the job ends, or waits for its operator, with a message."""
    federation = scene.federation
    scene.fired += 1
    end = time.monotonic() + GIVE_UP_S
    over = False
    while not over and time.monotonic() < end:
        status = federation.status()
        over = status is not None and status.phase not in ("gathering", "training", "aggregating")
        over = over or bool(federation.managed["coordinator"].exits)
        time.sleep(0.2)
    said = [str(entry) for name in federation.devices for entry in entries(federation.journal(name))]
    if not any("not finite" in line and "learning" in line for line in said):
        scene.fail("no device says that its loss is not finite and that the learning rate is to be lowered")
    if not over:
        scene.fail(f"a job that can only diverge still goes on after {GIVE_UP_S:.0f} s")
    for name in federation.devices:
        tries = sum(entry.get("event") == "task received" for entry in entries(federation.journal(name)))
        if tries > MOST_TRIES:
            scene.fail(f"{name} tried {tries} times what fails in the same way each time")


def _trainer_signal(how: signal.Signals) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        federation = scene.federation
        device = scene.device()
        federation.wait_until(
            lambda: any(entry.get("event") == "task received" for entry in entries(federation.journal(device))),
            2 * LIMIT_S,
            f"{device} has no task",
        )
        federation.wait_until(lambda: federation.child(device, "trainer"), LIMIT_S, f"{device} has no trainer")
        time.sleep(scene.chance.uniform(0, 2))
        pid = federation.child(device, "trainer")
        if pid:
            os.kill(pid, how)
            scene.fired += 1
            scene.say(f"{device}: its trainer got {how.name}")
        if how is signal.SIGSTOP:
            time.sleep(scene.chance.uniform(3, 8))
            if federation.child(device, "trainer") == pid:
                os.kill(pid, signal.SIGCONT)
        recover(scene)

    return play
