"""Several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from fedepth.cli import app
from fedepth.errors import ConfigError, StateError
from fedepth.simulation import commands, simulate
from fedepth.simulation.compare import Spread, compare, read_run
from fedepth.simulation.record import MADE_FIRST, PARTITION_PICTURE, VERSION, Asked, Record, RoundLine, TierLine


def line(number: int, accuracy: float | None, **changes: Any) -> RoundLine:
    tier = TierLine(1, ("0-5",), 100, 50, 40 + number, 2, 20, 1.0)
    fields: dict[str, Any] = {
        "round": number, "accuracy": accuracy, "loss": 1.0, "published": True, "note": "", "updates": 1, "samples": 10,
        "steps": 2, "samples_seen": 20, "predicted_peak_bytes": 50, "measured_peak_bytes": 40, "bytes_down": 100,
        "bytes_up": 100, "seconds": 1.0, "simulated_seconds": 0.0, "ended_at": 0.0, "weights_digest": "", "notes": (),
        "weights_round": number, "tiers": {"1/2": tier}, "clients": (),
    }  # fmt: skip
    return RoundLine(**{**fields, **changes})


def run(folder: Path, name: str, seed: int, lines: list[RoundLine], **changes: Any) -> Path:
    record = Record(folder / f"{name}-{seed}{''.join(changes)}")
    record.open(msgspec.structs.replace(Asked(VERSION, name, "", "", 1, "", "", seed, 1, False), **changes))
    for each in lines:
        record.close_round(each)
    return record.folder


def test_runs_of_a_name_are_seeds_and_count_as_far_as_all_of_them_have_come(tmp_path: Path) -> None:
    one = run(tmp_path, "deep", 1, [line(1, 0.5), line(2, 0.7), line(3, 0.9)])
    two = run(tmp_path, "deep", 2, [line(1, 0.6), line(2, 0.5, published=False)])
    other = run(tmp_path, "full", 1, [line(1, None, loss=None)])
    deep, full = compare([read_run(path) for path in (one, two, other)])
    assert (deep.name, deep.seeds, deep.rounds) == ("deep", (1, 2), 2)
    # After round 2: 0.7, and 0.6 of the model before the one that was not published.
    assert (
        deep.final is not None
        and deep.final.mean == pytest.approx(0.65)
        and deep.final.std == pytest.approx(0.0707, abs=1e-4)
    )
    assert deep.best is not None and deep.best.mean == pytest.approx(0.65)
    assert (deep.steps, deep.samples_seen, deep.bytes_up, deep.peaks) == (4, 40, 200, {"1/2": 42})
    assert full.final is None and full.rounds == 1
    one_alone = compare([read_run(one)])[0]
    assert one_alone.final == Spread(0.9, 0.0)


def test_a_line_that_is_not_whole_is_left_to_its_simulation_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    folder = run(tmp_path, "deep", 1, [line(1, 0.5)])
    path = folder / "rounds.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert len(read_run(folder).rounds) == 1 and path.read_bytes() == whole + whole[:20]  # it may be at work
    run(tmp_path, "deep", 1, [line(2, 0.6)])
    assert [each.round for each in read_run(folder).rounds] == [1, 2]
    path.write_bytes(b"{}\n")
    with pytest.raises(StateError, match="is damaged"):
        read_run(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(StateError, match=r"rounds.jsonl cannot be read: "):
        read_run(folder)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "data.csv").touch()
    with pytest.raises(StateError, match=r"data\.csv holds no simulation; give the --output"):
        read_run(tmp_path / "data.csv")
    with pytest.raises(StateError, match="holds no simulation"):
        read_run(tmp_path)
    with pytest.raises(StateError, match="has no closed round yet"):
        read_run(run(tmp_path, "deep", 1, []))
    assert msgspec.json.decode((tmp_path / "deep-1" / "run.json").read_bytes())["name"] == "deep"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plot = pytest.importorskip("fedepth.simulation.plot")
    runs = [run(tmp_path, "deep", seed, [line(1, 0.5), line(2, 0.1 * seed)]) for seed in (1, 2)]
    plot.save_runs(tmp_path / "runs.png", [read_run(each) for each in runs])
    plot.save_partition(tmp_path / "partition.png", [[1, 2], [3, 0]], ("a", "b"), "two")
    for name in ("runs.png", "partition.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seed": 1}, "have the same seed, 1; leave one out, or give fedepth simulate another --name"),
        ({"data": "other"}, "differ in data;"),
        ({"partition": "iid", "tiers": "fair"}, "differ in partition and tiers;"),
        ({"job_file": "[job]\nseed = 2\nrounds = 8\n"}, "differ in job file;"),
        ({"partition": "csv:b.csv x"}, "differ in partition;"),
        ({"clients": 2}, "differ in clients;"),
        ({"budgets": "[1]"}, "differ in tiers;"),  # beside one without a limit
        *[({field: "x"}, f"differ in {field};") for field in ("trace", "plans", "weights", "tokenizer", "module")],
        ({"enforce": True, "threads": 2}, "differ in enforce and threads;"),
    ],
)
def test_runs_of_a_name_that_are_no_seeds_of_one_set_up_are_not_averaged(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    job = {"job_file": "[job]\nseed = 1\nrounds = 9\n", "partition": "file:a.json x", "tiers": "full"}
    one = run(tmp_path, "deep", 1, [line(1, 0.5)], **job)
    fields = {**job, "job_file": "[job]\nseed = 2\nrounds = 9\n", **changes}
    other = run(tmp_path / "other", "deep", fields.pop("seed", 2), [line(1, 0.7)], **fields)
    with pytest.raises(ConfigError, match=f"deep.* and .*deep.* are both called 'deep', .* but they {why}"):
        compare([read_run(one), read_run(other)])


def test_seeds_may_have_files_of_their_own_and_budgets_that_one_has_measured(tmp_path: Path) -> None:
    one = run(tmp_path, "deep", 1, [line(1, 0.5)], partition="file:a.json x", tiers="fair")
    two = run(tmp_path, "deep", 2, [line(1, 0.7)], partition="file:b.json y", tiers="full", budgets="[]")
    (found,) = compare([read_run(one), read_run(two)])
    assert found.seeds == (1, 2)


def test_what_was_made_for_other_options_is_made_anew(tmp_path: Path) -> None:
    """As long as nothing is trained; the picture of a partition as well, which would show another one."""
    record = Record(tmp_path / "run")
    asked = Asked(VERSION, "deep", "", "", 1, "iid", "", 1, 1, False)
    record.open(asked)
    for name in MADE_FIRST:
        (record.folder / name).write_bytes(b"{}")
    record.open(asked)
    assert all((record.folder / name).exists() for name in MADE_FIRST) and PARTITION_PICTURE in MADE_FIRST
    record.open(msgspec.structs.replace(asked, partition="shards:1"))
    assert not any((record.folder / name).exists() for name in MADE_FIRST)


def test_the_accuracy_that_is_told_is_that_of_the_weights_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(1, 0.42), line(2, 0.38, published=False, note="the accuracy fell by 4 points", weights_round=1)]
    monkeypatch.setattr(simulate, "simulate", lambda *_, **__: lines)
    monkeypatch.setattr(commands, "_draw_runs", lambda *_: None)
    told = CliRunner().invoke(app, ["simulate", "job.toml", "--data", "digits", "--output", str(tmp_path)])
    assert told.stdout.splitlines() == [
        "accuracy 42.00% after round 2, at best 42.00%",
        "round 2 was not published: the accuracy fell by 4 points",
        f"weights: {tmp_path / 'weights' / 'round-0001.safetensors'}",
    ]
