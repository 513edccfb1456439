"""Runs scenarios: some share a federation, one after the other; the rest have one each. Results are kept at once."""

from __future__ import annotations

import json
import queue
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.faults.catalogue import Planned
from benchmarks.faults.evidence import tracebacks
from benchmarks.faults.federation import Federation
from benchmarks.faults.judge import Judge, Verdict
from benchmarks.faults.outside import NotHereError
from benchmarks.faults.report import summed, write
from benchmarks.faults.scenario import LIMIT_S, Scene
from benchmarks.faults.workplace import Workplace, make_workplace
from fedepth.errors import ChildError, FedepthError

BATCH = 8  # scenarios that share a federation
ENDLESS = 1_000_000
FINISH_S = 90.0  # for the last rounds, the last evaluation and the export


def run_all(
    plan: Sequence[Planned],
    results: Path,
    console: Console,
    *,
    parallel: int = 2,
    keep: Path | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Plays every scenario that `results` does not hold yet, and returns all figures.

    Args:
        keep: gets the folders of federations in which something failed.
        again: also play those that `results` holds.
    """
    held: dict[str, Any] = json.loads(results.read_text())["scenarios"] if results.exists() else {}
    todo = [each for each in plan if again or str(each.seed) not in held]
    console.print(f"{len(todo)} scenarios to play, {len(held)} in {results}")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        place = make_workplace(Path(name))
        _Runner(place, results, held, console, keep).run(_batches(todo, parallel), parallel)
    return summed(held)


def _batches(plan: Sequence[Planned], parallel: int) -> list[list[Planned]]:
    shared = [each for each in plan if each.kind.shared]
    size = max(1, min(BATCH, -(-len(shared) // parallel)))
    batches = [shared[begin : begin + size] for begin in range(0, len(shared), size)]
    return batches + [[each] for each in plan if not each.kind.shared]


class _Runner:
    def __init__(
        self, place: Workplace, results: Path, held: dict[str, Any], console: Console, keep: Path | None
    ) -> None:
        self._place, self._results, self._held, self._console, self._keep = place, results, held, console, keep
        self._lock = threading.Lock()
        self._running: list[Federation] = []
        self._stopped = False

    def run(self, batches: Sequence[list[Planned]], parallel: int) -> None:
        waiting: queue.SimpleQueue[list[Planned]] = queue.SimpleQueue()
        for batch in batches:
            waiting.put(batch)

        def work() -> None:
            while not self._stopped:
                try:
                    batch = waiting.get_nowait()
                except queue.Empty:
                    return
                while batch and not self._stopped:
                    batch = self._play_batch(batch)

        threads = [threading.Thread(target=work) for _ in range(parallel)]
        for thread in threads:
            thread.start()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        except BaseException:
            self._stopped = True
            for federation in list(self._running):
                federation.close()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def _play_batch(self, batch: list[Planned]) -> list[Planned]:
        """Plays a batch in a federation; what is left when that has become useless is returned."""
        kind = batch[0].kind
        folder = self._place.folder / f"federation-{batch[0].seed}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            federation = Federation(
                self._place,
                folder,
                rounds=ENDLESS if kind.shared else kind.rounds,
                job=kind.job,
                real_trainers=kind.real_trainers,
                outside=kind.outside(),
            )
        except NotHereError as error:
            for each in batch:
                self._note(each.seed, kind.name, {"said": [f"skipped: {error}"], "failures": []})
            return []
        self._running.append(federation)
        judge, marks = Judge(federation), dict[str, int]()
        starts: list[tuple[float, int]] = []
        failed = False
        try:
            federation.start()
            if kind.shared:
                federation.wait_rounds(1, FINISH_S)
            while batch and not self._stopped:
                each = batch.pop(0)
                starts.append((time.time(), each.seed))
                last = not each.kind.shared or not batch
                entry = self._play(each, federation, judge, marks, last=last)
                failed = failed or bool(entry["failures"])
                if entry["stuck"]:
                    break
            self._count_rest(judge, starts)
        except FedepthError as error:  # a federation that does not even start, or whose record cannot be read
            failed = True
            seed = starts[-1][1] if starts else batch.pop(0).seed
            self._note(seed, kind.name, {"failures": [f"the federation failed: {error}"[:600]], "stuck": 1})
        finally:
            self._running.remove(federation)
            federation.close()
            if failed and self._keep is not None:
                shutil.copytree(folder, self._keep / folder.name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(folder, ignore_errors=True)
        return batch

    def _play(
        self, each: Planned, federation: Federation, judge: Judge, marks: dict[str, int], *, last: bool
    ) -> dict[str, Any]:
        begun = time.monotonic()
        scene = Scene(each.seed, each.kind.name, federation, random.Random(each.seed))
        stuck = False
        try:
            each.kind.play(scene)
            if last and each.kind.ends:
                _finish(federation, endless=each.kind.shared)
        except ChildError as error:
            stuck = True
            scene.fail(str(error))
        except Exception as error:  # noqa: BLE001 - one scenario that is wrong must not end the run
            scene.fail(f"the scenario itself failed: {type(error).__name__}: {error}, {traceback.format_exc()[-300:]}")
        judge.excused |= scene.excused
        verdict = Verdict()
        try:
            verdict = judge.look()
        except FedepthError as error:
            stuck = True
            verdict.failures.append(str(error))
        verdict.unexpected += tracebacks(federation, marks)
        verdict.unexpected = [what for what in verdict.unexpected if not any(part in what for part in scene.unexpected)]
        entry = {
            "fired": scene.fired,
            "said": scene.said,
            "seconds": round(time.monotonic() - begun, 1),
            "stuck": int(stuck),
            "lost": verdict.lost,
            "doubled": verdict.doubled,
            "discarded": verdict.discarded,
            "unexpected": verdict.unexpected,
            "compared": verdict.compared,
            "equal": verdict.equal,
            "wasted": [],
            "failures": [
                *scene.failures,
                *verdict.failures,
                *verdict.lost,
                *verdict.doubled,
                *verdict.discarded,
                *verdict.unexpected,
            ],
        }
        self._note(each.seed, each.kind.name, entry)
        return entry

    def _count_rest(self, judge: Judge, starts: Sequence[tuple[float, int]]) -> None:
        """Puts what only the end of a job shows to the scenario in whose time it began."""
        with self._lock:
            for name, found in (("wasted", judge.wasted()), ("failures", judge.unmade())):
                for at, what in found:
                    seed = next((seed for start, seed in reversed(starts) if start <= at), starts[0][1])
                    if str(seed) in self._held:
                        self._held[str(seed)].setdefault(name, []).append(what)
            write(self._results, self._held)

    def _note(self, seed: int, kind: str, entry: dict[str, Any]) -> None:
        if self._stopped:  # what came of it came of the interruption
            return
        with self._lock:
            self._held[str(seed)] = {"kind": kind, **entry}
            write(self._results, self._held)
            failures = entry["failures"]
            mark = "[red]failed[/red]" if failures else "ok" if entry.get("fired") else "[yellow]not fired[/yellow]"
            self._console.print(f"{len(self._held):4} seed {seed} {kind}: {mark}, {entry.get('seconds', 0)} s")
            for failure in failures[:4]:
                self._console.print(f"       {failure[:300]}", markup=False)


def _finish(federation: Federation, *, endless: bool) -> None:
    """Lets the job end by itself: after its rounds, or, where there is no end to them, after two more.

    Raises:
        ChildError: it does not end in time.
    """
    if endless and not federation.finished:
        federation.wait_until(lambda: federation.round() >= 0, LIMIT_S, "the coordinator does not answer")
        federation.end("coordinator")
        done = max(each["round"] for each in federation.record()["rounds"])
        federation.write_job(rounds=done + 2)
        federation.release("coordinator")
    federation.wait_until(lambda: federation.finished, FINISH_S, "the job does not end")
