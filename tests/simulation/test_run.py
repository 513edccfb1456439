"""Whole simulations: what decides on their results, and what does not."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from fedepth.aggregation.rules import Norms
from fedepth.data.column_sums import Statistics
from fedepth.errors import ConfigError, DataError, DiskError, DivergedError, JobError, PeerError, StateError
from fedepth.peers import Peers
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.residuals import Residuals
from fedepth.simulation import run, setup, simulate
from fedepth.simulation.setup import Options
from fedepth.simulation.worker import process
from fedepth.simulation.worker.protocol import Evaluate, Request, Train
from fedepth.task import ModelSpec, Result
from fedepth.training import session
from fedepth.training.session import Assignment
from fedepth.weights import load_numpy
from tests.simulation.conftest import InProcess, Lab


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


def test_options_with_a_mistake_can_be_corrected_in_the_same_folder(lab: Any) -> None:
    job = lab.job(rounds="1")
    with pytest.raises(ConfigError, match="alpha"):
        lab.run(job, partition="dirichlet:-1", clients=6)
    (lab.folder / "plans.json").write_bytes(msgspec.json.encode({"nobody": pinned((0, 5))}))
    with pytest.raises(ConfigError, match="there is no such client"):
        lab.run(job, seed=4, plans=lab.folder / "plans.json")
    lab.run(job)
    lab.run(job, "untouched")
    assert lab.digests() == lab.digests("untouched")


def test_a_folder_that_holds_somebodys_files_stays_as_it_is(lab: Any) -> None:
    mine = {"work/thesis.txt": "a", ".notes.tmp": "b", "sub/.draft.tmp": "c", "partition.json": "d"}
    for name, text in mine.items():
        (lab.folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (lab.folder / "mine" / name).write_text(text)
    with pytest.raises(
        ConfigError, match=r"is not the folder of a simulation: it holds \.notes\.tmp and 3 more, and no"
    ):
        lab.run(lab.job(rounds="1"), "mine")
    assert {name: (lab.folder / "mine" / name).read_text() for name in mine} == mine
    lines = lab.run(lab.job(rounds="1"))
    (lab.folder / "run" / ".mine.tmp").write_text("e")  # in a folder that is a run's
    (lab.folder / "run" / ".run.json.0123.tmp").write_text("of a crash")
    assert lab.run(lab.job(rounds="1")) == lines
    assert (lab.folder / "run" / ".mine.tmp").exists() and not (lab.folder / "run" / ".run.json.0123.tmp").exists()
    (lab.folder / "run" / "run.json").unlink()  # its rounds may be of anything
    with pytest.raises(ConfigError, match=r"and no run\.json"):
        lab.run(lab.job(rounds="1"))


@pytest.mark.parametrize("option", ["partition", "budgets"])
def test_what_a_run_is_given_is_not_its_own(lab: Any, option: str) -> None:
    lab.run(lab.job(rounds="1"))
    path = lab.folder / "run" / {"partition": "partition.json", "budgets": "tiers.json"}[option]
    before = path.read_bytes()
    given: Any = f"file:{path}" if option == "partition" else str(path)
    with pytest.raises(ConfigError, match=f"^--{option} .* belongs to the run in --output; copy it elsewhere"):
        lab.run(lab.job(rounds="1"), **{option: given})
    assert path.read_bytes() == before


def test_a_folder_that_is_called_digits_is_not_taken_for_scikit_learns(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lab.folder)
    for label in range(10):
        for number in range(3):
            path = lab.folder / "digits" / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 9 * number, np.uint8)).save(path)
    job = lab.job(rounds="1", devices_per_round="2")
    for number, data in enumerate(("./digits", "digits/", str(lab.folder / "digits"))):
        (line,) = lab.run(job, f"run-{number}", data=data, clients=2)
        assert line.samples == 30
    with pytest.raises(ConfigError, match=r"give --data \./digits for that"):
        lab.run(job, "other", data="digits", clients=2)


def test_a_run_may_be_called_digits_and_goes_on(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    lines = lab.run(lab.job(rounds="1"), "digits")
    assert (lab.folder / "digits").is_dir() and lab.run(lab.job(rounds="1"), "digits") == lines


def test_samples_without_a_client_are_told(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(simulate.Reporter, "say", lambda reporter, text: said.append(text))
    lab.run(lab.job(rounds="1"))
    assert any(each.startswith("1294 of 1438 samples are no client's, by --partition file:") for each in said)
    said.clear()
    lab.run(lab.job(rounds="1"), "all", clients=6)
    assert not any("no client's" in each for each in said)


def test_a_file_of_weights_that_has_changed_is_another_simulation(lab: Any) -> None:
    lab.run(lab.job(rounds="1"), "first")
    weights, other = (lab.folder / "first" / "weights" / f"round-000{number}.safetensors" for number in (0, 1))
    mine = lab.folder / "w.safetensors"
    mine.write_bytes(weights.read_bytes())
    text = lab.job(rounds="1").read_text().replace('"digits-cnn"', '"digits-cnn"\nweights = "w.safetensors"')

    def job() -> Path:
        path = lab.job()
        path.write_text(text)
        return Path(path)

    lab.run(job())
    mine.write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match="another simulation, with other weights;"):
        lab.run(job())


def test_the_code_of_a_model_beside_the_job_is_part_of_what_was_asked(lab: Any) -> None:
    job = lab.job()
    job.write_text(job.read_text().replace('"digits-cnn"', '"net:make"'))
    options = Options(job=job, data="digits", output=lab.folder / "run", clients=2)
    asked = []
    for text in ("def make(): ...", "def make(): pass"):
        (lab.folder / "net.py").write_text(text)
        asked.append(setup._asked(options, simulate.job_of(options), "digits"))
    assert asked[0].module and asked[0].module != asked[1].module
    assert len({msgspec.structs.replace(each, module="") for each in asked}) == 1


def test_a_simulation_runs_inside_of_a_running_event_loop(lab: Any) -> None:
    """Such as that of a notebook."""
    job = lab.job(rounds="1")

    async def cell() -> Any:
        return lab.run(job, "cell")

    assert len(asyncio.run(cell())) == 1
    lab.run(job)
    assert lab.digests("cell") == lab.digests()


def test_an_interruption_ends_a_simulation_inside_of_a_running_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[bool] = []

    async def simulated() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def cell() -> None:
        simulate._run(simulated)

    class Interrupting(simulate.ThreadPoolExecutor):
        def submit(self, *args: Any) -> Any:
            ended = super().submit(*args)

            def result() -> None:
                raise KeyboardInterrupt

            ended.result = result  # type: ignore[assignment]
            return ended

    monkeypatch.setattr(simulate, "ThreadPoolExecutor", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert cancelled == [True]


@pytest.mark.parametrize("retention", ["", "keep_best = false", "keep_best = false\nkeep_every = 2"])
def test_weights_are_kept_as_a_coordinator_keeps_them(lab: Any, retention: str) -> None:
    lines = lab.run(lab.job(rounds="6", sections=f"[retention]\nkeep_last = 1\n{retention}"))
    held = {int(path.stem[-4:]) for path in (lab.folder / "run" / "weights").glob("round-*.safetensors")}
    best = max(lines, key=lambda line: line.accuracy or 0.0).round
    assert held == {0, 6} | ({best} if not retention else set()) | ({2, 4} if "every" in retention else set())


def test_weights_in_force_are_kept_beside_rounds_that_were_not_published(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds are published and three are not; a rollback by hand needs the round before the last in force."""
    answers = iter(["", "", "", "no", "no", "no"])
    monkeypatch.setattr(run, "objection", lambda *_: next(answers))
    job = lab.job(rounds="6", sections="[retention]\nkeep_last = 2\nkeep_best = false\n[guard]\npause_after = 9")
    lines = lab.run(job)
    assert [line.published for line in lines] == [True] * 3 + [False] * 3
    held = {int(path.stem[-4:]) for path in (lab.folder / "run" / "weights").glob("round-*.safetensors")}
    assert {0, 2, 3} <= held and 1 not in held


@pytest.mark.parametrize(
    "options", [{"clients": 0}, {"seed": -1}, {"workers": -1}, {"threads": 0}, {"clients": 1 << 21}]
)
def test_options_that_the_command_line_would_refuse(lab: Any, options: Any) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"^--{name} {options[name]}: "):
        lab.run(lab.job(), **options)
    assert not (lab.folder / "run").exists()


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
    with pytest.raises(JobError, match=r"no client can train this job, as client-00\d: .* only 1000 B is free"):
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


TEXTS = """\
[job]
name = "texts"
rounds = 1
devices_per_round = 2
seed = 3

[model]
name = "text-transformer"
classes = ["good", "bad"]

[text]
label = "label"
text = ["text"]
length = 4
tokenizer = "tokenizer.json"

[training]
batch = 8
local_epochs = 1
learning_rate = 0.05

[test]
data = "test.csv"
"""
TOKENIZER = """\
{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer":
{"type": "Whitespace"}, "post_processor": null, "decoder": null, "model": {"type": "WordLevel", "vocab":
{"[PAD]": 0, "[UNK]": 1, "fine": 2, "poor": 3}, "unk_token": "[UNK]"}}
"""


def rows(count: int, damaged: int = 0) -> str:
    lines = [("good,fine", "bad,poor")[number % 2] for number in range(count - damaged)]
    return "\n".join(["label,text", *lines, *["neither,x"] * damaged]) + "\n"


def test_damaged_rows_are_left_out_as_on_a_device(lab: Any) -> None:
    pytest.importorskip("tokenizers", reason="needs the library tokenizers, of fedepth[text]")
    (lab.folder / "tokenizer.json").write_text(TOKENIZER)
    job = lab.folder / "job.toml"
    job.write_text(TEXTS)
    train, test = lab.folder / "train.csv", lab.folder / "test.csv"
    train.write_text(rows(40, damaged=2))
    test.write_text(rows(40, damaged=2))
    (line,) = lab.run(job, "few", data=str(train), clients=2)
    assert line.samples == 38 and line.accuracy is not None
    train.write_text(rows(40, damaged=3))
    with pytest.raises(DataError, match=r"3 of 40 rows are damaged \(8%\), and a device \(most_damaged\) allows 5%"):
        lab.run(job, "many", data=str(train), clients=2)
    train.write_text(rows(40))
    test.write_text(rows(40, damaged=3))
    with pytest.raises(DataError, match=r"3 of 40 rows are damaged \(8%\), and \[test\] most_damaged allows 5%"):
        lab.run(job, "test", data=str(train), clients=2)


def test_a_damaged_image_is_left_out_as_on_a_device(lab: Any) -> None:
    for number in range(40):
        path = lab.folder / "images" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 6 * number, np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-20])  # the last of class 9
    job = lab.job(rounds="1", devices_per_round="2")
    (line,) = lab.run(job, data=str(lab.folder / "images"), clients=2, partition="iid")
    assert sorted((row.end, row.samples) for row in line.clients) == [("update", 19), ("update", 20)]


def test_a_run_goes_on_with_the_samples_that_it_began_with_or_not_at_all(lab: Any) -> None:
    (lab.folder / "images").mkdir()

    def images(*counts: int) -> None:
        for label, count in enumerate(counts):
            for number in range(count):
                path = lab.folder / "images" / str(label) / f"{number}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(np.full((8, 8), 9 * number, np.uint8)).save(path)

    def interrupt(request: Request) -> None:
        if isinstance(request, Train):
            raise Interrupted

    images(4, 4, 4, 4, 4, 4, 4, 4, 4, 3)
    job = lab.job(rounds="1", devices_per_round="2")
    fields = {"data": str(lab.folder / "images"), "clients": 2}
    with pytest.raises(Interrupted):
        lab.run(job, engine=InProcess(1, interrupt), **fields)
    (lab.folder / "images" / "0" / "3.png").unlink()
    with pytest.raises(ConfigError, match=r"holds other samples than when this simulation began \(39 then, 38 now"):
        lab.run(job, **fields)
    images(3, 4, 4, 4, 4, 4, 4, 4, 4, 4)
    with pytest.raises(ConfigError, match=r"\(39 then, 39 now, or other labels\); bring those back"):
        lab.run(job, **fields)


def pinned(*blocks: tuple[int, int], untrained: tuple[int, ...] = (), models: int = 1) -> Plan:
    nothing = PeakComponents(0, 0, 0, 0, 0, 0, 0)
    stages = tuple(Stage(first, last, 16, CachePlace.RAM, 16, nothing) for first, last in blocks)
    return Plan(stages, untrained, Policy.AUTO, 0, models)


@pytest.mark.parametrize(
    ("client", "plan", "message"),
    [
        ("nobody", pinned((0, 5)), "--plans: 'nobody': there is no such client, there are 'client-000' and so on"),
        ("client-000", pinned((0, 9)), "has the blocks 0-9, which digits-cnn with its 6 units cannot be trained in"),
        ("client-000", pinned((0, 1), (3, 5)), "has the blocks 3-5, which"),
        ("client-000", pinned((0, 3)), "the plan trains 0-3; each of the units 0 to 5 has to be in one block or among"),
        ("client-000", pinned((0, 5), untrained=(4,)), "each of the units 0 to 5 has to be in one block"),
        ("client-000", pinned((0, 5), models=2), r"the plan trains 2 models, \[training\] mutual of the job is 1"),
        ("client-000", pinned((0, 2), (3, 5), models=2), "only where one block holds all 6 units"),
    ],
)
def test_a_plan_that_cannot_be_trained_is_refused_before_anything_is(
    lab: Any, client: str, plan: Plan, message: str
) -> None:
    path = lab.folder / "plans.json"
    path.write_bytes(msgspec.json.encode({client: plan}))
    with pytest.raises(ConfigError, match=message):
        lab.run(lab.job(), plans=path)
    assert lab.engine.requests == []


def test_a_client_with_a_plan_and_without_samples_is_left_out(lab: Any) -> None:
    partition, plans = lab.folder / "mine.json", lab.folder / "plans.json"
    partition.write_text(
        '{"how": "by hand", "seed": 0, "samples": 1438, "clients": [{"id": "none", "samples": []}, '
        '{"id": "some", "samples": [1, 2, 3, 4]}]}'
    )
    plans.write_bytes(msgspec.json.encode({"none": pinned((0, 5)), "some": pinned((0, 2), (3, 5))}))
    (line,) = lab.run(lab.job(rounds="1", devices_per_round="1"), partition=f"file:{partition}", plans=plans)
    assert [(row.client, row.blocks) for row in line.clients] == [("some", "0-2 | 3-5")]


MUTUAL = "mutual = 2"


def peer_rounds(lab: Any, output: str = "run") -> dict[str, list[str]]:
    """The rounds of which every client has a peer."""
    clients = sorted((lab.folder / output / "clients").iterdir())
    return {client.name: sorted(path.parent.name for path in client.glob("peers/*/*/*")) for client in clients}


def test_peers_go_on_from_round_to_round(lab: Any, capfd: pytest.CaptureFixture[str]) -> None:
    job = lab.job(training=MUTUAL, rounds="3", devices_per_round="6")
    capfd.readouterr()
    lab.run(job)
    assert capfd.readouterr() == ("", "")
    assert set(map(tuple, peer_rounds(lab).values())) == {("00000002", "00000003")}
    for request in (each for each in lab.engine.requests if isinstance(each, Train)):
        (peer,) = request.peers
        if request.task.round == 1:
            assert peer == ""
        else:
            assert Path(peer).parent.name == f"{request.task.round - 1:08d}"
            assert Path(peer).is_relative_to(lab.folder / "run" / "clients" / f"{request.client:06d}")
    lab.run(job, "three", engine=InProcess(3))
    assert lab.digests() == lab.digests("three")


def test_interrupted_anywhere_peers_are_what_they_would_be(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where training diverged with a peer, which is deleted then, or a peer is not of this model."""
    failing = {"client-002": DivergedError("loss is not finite"), "client-004": PeerError("of another model")}
    failed: list[str] = []

    def run(assignment: Assignment, *rest: Any) -> Result:
        if assignment.device_id in failing and any(assignment.peers):
            failed.append(assignment.device_id)
            raise failing[assignment.device_id]
        return session.run(assignment, *rest)

    monkeypatch.setattr(process, "run", run)
    job = lab.job(training=MUTUAL, rounds="3", devices_per_round="6", job="quorum = 4")
    lines = lab.run(job, "whole")
    assert {row.end for line in lines for row in line.clients} == {"update"}
    assert sorted(failed) == ["client-002"] * 2 + ["client-004"] * 2  # of rounds 2 and 3
    chance = random.Random(1)
    left = 0
    true_keep = Peers.keep

    def interrupt(_: Request | None = None) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Interrupted

    def keep(peers: Peers, folder: Path) -> None:  # an update is trained by then, and its peers are not kept
        interrupt()
        true_keep(peers, folder)

    monkeypatch.setattr(Peers, "keep", keep)
    done = False
    while not done:
        left = chance.randint(3, 14)
        try:
            lab.run(job, "broken", engine=InProcess(1, interrupt))
            done = True
        except Interrupted:
            pass
    assert lab.digests("broken") == lab.digests("whole")
    assert peer_rounds(lab, "broken") == peer_rounds(lab, "whole")


def test_nothing_is_learnt_from_weights_that_are_not_published(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedepth.rounds.soundness import Evaluation
    from fedepth.simulation.run import Run

    true = Run._evaluate

    async def evaluate(self: Run, new: Any) -> Any:
        found = await true(self, new)
        return (Evaluation(0.1, float("nan")), "") if new.round == 1 else found

    monkeypatch.setattr(Run, "_evaluate", evaluate)
    lines = lab.run(lab.job(training=MUTUAL, rounds="3"))
    assert [line.published for line in lines] == [False, True, True]
    trained = [(each.task.round, each.device_id) for each in lab.engine.requests if isinstance(each, Train)]
    assert len(trained) == len(set(trained)) == 9


def test_a_second_model_takes_time(lab: Any) -> None:
    trace = lab.folder / "trace.jsonl"
    trace.write_text('{"client": "*", "images_per_second": 100}\n')
    (one,) = lab.run(lab.job(rounds="1"), "one", trace=trace)
    (two,) = lab.run(lab.job(rounds="1", training=MUTUAL), "two", trace=trace)
    assert one.simulated_seconds == pytest.approx(24 / 100)
    # Both are trained, a backward pass for two forward passes, and one runs forwards once more.
    assert 2.2 < two.simulated_seconds / one.simulated_seconds < 2.4


def test_statistics_are_fixed_from_the_round_that_the_job_says(lab: Any) -> None:
    job = lab.job(training='batch_norm = "fixed"\nfixed_after = 1\nmutual = 2', devices_per_round="1")
    job.write_text(job.read_text().replace("digits-cnn", "preresnet20"))
    lab.run(job)
    before, trained, fixed = (
        load_numpy(lab.folder / "run" / "weights" / f"round-000{number}.safetensors") for number in range(3)
    )
    for name in before:
        if "running" in name:
            assert not np.array_equal(before[name], trained[name]), name
            assert np.array_equal(trained[name], fixed[name]), name
    assert not np.array_equal(trained["stem.weight"], fixed["stem.weight"])


TABLE = """\
[job]
name = "table"
rounds = 1
devices_per_round = 2

[model]
name = "table-mlp"
classes = ["no", "yes"]

[training]
batch = 8

[test]
data = "test.csv"

[table]
label = "class"
numeric = ["a", "b"]
{statistics}
"""


def test_clients_are_asked_for_the_statistics_that_a_job_leaves_out(lab: Lab) -> None:
    rng = np.random.default_rng(5)
    rows = [
        f"{('no', 'yes')[k % 2]},{1e6 + 3 * (k % 2) + rng.normal()},{rng.normal() if k % 5 else ''}" for k in range(64)
    ]
    (lab.folder / "data").mkdir()
    (lab.folder / "data" / "train.csv").write_text("\n".join(["class,a,b", *rows]) + "\n")
    (lab.folder / "test.csv").write_text("\n".join(["class,a,b", *rows[:20]]) + "\n")
    job = lab.folder / "job.toml"
    options = {"data": str(lab.folder / "data"), "clients": 4, "partition": "iid"}
    job.write_text(TABLE.format(statistics=""))
    lab.run(job, "asked", **options)
    found = msgspec.json.decode((lab.folder / "asked" / "statistics.json").read_bytes(), type=Statistics)
    numbers = np.array([float(row.split(",")[1]) for row in rows])
    assert found.devices == 4
    assert found.mean[0] == pytest.approx(numbers.mean(), rel=1e-12)
    assert found.std[0] == pytest.approx(numbers.std(), rel=1e-9)
    job.write_text(TABLE.format(statistics=f"mean = {list(found.mean)}\nstd = {list(found.std)}"))
    lab.run(job, "told", **options)
    assert lab.digests("asked") == lab.digests("told")
    assert not (lab.folder / "told" / "statistics.json").exists()
    job.write_text(TABLE.format(statistics=""))
    assert lab.run(job, "asked", **options)[-1].round == 1  # goes on with what is recorded


INT8 = '[transfer]\nencoding = "int8"'


def residuals(lab: Any, output: str = "run") -> dict[str, dict[str, list[str]]]:
    """What is kept of every client: the round, task and attempt that left it, and the files' names, with digests."""
    found: dict[str, dict[str, list[str]]] = {}
    for client in sorted((lab.folder / output / "clients").iterdir()):
        found[client.name] = {}
        for path in sorted(client.glob("residuals/*/*/*")):
            found[client.name].setdefault(path.parent.name, []).append(path.name)
    return found


def test_what_int8_leaves_out_goes_on_from_round_to_round_whatever_the_workers(
    lab: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    job = lab.job(sections=INT8, rounds="3", devices_per_round="4")
    capfd.readouterr()
    lines = lab.run(job)
    assert capfd.readouterr() == ("", "")
    last: dict[int, int] = {}
    for request in (each for each in lab.engine.requests if isinstance(each, Train)):
        assert [Path(path).parent.name[:8] for path in request.left_out[:1]] == (
            [f"{last[request.client]:08d}"] if request.client in last else []
        )
        last[request.client] = request.task.round
    assert max(last.values()) == 3 and len(last) > 4
    kept = residuals(lab)
    assert {client: [name[:8] for name in held] for client, held in kept.items()} == {
        f"{client:06d}": [f"{number:08d}"] for client, number in last.items()
    }
    lab.run(job, "three", engine=InProcess(3))
    assert lab.digests() == lab.digests("three")
    assert residuals(lab, "three") == kept
    whole = lab.run(lab.job(rounds="3", devices_per_round="4"), "float32")
    assert lab.digests() != lab.digests("float32")
    for small, large in zip(lines, whole, strict=True):
        assert 0.25 < small.bytes_up / large.bytes_up < 0.4


def test_interrupted_anywhere_what_is_left_out_is_what_it_would_be(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = lab.job(sections=INT8, rounds="3", devices_per_round="4")
    lab.run(job, "whole")
    chance = random.Random(2)
    left = 0
    true_keep = Residuals.keep

    def interrupt(_: Request | None = None) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Interrupted

    def keep(kept: Residuals, folder: Path) -> None:  # an update is trained by then, and what it leaves out is not kept
        interrupt()
        true_keep(kept, folder)

    monkeypatch.setattr(Residuals, "keep", keep)
    done = False
    while not done:
        left = chance.randint(3, 12)
        try:
            lab.run(job, "broken", engine=InProcess(1, interrupt))
            done = True
        except Interrupted:
            pass
    assert lab.digests("broken") == lab.digests("whole")
    assert residuals(lab, "broken") == residuals(lab, "whole")


def test_of_updates_that_do_not_count_nothing_is_left(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 1 is refused in the second round, and client 2 too slow for it; what they left out goes, as on a device
    that is told so."""
    from fedepth.simulation.run import Run

    true = Run._judge

    def judge(self: Run, result: Result, *rest: Any) -> str:
        return "too far" if (result.round, result.device_id) == (2, "client-001") else true(self, result, *rest)

    monkeypatch.setattr(Run, "_judge", judge)
    monkeypatch.setattr(
        Run,
        "_seconds",
        lambda _, client, plan, training, weights: 1e6 if (training.seed, client) == (5, "client-002") else 1.0,
    )
    job = lab.job(sections=INT8, rounds="2", devices_per_round="6", job="quorum = 4\nround_deadline_s = 60")
    lines = lab.run(job)
    assert [line.updates for line in lines] == [6, 4]
    ends = {row.client: row.end for row in lines[-1].clients}
    assert ends["client-001"] == "refused: too far"
    assert ends["client-002"] == "lost: the round closed without it"
    kept = residuals(lab)
    assert kept.pop("000001") == kept.pop("000002") == {}
    assert all([name[:8] for name in held] == ["00000002"] for held in kept.values()) and len(kept) == 4


def test_a_slow_link_takes_the_time_of_encoded_bytes(lab: Any) -> None:
    trace = lab.folder / "trace.json"
    trace.write_text('{"client": "*", "upload_bytes_per_second": 1000}')
    seconds = {}
    for name, sections in (("float32", ""), ("int8", INT8)):
        (line,) = lab.run(lab.job(sections=sections, rounds="1", devices_per_round="1"), name, trace=trace)
        seconds[name] = line.simulated_seconds
    assert 0.25 < seconds["int8"] / seconds["float32"] < 0.4
