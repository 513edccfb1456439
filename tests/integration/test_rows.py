"""Federations of real processes on rows of files: texts with hashed words, and a table with missing values."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lab import LabDevice, program, status_bytes

MIB = 1 << 20
HEAD = """\
[job]
name = "rows"
rounds = 2
devices_per_round = 2
quorum = 2
gather_s = 0.2
policy = "paper"

[model]
name = "{model}"
classes = ["sport", "trade"]

[training]
batch = 16
local_epochs = 4
optimizer = "adamw"
learning_rate = 0.002

[test]
data = "test.csv"
"""
TEXT = HEAD + '\n[text]\nlabel = "topic"\ntext = ["title", "body"]\nlength = 8\nvocabulary = 64\n'
TABLE = HEAD + (
    '\n[table]\nlabel = "topic"\nnumeric = ["goals", "price"]\nmean = [2.0, 50.0]\nstd = [2.0, 40.0]\n'
    'categorical = { place = ["stadium", "market"] }\n[export]\npreprocessing = true\n'
)
ASKED = TABLE.replace("mean = [2.0, 50.0]\nstd = [2.0, 40.0]\n", "")
WORDS = {"sport": ["match", "goal", "team", "won"], "trade": ["price", "shares", "bank", "sold"]}


def text_rows(rng: np.random.Generator, count: int) -> str:
    lines = ["topic,title,body"]
    for place in range(count):
        topic = ("sport", "trade")[place % 2]
        words = rng.choice([*WORDS[topic], "the", "a"], 5)
        lines.append(f'{topic},{words[0]},"{words[1]}, ""{words[2]}""\n{" ".join(words[3:])}"')
    return "\n".join(lines) + "\n"


def table_rows(rng: np.random.Generator, count: int) -> str:
    lines = ["id;topic;goals;price;place"]
    for place in range(count):
        sport = place % 2 == 0
        goals = rng.poisson(4 if sport else 0) if rng.random() < 0.9 else "NA"
        price = f"{rng.normal(20 if sport else 90, 10):.2f}" if rng.random() < 0.9 else ""
        where = rng.choice(["stadium", "pub"] if sport else ["market", "shop"])
        lines.append(f"{place};{'sport' if sport else 'trade'};{goals};{price};{where}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("model", "job", "make"),
    [("text-transformer", TEXT, text_rows), ("table-resnet", TABLE, table_rows), ("table-mlp", ASKED, table_rows)],
)
def test_two_devices_learn_from_rows_and_the_model_says_so_of_others(rig: Any, model: str, job: str, make: Any) -> None:
    rng = np.random.default_rng(4)
    (rig.folder / "job.toml").write_text(job.replace("{model}", model))
    (rig.folder / "test.csv").write_text(make(rng, 60))
    rig.lab.start_coordinator(rig.folder / "job.toml", "--exit-when-done")
    for number in (0, 1):
        data = rig.folder / f"device-{number}.csv"
        data.write_text(make(rng, 80) + "damaged\n")
        rig.lab.start_agent(LabDevice(f"device-{number}", data, 0), "--threads", "1", "--exit-when-done")
    rig.event("coordinator", "round_closed", round=1)
    for name in ("device-0", "device-1"):
        assert status_bytes(rig.lab.processes[name].pid, "VmRSS") <= 60 * MIB
    evaluated = rig.event("coordinator", "evaluated", round=2)
    exported = rig.event("coordinator", "exported")
    assert [rig.end(name) for name in ("coordinator", "device-0", "device-1")] == [0, 0, 0]
    assert evaluated["accuracy"] >= 0.9
    assert exported["parity_max_abs"] <= 1e-4
    assert exported["compared_on"] == "60 samples of the test data"
    assert "line 82: has 1 field" in rig.event("device-0", "damaged")["row"] or model == "text-transformer"
    seen = rig.event("coordinator", "round_closed", round=2)
    assert seen["samples"] == 160
    if job == ASKED:
        assert rig.event("coordinator", "statistics of columns")["devices"] == 2
        assert rig.event("device-1", "the job has asked what is in its columns")["job"] == "rows"

    rows = rig.folder / "others.csv"
    rows.write_text(make(rng, 40).replace("topic", "unknown"))
    argv = [program("fedepth"), "infer", exported["path"], str(rows), "--json"]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True, timeout=300).stdout)
    guessed = [row["classes"][0]["class"] for row in told["files"]]
    assert len(guessed) == 40
    assert np.mean([guess == ("sport", "trade")[place % 2] for place, guess in enumerate(guessed)]) >= 0.9
    assert Path(exported["path"]).with_name("labels.txt").read_text() == "sport\ntrade\n"
