"""The three command lines look alike: help with examples, exit statuses, versions, JSON, completion, log lines.

A new event of the coordinator is a line in SENTENCES; a new command has to fit without one.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from coordinator.cli import describe
from coordinator.observe import logs as coordinator_logs
from coordinator.observe.words import EVENTS, in_words
from fedepth import __version__
from fedepth.logs import configure_logs, renderer
from fedepth.program import STATUSES
from fedepth.task import Outcome
from tests.field.command_pages import PROGRAMS, commands, example_lines, page

COMMANDS = [(program, name) for program in PROGRAMS for name in commands(program)]
WITHOUT_RESULT = {("fedepth-coordinator", "serve"), ("fedepth-client", "run")}
MIB = 1 << 20


def invoke(program: str, *arguments: str, **environment: str) -> Any:
    env = {"COLUMNS": "120", **environment}
    return CliRunner().invoke(PROGRAMS[program], list(arguments), env=env, prog_name=program)


def options(program: str, name: str) -> set[str]:
    return {option for each in commands(program)[name].params for option in each.opts} | {"--help", "-h"}


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_a_command_has_help_with_examples_that_can_be_typed(program: str, name: str) -> None:
    told = invoke(program, *name.split(), "--help")
    assert told.exit_code == 0
    assert invoke(program, *name.split(), "-h").stdout == told.stdout
    lines = example_lines(commands(program)[name])
    assert lines
    for line in lines:
        assert f"  Example: {line}\n" in told.stdout  # in one line, to be copied
        first, *rest = shlex.split(line)
        words = len(name.split())
        assert (first, " ".join(rest[:words])) == (program, name)
        assert {word for word in rest if word.startswith("-")} <= options(program, name)


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_what_shows_something_shows_it_as_json(program: str, name: str) -> None:
    assert ("--json" in options(program, name)) == ((program, name) not in WITHOUT_RESULT)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_a_program_tells_its_exit_statuses(program: str) -> None:
    shown = " ".join(invoke(program, "--help").stdout.split())
    assert STATUSES in shown
    for option in ("--version", "--show-completion", "--install-completion", "-h, --help"):
        assert option in shown
    assert invoke(program, "no-such-command").exit_code == 2
    assert invoke(program, "--no-such-option").exit_code == 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_is_told_without_loading_torch(program: str) -> None:
    line = invoke(program, "--version").stdout
    assert line.startswith(f"{program} {__version__}, Python {sys.version.split()[0]}")
    assert line.count("\n") == 1


def test_the_same_thing_has_the_same_option() -> None:
    """One name stands for a flag or for a value, wherever it is."""
    kinds: dict[str, set[bool]] = {}
    for program, name in COMMANDS:
        for each in commands(program)[name].params:
            for option in each.opts if each.param_type_name == "option" else ():
                kinds.setdefault(option, set()).add(bool(each.is_flag))
    assert {option: found for option, found in kinds.items() if len(found) > 1} == {}
    for program, name in WITHOUT_RESULT:
        assert {"--json-logs", "--exit-when-done", "--config", "--state"} <= options(program, name)


@pytest.mark.parametrize(
    ("program", "typed", "offered"),
    [
        ("fedepth", "pl", "plan"),
        ("fedepth-client", "cal", "calibrate"),
        ("fedepth-client", "run --da", "--data"),
        ("fedepth-coordinator", "roll", "rollback"),
        ("fedepth-coordinator", "serve --acc", "--accept-changes"),
    ],
)
def test_bash_completes_commands_and_options(program: str, typed: str, offered: str) -> None:
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = f"{program} {typed}"
    environment = {variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(typed.split()))}
    assert invoke(program, **environment).stdout.split() == [offered]


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_shown_for_completion_is_a_script_of_bash(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shellingham = pytest.importorskip("shellingham")
    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("bash", "/bin/bash"))
    script = invoke(program, "--show-completion").stdout
    told = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p {program}"], capture_output=True, text=True, check=True
    ).stdout
    assert "-F _" in told


def test_the_page_of_all_commands_is_what_the_programs_say() -> None:
    path = Path(__file__).parents[2] / "docs" / "commands.md"
    made = "run python -m tests.field.command_pages > docs/commands.md"
    assert path.read_text(encoding="utf-8") == page(), made


# --- events in words

FAILURE = {"device": "kitchen", "outcome": "over_budget", "message": "it is too large"}
SENTENCES: list[tuple[dict[str, Any], str]] = [
    (
        {
            "event": "device_seen",
            "device": "kitchen",
            "samples": 1200,
            "budget": 300 * MIB,
            "hardware": "Linux (x86_64)",
        },
        "kitchen is here: 1,200 samples, 300.0 MiB for training, Linux (x86_64)",
    ),
    (
        {"event": "cloned_identity", "device": "kitchen", "served": "garage", "refused": "attic"},
        "two devices have the identity of kitchen: the one on garage is served, the one on attic refused",
    ),
    ({"event": "device_rejected", "device": "kitchen", "message": "too small"}, "kitchen is rejected: too small"),
    ({"event": "round_started", "round": 3, "devices": ["kitchen", "garage"]}, "round 3 begins with kitchen, garage"),
    (
        {
            "event": "task_given",
            "round": 3,
            "device": "kitchen",
            "attempt": 2,
            "blocks": "0-3 | 4-9",
            "predicted_peak": 100 * MIB,
            "budget": 120 * MIB,
        },
        "round 3: kitchen is given a task, attempt 2: blocks 0-3 | 4-9, predicted peak 100.0 MiB of 120.0 MiB",
    ),
    ({"event": "progress", "device": "kitchen", "activity": "downloading"}, "kitchen: downloading"),
    (
        {
            **{"event": "progress", "device": "kitchen", "activity": "training", "stage": 0, "stage_count": 2},
            **{"first": 0, "last": 3, "epoch": 1, "epochs": 1, "loss": 2.31, "bytes_moved": 0},
        },
        "kitchen: training, stage 1 of 2, units 0-3, epoch 1 of 1, loss 2.3100",
    ),
    (
        {
            **{"event": "update_accepted", "round": 3, "device": "kitchen", "bytes": 42 * MIB, "samples": 1},
            "seconds": 61.25,
        },
        "round 3: the update of kitchen is accepted: 42.0 MiB, 1 sample, trained in 61.2 s",
    ),
    (
        {"event": "update_refused", "device": "kitchen", "reason": "shape", "message": "no"},
        "the update of kitchen is refused (shape): no",
    ),
    (
        {"event": "update_damaged", "round": 3, "device": "kitchen", "message": "no"},
        "round 3: the update of kitchen is damaged and left out: no",
    ),
    (
        {"event": "task_failed", **FAILURE, "needed_bytes": 3 * MIB, "budget_bytes": 2 * MIB},
        "the task of kitchen ended without an update, over_budget: it is too large (needed 3.0 MiB, had 2.0 MiB)",
    ),
    (
        {"event": "task_failed", **FAILURE, "outcome": Outcome.DATA},  # as the log has it
        "the task of kitchen ended without an update, data: it is too large",
    ),
    (
        {"event": "round_closed", "round": 3, "updates": 2, "samples": 2400},
        "round 3 is closed with 2 updates of 2,400 samples",
    ),
    (
        {"event": "not_published", "round": 3, "reason": "no loss", "devices": ["kitchen"]},
        "round 3 is not published: no loss; its devices were kitchen",
    ),
    ({"event": "evaluated", "round": 3, "accuracy": 0.875, "loss": 0.25}, "round 3: accuracy 87.50%, loss 0.2500"),
    (
        {"event": "exported", "round": 3, "path": "/x.onnx", "parity_max_abs": 8e-8, "samples": 256},
        "round 3 is exported to /x.onnx: largest difference 8.0e-08 over 256 samples",
    ),
    ({"event": "paused", "round": 3, "reason": "three in a row"}, "the job is paused after round 3: three in a row"),
    ({"event": "finished", "rounds": 10, "accuracy": 0.9}, "the job is finished after 10 rounds, accuracy 90.00%"),
    (
        {"event": "log", "message": "round 1: waiting for 1 more of 2 devices"},
        "round 1: waiting for 1 more of 2 devices",
    ),
    (
        {
            "event": "state",
            "job": "demo",
            "round": 1,
            "rounds": 4,
            "phase": "gathering",
            "devices": 1,
            "message": "wait",
        },
        "demo: round 1 of 4, gathering, 1 device; wait",
    ),
]


@pytest.mark.parametrize(("event", "sentence"), SENTENCES, ids=[sentence[:40] for _, sentence in SENTENCES])
def test_an_event_is_a_sentence(event: dict[str, Any], sentence: str) -> None:
    ids = {"device_id": "f" * 32, "task_id": "t-0003-0000", "time": 1.5}
    assert in_words({**event, **ids}) == sentence
    assert describe({**event, **ids}) == sentence


def test_every_event_that_is_sent_has_a_sentence() -> None:
    sent = set()
    for path in (Path(__file__).parents[2] / "coordinator").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        sent |= set(re.findall(r'events\.send\(\s*"(\w+)"', text)) | set(re.findall(r'encode_event\("(\w+)"', text))
    assert sent == EVENTS == {event["event"] for event, _ in SENTENCES}


@pytest.mark.parametrize("value", [None, -1, 10**400, float("nan"), "\x1b[2J\n", [], {}, ["a", 1], True])
def test_an_event_with_anything_in_it_is_one_line(value: Any) -> None:
    for event, _ in SENTENCES:
        for field in set(event) - {"event"}:
            said = describe({**event, field: value, "stages": []})
            assert said.isprintable(), (field, value)


# --- log lines


@pytest.fixture
def lines() -> Iterator[list[str]]:
    before = structlog.get_config()
    yield []
    structlog.configure(**before)


def test_both_sides_log_alike(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for render in (renderer(False), coordinator_logs.renderer(False)):
        configure_logs(render, lines.append)
        structlog.get_logger().info("serving", address="127.0.0.1:8970")
    (agent, coordinator) = (re.sub(r"^\S+", "TIME", line) for line in lines)
    assert agent == coordinator
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z \[info +\] serving +address=127\.0\.0\.1:8970$", lines[0])
    for render in (renderer(True), coordinator_logs.renderer(True)):
        configure_logs(render, lines.append)
        structlog.get_logger().info("round_closed", round=3, updates=2, samples=2400)
    assert [json.loads(line)["samples"] for line in lines[2:]] == [2400, 2400]


def test_the_log_of_the_coordinator_tells_events_in_words(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    configure_logs(coordinator_logs.renderer(False), lines.append)
    structlog.get_logger().info("round_closed", round=3, updates=2, samples=2400)
    assert lines[0].rstrip().endswith("round 3 is closed with 2 updates of 2,400 samples")
