"""A few of the faults of benchmarks.faults, and whether its means can be trusted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.faults.catalogue import planned
from benchmarks.faults.injection import Action, Calls, Control, Rule, compile_shim, environment
from benchmarks.faults.judge import Judge
from benchmarks.faults.report import summed
from benchmarks.faults.run import run_all
from benchmarks.soak import smallest
from fedepth.errors import FedepthError
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

PLAYED = (
    "coordinator killed: an update is committed and not acknowledged",
    "coordinator fails once: committing an update",
    "coordinator fails once: logging an accepted update",
    "agent killed: an update is in the outbox, which is not synced",
)
PROGRAM = """
import os, sys
for name in ("one", "two", "three"):
    try:
        with open(os.path.join(sys.argv[1], name + ".partial"), "w") as file:
            file.write("text")
        os.rename(file.name, os.path.join(sys.argv[1], name))
    except OSError as error:
        print(error.errno, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


def write_three(shim: Path, folder: Path, rule: Rule) -> tuple[subprocess.CompletedProcess[str], Control]:
    control = Control(folder / "control")
    control.arm(3, rule)
    variables = {**os.environ, **environment(shim, control, folder / "journal")}
    (folder / "out").mkdir()
    argv = [sys.executable, "-c", PROGRAM, str(folder / "out")]
    return subprocess.run(argv, env=variables, capture_output=True, text=True, timeout=60, check=False), control


def test_a_call_fails_as_often_as_it_should(shim: Path, tmp_path: Path) -> None:
    rule = Rule(Calls.WRITE, "*/out/*.partial", Action.FAIL, error=errno.ENOSPC, first=2, count=1)
    ended, control = write_three(shim, tmp_path, rule)
    assert ended.returncode == 0 and ended.stderr == f"{errno.ENOSPC}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "three", "two.partial"]
    assert (control.seen(3), control.fired(3)) == (4, 1)  # what could not be written is tried again as the file closes
    journal = (tmp_path / "journal").read_text()
    assert f"3 fail write {errno.ENOSPC} 2 {tmp_path}/out/two.partial" in journal and ended.stderr in journal


@pytest.mark.parametrize(
    ("action", "left"), [(Action.KILL_BEFORE, ["one", "two.partial"]), (Action.KILL_AFTER, ["one", "two"])]
)
def test_a_program_is_killed_before_or_after_a_call(
    shim: Path, tmp_path: Path, action: Action, left: list[str]
) -> None:
    ended, control = write_three(shim, tmp_path, Rule(Calls.RENAME, "*/out/*", action, first=2))
    assert ended.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left
    assert control.fired(3) == 1


def test_other_programs_and_paths_are_left_alone(shim: Path, tmp_path: Path) -> None:
    rule = Rule(Calls.all(), "*/out/*", Action.FAIL, program="another", error=errno.EIO, count=0)
    ended, control = write_three(shim, tmp_path, rule)
    assert ended.stderr == "" and control.seen(3) == 0


def test_without_a_compiler_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FedepthError, match="no cc, gcc or clang"):
        compile_shim(tmp_path)


class Told(SimpleNamespace):
    """A federation of one device, whose record is made up."""

    def journal(self, name: str) -> Path:
        return Path(self.folder) / f"{name}.journal"

    def record(self) -> dict[str, Any]:
        return {"rounds": [], "updates": [{"result": update} for update in self.updates]}


def federation(folder: Path, updates: list[dict[str, Any]]) -> Any:
    """A device that has trained a task twice and was told "accepted" for both attempts."""
    lines = []
    for attempt in (1, 2):
        lines += [
            json.dumps({"event": "update accepted", "task": "t-0001-0000", "round": 1}),
            f"@1.0 1 7 observe rename 0 {attempt} /d/outbox/.done-t-0001-0000-{attempt}",
        ]
    (folder / "device-0.journal").write_text("\n".join(lines) + "\n")
    said = {"task": "t-0001-0000", "device": "d", "time": 1.0}
    trainings = [{**said, "attempt": n, "event": what} for n in (1, 2) for what in ("begun", "done")]
    digests = {1: ["aa"], 2: ["bb"]}
    text = [json.dumps({**entry, "digests": digests[entry["attempt"]]}) for entry in trainings]
    (folder / "device-0.trainings").write_text("\n".join(text) + "\n")
    managed = {"device-0": SimpleNamespace(exits=[])}
    return Told(folder=folder, devices=["device-0"], managed=managed, updates=updates, real_trainers=False)


def recorded(attempt: int, digest: str, round_number: int = 1) -> dict[str, Any]:
    return {
        "task_id": "t-0001-0000",
        "attempt": attempt,
        "round": round_number,
        "device_id": "d",
        "parts": [{"part": 0, "digest": digest}],
    }


def test_the_judge_sees_what_is_lost_doubled_and_discarded(tmp_path: Path) -> None:
    none = Judge(federation(tmp_path, [])).look()
    assert len(none.lost) == 1 and "t-0001-0000 was acknowledged and is not in the record" in none.lost[0]
    first = Judge(federation(tmp_path, [recorded(1, "aa")])).look()
    assert first.lost == first.doubled == [] and len(first.discarded) == 1
    assert "attempt 2 of task t-0001-0000 was acknowledged, attempt 1 is recorded" in first.discarded[0]
    twice = Judge(federation(tmp_path, [recorded(1, "aa"), recorded(2, "bb")])).look()
    assert len(twice.doubled) == 2  # one task, and one device in one round


def test_the_judge_names_the_reason_of_a_wasted_training(tmp_path: Path) -> None:
    ((at, reason),) = Judge(federation(tmp_path, [recorded(1, "aa")])).wasted()
    assert at == 1.0 and reason == "device-0, task t-0001-0000: another training of the task is recorded"


def test_a_smallest_plan_covers_what_the_task_covers() -> None:
    stage = Stage(0, 5, 32, CachePlace.RAM, 32, PeakComponents(1, 1, 1, 1, 1, 1, 1))
    plan = smallest(Plan((stage,), (), Policy.PAPER, 100))
    assert plan.trained_units == (0,) and plan.untrained == (1, 2, 3, 4, 5) and not plan.trains_head


def test_figures_count_only_what_really_happened() -> None:
    entry = {"kind": "a", "fired": 1, "stuck": 0, "lost": [], "wasted": ["late"], "compared": 3, "equal": 2}
    result = summed({"101": entry, "102": {**entry, "fired": 0, "failures": ["it broke"]}})
    assert (result["faults"], result["by_kind"], result["lost_updates"]) == (1, {"a": 1}, 0)
    assert result["trainings_wasted"] == [{"seed": 101, "reason": "late"}, {"seed": 102, "reason": "late"}]
    assert result["bit_for_bit"] == {"compared": 6, "equal": 4}
    assert result["failures"] == [{"seed": 102, "kind": "a", "what": "it broke"}]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    firsts = {each.kind.name: each for each in reversed(planned())}
    results = tmp_path_factory.mktemp("faults") / "faults.json"
    return run_all([firsts[name] for name in PLAYED], results, Console(quiet=True), parallel=1)


def test_the_faults_really_happened(played: dict[str, Any]) -> None:
    assert played["by_kind"] == dict.fromkeys(sorted(PLAYED), 1)


def test_nothing_acknowledged_is_lost_counted_twice_or_discarded(played: dict[str, Any]) -> None:
    assert (played["lost_updates"], played["double_counted"], played["acknowledged_and_discarded"]) == (0, 0, 0)


def test_no_round_is_stuck_and_nothing_unexpected_is_logged(played: dict[str, Any]) -> None:
    assert played["failures"] == [] and played["stuck_rounds"] == 0


def test_every_average_is_that_of_the_recorded_updates(played: dict[str, Any]) -> None:
    assert played["bit_for_bit"]["equal"] == played["bit_for_bit"]["compared"] > len(PLAYED)
