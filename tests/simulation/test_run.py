"""Whole simulations: what decides on their results, and what does not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fedepth.aggregation.rules import Norms
from fedepth.errors import ConfigError, DataError, DiskError, JobError, StateError
from fedepth.simulation import setup
from fedepth.simulation.worker.protocol import Evaluate, Request, Train
from fedepth.task import ModelSpec
from tests.simulation.conftest import InProcess


class Interrupted(Exception):
    """What a test ends a run with."""


def test_the_number_of_workers_changes_nothing(lab: Any) -> None:
    job = lab.job()
    lines = lab.run(job, "one", engine=InProcess(1))
    lab.run(job, "three", engine=InProcess(3))
    assert lab.digests("one") == lab.digests("three")
    assert [line.round for line in lines] == [1, 2]
    assert lines[-1].updates == 3 and lines[-1].accuracy is not None
    assert lab.digests("one")[0] != lab.digests("one")[1]
    assert sorted(path.name for path in (lab.folder / "one" / "weights").iterdir()) == [
        f"round-000{number}.safetensors" for number in (0, 1, 2)
    ]
    assert list((lab.folder / "one" / "updates").iterdir()) == []


def test_another_seed_is_another_run(lab: Any) -> None:
    job = lab.job(rounds="1")
    lab.run(job, "one", seed=1)
    lab.run(job, "two", seed=2)
    assert lab.digests("one") != lab.digests("two")


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_was_interrupted_goes_on_to_the_same_end(lab: Any, seed: int) -> None:
    job = lab.job(rounds="3")
    lab.run(job, "whole")
    chance = random.Random(seed)
    left = 0

    def interrupt(_: Request) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Interrupted

    done = False
    while not done:
        left = chance.randint(2, 9)
        try:
            lab.run(job, "broken", engine=InProcess(2, interrupt))
            done = True
        except Interrupted:
            # What a kill may leave behind: a line that was cut short, an update without its result.
            if chance.random() < 0.5:
                with open(lab.folder / "broken" / "rounds.jsonl", "ab") as file:
                    file.write(b'{"round":')
    assert lab.digests("broken") == lab.digests("whole")


def test_what_is_trained_is_not_trained_again(lab: Any) -> None:
    job = lab.job(rounds="1")

    def interrupt(request: Request) -> None:
        if isinstance(request, Evaluate):
            raise Interrupted

    with pytest.raises(Interrupted):
        lab.run(job, engine=InProcess(1, interrupt))
    assert len(lab.engine.trained) == 3
    lab.run(job)
    assert lab.engine.trained == []


def test_a_finished_run_is_shown_again_and_another_one_is_refused(lab: Any) -> None:
    job = lab.job(rounds="1")
    lines = lab.run(job)
    assert lab.run(job) == lines and lab.engine.requests == []
    with pytest.raises(ConfigError, match="another simulation, with other clients, partition, seed;"):
        lab.run(job, clients=6, partition="dirichlet:0.3", seed=9)


@pytest.mark.parametrize(
    "sections",
    [
        "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 0.5",
        '[aggregation]\nrule = "krum"\nfaulty = 1',
        '[aggregation]\nrule = "trimmed-mean"\ntrim = 0.25',
        '[aggregation]\nrule = "median"',
        '[aggregation]\nrule = "norm-clipping"\nmax_change = 0.1',
    ],
)
def test_every_rule_can_be_repeated(lab: Any, sections: str) -> None:
    job = lab.job(rounds="1", devices_per_round="5", sections=sections)
    lab.run(job, "one")
    lab.run(job, "two", engine=InProcess(2))
    assert lab.digests("one") == lab.digests("two")


def test_a_client_with_one_sample_trains_and_one_with_none_is_left_out(lab: Any) -> None:
    partition = lab.folder / "mine.json"
    partition.write_text(
        '{"how": "by hand", "seed": 0, "samples": 1438, "clients": [{"id": "one", "samples": [5]}, '
        '{"id": "none", "samples": []}, {"id": "many", "samples": [1, 2, 3, 4]}]}'
    )
    job = lab.job(rounds="1", devices_per_round="2")
    (line,) = lab.run(job, partition=f"file:{partition}")
    assert {row.client: row.samples for row in line.clients} == {"one": 1, "many": 4}


def test_what_is_left_out_of_the_data_is_said(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/cat/notes.txt", "train/stray.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    said: list[str] = []
    setup._tell_left_out("--data", tmp_path, ModelSpec("m", ("cat",), (1, 8, 8), (0.5,), (0.5,)), "train", said.append)
    assert said == [
        "--data: left out of the folder .: 1 × image in no class folder: move it into one, such as stray.png",
        "--data: left out of the folder cat: 1 × not an image (.txt), such as cat/notes.txt",
    ]


def test_more_clients_than_samples_are_refused(lab: Any) -> None:
    with pytest.raises(DataError, match=r"1\d+ samples cannot give 2000 parts"):
        lab.run(lab.job(), clients=2000)


def test_an_update_that_goes_too_far_is_refused_and_the_round_closes_without_it(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedepth.simulation.run as module

    def update_norms(base: Path, parts: Any, parameters: Any) -> Norms:
        return Norms(9.0 if "-0005-" in str(parts[0]) else 0.01, 0.0)

    monkeypatch.setattr(module, "update_norms", update_norms)
    (line,) = lab.run(lab.job(rounds="1", devices_per_round="6", job="quorum = 3"))
    assert [row.end == "update" for row in line.clients] == [True] * 5 + [False]
    assert line.clients[5].end.startswith("refused: its parameters change by ")
    (line,) = lab.run(
        lab.job(rounds="1", devices_per_round="6", job="quorum = 3", sections="[guard]\nlearn_norms = false"), "any"
    )
    assert {row.end for row in line.clients} == {"update"}


def test_a_model_that_gives_no_finite_loss_is_kept_back_and_the_next_round_trained_from_the_one_before(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedepth.rounds.soundness import Evaluation
    from fedepth.simulation.run import Run

    true = Run._evaluate
    seen: list[int] = []

    async def evaluate(self: Run, new: Any) -> Any:
        found = await true(self, new)
        seen.append(new.round)
        return (Evaluation(0.1, float("nan")), "") if seen.count(1) == 1 and new.round == 1 else found

    job = lab.job(rounds="3", job="quorum = 2")
    monkeypatch.setattr(Run, "_evaluate", evaluate)
    lines = lab.run(job)
    assert [line.published for line in lines] == [False, True, True]
    assert lines[0].note == "its loss on the test data is not a finite number"
    assert lines[0].weights_round == 0 and lines[1].weights_round == 2
    # The second round was trained twice: from the weights that were not published, and from those before.
    second = [request for request in lab.engine.requests if isinstance(request, Train) and request.task.round == 2]
    assert len(second) == 6 and len({request.weights for request in second}) == 2


def test_a_full_disk_ends_the_run_with_a_sentence_and_it_goes_on_later(lab: Any) -> None:
    job = lab.job(rounds="1")

    def full(request: Request) -> None:
        if isinstance(request, Train):
            raise DiskError("no room")

    with pytest.raises(DiskError):
        lab.run(job, engine=InProcess(1, full))
    lab.run(job, "whole")
    lab.run(job)
    assert lab.digests() == lab.digests("whole")


def test_an_update_that_was_damaged_meanwhile_is_trained_again(lab: Any) -> None:
    job = lab.job(rounds="1")
    lab.run(job, "whole")

    def damage(request: Request) -> None:
        if isinstance(request, Train) and len(lab.engine.trained) == 3:
            part = next((lab.folder / "run" / "updates").rglob("part-0000.safetensors"))
            part.write_bytes(part.read_bytes()[:-4] + b"none")

    with pytest.raises(StateError, match="1 parts of updates are damaged, such as "):
        lab.run(job, engine=InProcess(1, damage))
    lab.run(job)
    assert len(lab.engine.trained) == 1 and lab.digests() == lab.digests("whole")


def test_nobody_who_can_train_is_told_with_the_reason(lab: Any) -> None:
    budgets = lab.folder / "reports.json"
    budgets.write_text('{"budget": {"budget_bytes": 1000}}')
    with pytest.raises(JobError, match="no client can train this job"):
        lab.run(lab.job(), budgets=budgets)


def test_a_trace_decides_who_is_late(lab: Any) -> None:
    trace = lab.folder / "trace.jsonl"
    trace.write_text(
        '{"client": "*", "images_per_second": 100}\n{"client": "client-001", "images_per_second": 0.01}\n'
        '{"round": 1, "clients": ["client-000", "client-001", "client-002"]}\n'
    )
    job = lab.job(rounds="1", job="round_deadline_s = 60\nquorum = 2")
    (line,) = lab.run(job, trace=trace)
    ends = {row.client: row.end for row in line.clients}
    assert ends["client-000"] == ends["client-002"] == "update"
    assert ends["client-001"] == "lost: the round closed without it"
    assert line.simulated_seconds == 60 and "client-001" not in lab.engine.trained
