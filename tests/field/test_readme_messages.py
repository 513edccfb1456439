"""The README's part "When something goes wrong" says what the programs say.

A sentence in quotes there has to be one that a message of ours makes; "…" stands for any text. Every other row names
words of the code that make it true, in WORDS: a new row without an entry fails.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAST_LITERAL = 12  # characters that a message has to bring itself
LEAST_SHARE = 0.3  # of the sentence

# What a row begins with, and words in a message, a log line or an option that it is about.
WORDS = {
    "the coordinator cannot be reached": "coordinator cannot be reached; retrying until it answers",
    "the coordinator has moved": "grpc.dns_min_time_between_resolutions_ms",
    "the coordinator cannot listen": "cannot listen on ",
    "the coordinator comes back": "coordinator is back",
    "the coordinator is busy": "coordinator is busy; retrying until it is not",
    "the device's disk is full": "asking for no task: what is trained could not be stored",
    "a task is offered again": "this task is trained already; delivering its update instead of training again",
    "the coordinator neither takes nor refuses": "set aside",
    "there is nothing to train on": " holds no images: expected are folders, one for each class, with files ",
    "files in the data are not images": "left out of the training data",
    "image files are damaged": " cannot be read as an image: ",
    "a device lacks some of the classes": "this device has no samples of some classes of the job",
    "IDX labels start at 1": "; the labels here start at ",
    "free memory shrinks during a task": "planning smaller from now on",
    "a plan needs more than predicted": "rehears",
    "no smaller plan would save that much": "the smallest plan",
    "other processes take memory": "waiting for memory",
    "the trainer is killed": "trainer",
    "a device dies": "no sign of life within its lease",
    "an update is damaged": "holds values that are not finite numbers",
    "an update goes much further": "norm",
    "the new model is not sound": "is not published",
    "a round has to be taken back": "is the last one again",
    "every device fails in the same way": "; fix the job file and start it again",
    "two devices have one identity": "to join as a new device",
    "a device reports more than can be": "samples, the job allows",
    "the state cannot be read or written": "the record cannot be read",
    "a program is stopped": "ended by SIGHUP, Ctrl-C, a closed pipe, SIGTERM",
    "fedepth has a bug": "this is a bug in fedepth: ",
    "the log cannot be written": "lines_lost",
    "a device has no certificate": "this device has no certificate (",
    "a certificate comes to its end": "the coordinator's certificate is renewed",
    "a certificate has expired": " was revoked; ",
    "one side wants TLS": "it speaks plain text, and this side wants TLS; ",
    "the coordinator stops": "To resume after a stop or a crash, run it again with the same --state.",
}


def rows() -> list[tuple[str, str]]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.split("## When something goes wrong\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [(what, " | ".join(rest)) for what, *rest in cells[1:]]


@cache
def texts() -> tuple[tuple[str, ...], ...]:
    """The string literals of the programs, as their fixed parts; between two of them anything may stand."""
    found = []
    for package in ("fedepth", "coordinator", "edge_client", "proto/fedepth_wire"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                    found.append(tuple("" if part is None else str(part) for part in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append((node.value,))
    return tuple(found)


def quotes(text: str) -> list[str]:
    """Sentences in quotes."""
    return re.findall(r'"([^"]+)"', text)


def is_said(sentence: str) -> bool:
    """Whether a message of ours says the sentence, or brings so much of it that it is no other's.

    Messages are put together: what comes after a placeholder may be another message, so its beginning is enough.
    """
    wanted = sentence.replace("…", "")
    for parts in texts():
        if any(wanted in part for part in parts):
            return True
        for end in range(len(parts), 1, -1):
            literal = sum(map(len, parts[:end]))
            pattern = "".join(re.escape(part) if part else ".*?" for part in parts[:end])
            if literal >= max(LEAST_SHARE * len(wanted), LEAST_LITERAL) and re.search(pattern, wanted):
                return True
    return False


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_a_row_says_what_the_programs_say(row: tuple[str, str]) -> None:
    what, happens = row
    said = quotes(happens)
    words = next((words for start, words in WORDS.items() if what.startswith(start)), None)
    assert said or words, f"name in WORDS what makes this row true: {what}"
    for sentence in said:
        assert is_said(sentence), f"no message says: {sentence}"
    if words:
        assert any(words in part for parts in texts() for part in parts), words


def test_no_entry_is_without_a_row() -> None:
    assert [start for start in WORDS if not any(what.startswith(start) for what, _ in rows())] == []


def test_a_sentence_that_nobody_says_is_found_out() -> None:
    assert not is_said("the coordinator has been eaten by a bear")
    assert is_said("loss is not finite after step 7 at learning rate 1000; lower training.learning_rate")
