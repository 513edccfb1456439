"""State that is damaged, lost, stale or copied, and logs that nobody reads any more."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from benchmarks.faults.evidence import entries, told
from benchmarks.faults.scenario import LIMIT_S, Kind, Scene, recover
from coordinator.cli import read_record
from fedepth.errors import ChildError
from fedepth.files import file_digest

SERVE_S = 15.0  # in which a coordinator has to say that it does not serve
_REMEDY = re.compile(r"restore|backup|rollback|put .* back|new --state|another --state|delete")
_CLONE = re.compile(r"instance|clone|copied|same identity|another agent", re.IGNORECASE)

Damage = Callable[[Scene, Path], str]


def kinds() -> Iterator[Kind]:
    """Every kind of this module."""
    for damage in (
        record_deleted,
        record_emptied,
        record_truncated,
        record_overwritten,
        record_stale,
        log_of_record_deleted,
        weights_deleted,
        weights_damaged,
    ):
        name = damage.__name__.replace("_", " ")
        yield Kind(f"damage: {name}", _refused(damage), shared=False, rounds=8)
    yield Kind("damage: a part flips before the average", _part_flips, shared=False, times=3)
    yield Kind("damage: a device's files", _device_files, times=4)
    yield Kind("a cloned device", _clone, shared=False, times=3, rounds=20)
    yield Kind("the log's reader is gone: coordinator", _reader_gone("coordinator"), shared=False, rounds=10)
    yield Kind("the log's reader is gone: agent", _reader_gone(""), shared=False, rounds=10)
    exporting = {"export": 1}
    yield Kind("coordinator killed: while it exports", _kill_exporting, shared=False, times=3, rounds=3, job=exporting)
    yield Kind("model worker killed: while it exports", _worker_exporting, shared=False, rounds=3, job=exporting)
    yield Kind("model worker killed: at any time", _worker_killed, times=2)


def record_deleted(scene: Scene, state: Path) -> str:
    for path in state.glob("job.sqlite*"):
        path.unlink()
    return "job.sqlite deleted"


def record_emptied(scene: Scene, state: Path) -> str:
    for path in state.glob("job.sqlite-*"):
        path.unlink()
    (state / "job.sqlite").write_bytes(b"")
    return "job.sqlite emptied"


def record_truncated(scene: Scene, state: Path) -> str:
    for path in state.glob("job.sqlite-*"):
        path.unlink()
    path = state / "job.sqlite"
    size = scene.chance.randrange(1, path.stat().st_size)
    os.truncate(path, size)
    return f"job.sqlite cut to {size} bytes"


def record_overwritten(scene: Scene, state: Path) -> str:
    path = state / "job.sqlite"
    data = bytearray(path.read_bytes())
    begin = scene.chance.randrange(0, max(1, len(data) - 4096))
    data[begin : begin + 4096] = scene.chance.randbytes(min(4096, len(data) - begin))
    path.write_bytes(data)
    for other in state.glob("job.sqlite-*"):
        other.unlink()
    return f"job.sqlite overwritten from byte {begin} on"


def record_stale(scene: Scene, state: Path) -> str:
    old = scene.federation.folder / "old.sqlite"
    for path in state.glob("job.sqlite*"):
        path.unlink()
    shutil.copyfile(old, state / "job.sqlite")
    return "job.sqlite restored from before the last rounds, without its WAL"


def log_of_record_deleted(scene: Scene, state: Path) -> str:
    for path in state.glob("job.sqlite-*"):
        path.unlink()
    return "the WAL of job.sqlite deleted after a kill"


def weights_deleted(scene: Scene, state: Path) -> str:
    newest = _newest_weights(state)
    newest.unlink()
    return f"{newest.name} deleted"


def weights_damaged(scene: Scene, state: Path) -> str:
    newest = _newest_weights(state)
    flip(newest, scene.chance.randrange(newest.stat().st_size))
    return f"a bit of {newest.name} flipped"


def flip(path: Path, position: int) -> None:
    """Flips a bit in a file that takes the place of the old one, whose other names keep the old bytes."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    partial = path.with_name(f"{path.name}.flipped")
    partial.write_bytes(data)
    partial.replace(path)


def _newest_weights(state: Path) -> Path:
    return max(state.glob("weights/round-*.safetensors"), key=lambda path: path.name)


def _refused(damage: Damage) -> Callable[[Scene], None]:
    """A damaged state is not served, and nothing in it changes; put back, the job goes on."""

    def play(scene: Scene) -> None:
        federation = scene.federation
        federation.wait_rounds(2, LIMIT_S)
        shutil.copyfile(federation.state / "job.sqlite", federation.folder / "old.sqlite")
        federation.wait_rounds(4, LIMIT_S)
        federation.hold("coordinator")
        for device in federation.devices:
            federation.kill(device, signal.SIGSTOP)
        if damage is log_of_record_deleted or scene.chance.random() < 0.5:
            federation.kill("coordinator")
        federation.end("coordinator")
        backup = federation.folder / "backup"
        shutil.copytree(federation.state, backup)
        scene.say(damage(scene, federation.state))
        scene.fired += 1
        before = _weights(federation.state)
        if _is_whole(federation.state, backup):
            scene.say("which lost nothing")
        else:
            _must_refuse(scene)
        after = _weights(federation.state)
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        if changed:
            scene.fail(f"weights were overwritten or deleted on a damaged state: {', '.join(changed)}")
        shutil.rmtree(federation.state)
        shutil.copytree(backup, federation.state)
        for device in federation.devices:
            federation.kill(device, signal.SIGCONT)
        federation.release("coordinator")
        recover(scene)

    return play


def _is_whole(state: Path, backup: Path) -> bool:
    """Whether a WAL that is gone had nothing in it that the file does not have."""
    if not (state / "job.sqlite").exists() or file_digest(state / "job.sqlite") != file_digest(backup / "job.sqlite"):
        return False
    if _weights(state) != _weights(backup):
        return False
    return msgspec.json.encode(read_record(state)) == msgspec.json.encode(read_record(backup))


def _must_refuse(scene: Scene) -> None:
    managed = scene.federation.managed["coordinator"]
    # Without the library: what this process says is read here, and not by the judge.
    variables = {key: value for key, value in managed.environment.items() if not key.startswith("FAULTS_")}
    process = subprocess.Popen(
        managed.argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
    )
    try:
        said, _ = process.communicate(timeout=SERVE_S)
    except subprocess.TimeoutExpired:
        status = scene.federation.status()
        what = f"is served, at round {status.round}" if status else f"is not refused in {SERVE_S:g} s"
        scene.fail(f"a damaged state {what}: {scene.said[-1]}")
        process.kill()
        process.communicate()
        return
    if process.returncode != 1 or "fedepth-coordinator: " not in said or "Traceback" in said:
        scene.fail(f"a damaged state ends the coordinator with status {process.returncode}: {said[-400:]}")
    elif not _REMEDY.search(said):
        scene.fail(f"the refusal does not say how to recover: {said[-400:]}")


def _weights(state: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in state.glob("weights/round-*.safetensors")}


def _part_flips(scene: Scene) -> None:
    federation = scene.federation
    federation.wait_rounds(1, LIMIT_S)
    first, *others = scene.chance.sample(federation.devices, 3)
    for device in others:
        federation.kill(device, signal.SIGSTOP)
    known = {each.task for each in told(federation, first)}

    def waiting() -> list[Path]:
        new = {each.task for each in told(federation, first) if each.accepted} - known
        return [path for task in new for path in federation.state.glob(f"spool/{task}-*/part-*.safetensors")]

    try:
        federation.wait_until(waiting, 30, "no accepted update waits for the average")
        path = waiting()[0]
        flip(path, scene.chance.randrange(path.stat().st_size // 2, path.stat().st_size))
        scene.excused.add(path.parent.name.rpartition("-")[0])
        scene.fired += 1
        scene.say(f"a bit of {path.parent.name}/{path.name} flipped")
    finally:
        for device in others:
            federation.kill(device, signal.SIGCONT)
    recover(scene)


def _device_files(scene: Scene) -> None:
    federation = scene.federation
    device = scene.device()
    pattern = ("weights/*.safetensors", "graphs/*.json", "start.json", "outbox/*/entry.json")[scene.seed % 4]
    federation.end(device)
    found = sorted((federation.folder / device).glob(pattern))
    for path in found:
        flip(path, scene.chance.randrange(path.stat().st_size))
    scene.fired += bool(found)
    scene.say(f"{device}: a bit of {len(found)} files {pattern} flipped")
    federation.release(device)
    recover(scene)


def _clone(scene: Scene) -> None:
    federation = scene.federation
    federation.wait_rounds(1, LIMIT_S)
    federation.end("device-0")
    shutil.copytree(federation.folder / "device-0", federation.folder / "device-0-copy")
    federation.add_device("device-0-copy", 3)
    federation.release("device-0")
    scene.fired += 1
    scene.say("device-0's state copied, both started")
    recover(scene, rounds=4)
    names = ("coordinator", "device-0", "device-0-copy")
    if not any(_CLONE.search(str(entry)) for name in names for entry in entries(federation.journal(name))):
        scene.fail("two agents ran with one identity, and nobody said so")


def _reader_gone(name: str) -> Callable[[Scene], None]:
    def play(scene: Scene) -> None:
        federation = scene.federation
        who = name or scene.device()
        federation.end(who)
        reading, writing = os.pipe()
        cat = subprocess.Popen(["cat"], stdin=reading, stdout=subprocess.DEVNULL)
        os.close(reading)
        federation.managed[who].stderr = writing
        federation.release(who)
        recover(scene)
        cat.kill()
        cat.wait()
        scene.fired += 1
        scene.say(f"the reader of the log of {who} killed")
        recover(scene, rounds=3)
        os.close(writing)
        federation.managed[who].stderr = -1

    return play


def _kill_exporting(scene: Scene) -> None:
    federation = scene.federation
    number = scene.chance.randint(1, 3)
    journal = federation.journal("coordinator")
    federation.wait_until(
        lambda: any(e.get("event") == "evaluated" and e.get("round") == number for e in entries(journal)),
        LIMIT_S,
        f"round {number} is not evaluated",
    )
    time.sleep(scene.chance.uniform(0, 2.5))
    if federation.kill("coordinator"):
        scene.fired += 1
        scene.say(f"coordinator killed while it exports round {number}")
    _all_exported(scene)


def _worker_exporting(scene: Scene) -> None:
    federation = scene.federation
    journal = federation.journal("coordinator")
    federation.wait_until(
        lambda: any(e.get("event") == "evaluated" and e.get("round") == 1 for e in entries(journal)),
        LIMIT_S,
        "round 1 is not evaluated",
    )
    time.sleep(scene.chance.uniform(0, 1.5))
    if pid := federation.child("coordinator", "model_worker"):
        os.kill(pid, signal.SIGKILL)
        scene.fired += 1
        scene.say("model worker killed while it exports round 1")
    _all_exported(scene)


def _all_exported(scene: Scene) -> None:
    federation = scene.federation
    federation.wait_until(lambda: federation.finished, 2 * LIMIT_S, "the job does not end")
    for each in federation.record()["rounds"][1:]:
        if each["accuracy"] is None:
            scene.fail(f"the accuracy of round {each['round']} was never made")
        if not each["export_path"] or not Path(each["export_path"]).is_file():
            scene.fail(f"the ONNX file of round {each['round']} was never made")


def _worker_killed(scene: Scene) -> None:
    pid = scene.federation.child("coordinator", "model_worker")
    if not pid:
        raise ChildError("the coordinator has no model worker")
    time.sleep(scene.chance.uniform(0, 0.5))
    os.kill(pid, signal.SIGKILL)
    scene.fired += 1
    recover(scene)
