"""The report: its rows with a trainer that is played, and a real one for a small model."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.config import Config, MemoryConfig, TrainerConfig
from edge_client.measure.capability import (
    Bench,
    Capability,
    CapabilityRequest,
    Measured,
    Verdict,
    default_samples,
    measure_capability,
    measured_capability,
)
from edge_client.measure.capability_tables import in_words, micro_batches, shown_blocks, tables
from edge_client.measure.trial import TrialModel
from edge_client.memory.probe import Memory
from edge_client.trainer.client import TrainerKeeper
from fedepth.budget import MemoryLimit
from fedepth.errors import ConfigError, ModelError, PlanError, StateError
from fedepth.estimate.peak import needed_bytes
from fedepth.models.catalog import named_spec
from fedepth.plan import Policy
from fedepth.planning.explain import CLEARLY_LESS, ladder
from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak, unit_plan
from fedepth.sizes import format_size
from fedepth.task import ModelSpec
from tests.edge_client.conftest import COSTS, MIB, SAMPLES, TRAINING

FAKE_TRAINER = Path(__file__).parents[1] / "fake_trainer.py"
START_BYTES = 10 * MIB  # of the fake trainer
TOY = ModelSpec("toy", ("a", "b"), (1, 8, 8), (0.5,), (0.5,))
GOOD = {"do": "ok", "peak": MIB}
UNITS = len(COSTS.units)


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., tuple[Capability, list[dict[str, Any]]]]:
    """A report on the toy model by a trainer that follows the scenes, and the requests that it got."""

    def run(*scenes: dict[str, Any], free: int, budgets: tuple[int, ...]) -> tuple[Capability, list[dict[str, Any]]]:
        (tmp_path / "scenes").write_text(json.dumps(scenes))
        argv = [sys.executable, str(FAKE_TRAINER), str(tmp_path / "scenes"), str(tmp_path / "journal")]

        async def rows() -> Capability:
            keeper = TrainerKeeper(TrainerConfig(), argv)
            # A limit by rlimit does not grow by what the trainer holds, so that the figures are exact.
            memory = Memory(free + START_BYTES, (MemoryLimit("RLIMIT_DATA", free + START_BYTES),))
            bench = Bench(
                TrialModel(TOY, TRAINING, COSTS, tmp_path / "graph", tmp_path / "weights"),
                tmp_path / "data",
                keeper,
                MemoryConfig(reserve=0, fraction=1.0),
                lambda: memory,
            )
            try:
                return await measured_capability(
                    CapabilityRequest(TOY, TRAINING, Policy.PAPER, SAMPLES, budgets), bench, 0.0, lambda _: None
                )
            finally:
                await keeper.drop()

        report = asyncio.run(asyncio.wait_for(rows(), 60))
        return report, [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]

    return run


def plan_need(budget: int) -> int:
    plan = make_plan(COSTS, budget_bytes=budget, training=TRAINING, sample_count=SAMPLES, policy=Policy.PAPER)
    return needed_bytes(plan.predicted_peak_bytes)


def test_every_unit_runs_in_all_that_is_free_and_every_plan_in_its_budget(play: Callable[..., Any]) -> None:
    first, second = plan_need(30 * MIB), plan_need(200 * MIB)
    report, requests = play(GOOD, free=200 * MIB, budgets=(second, first))
    assert report.device.budget_bytes == 200 * MIB
    limits = [request["budget"]["budget_bytes"] for request in requests]
    assert limits == [200 * MIB] * UNITS + [first, second]
    assert all(request["enforce"] for request in requests)
    assert [row.end.verdict for row in report.units] == [Verdict.TRAINED] * UNITS
    assert [(row.stage.first, row.stage.last) for row in report.units] == [(i, i) for i in range(UNITS)]
    assert [row.budget_bytes for row in report.plans] == [first, second]
    assert report.full_training_bytes == needed_bytes(full_training_peak(COSTS, TRAINING, SAMPLES).total)


def test_what_met_the_cap_on_its_heap_is_run_releasing_freed_pages(play: Callable[..., Any]) -> None:
    report, requests = play({"do": "over", "miss": 0, "capped": True}, GOOD, free=200 * MIB, budgets=(200 * MIB,))
    assert [request["release_freed"] for request in requests[:3]] == [False, True, False]
    assert requests[0]["plan"] == requests[1]["plan"]
    assert report.units[0].end.verdict is Verdict.TRAINED


def test_several_stages_count_with_the_largest_peak_and_all_seconds(play: Callable[..., Any]) -> None:
    report, _ = play(GOOD, free=200 * MIB, budgets=(30 * MIB,))
    (row,) = report.plans
    stages = len(row.plan.stages)
    assert stages > 1
    seconds = 0.5 * stages
    assert row.end.measured == Measured(MIB - 1, MIB, 2 * stages, seconds, 0.25, 1000 * seconds / 4)


def test_what_does_not_fit_is_shown_and_not_run(play: Callable[..., Any]) -> None:
    need = unit_plan(COSTS, unit=0, training=TRAINING, sample_count=SAMPLES, policy=Policy.PAPER).budget_bytes
    report, requests = play(GOOD, free=need - 1, budgets=(MIB, 400 * MIB))
    assert requests == []
    assert {row.end.verdict for row in report.units} == {Verdict.TOO_LARGE}
    assert report.units[0].needed_bytes == need
    assert in_words(report.units[0].end).startswith("needs ")
    nothing, beyond = report.plans
    assert (nothing.plan, nothing.end.verdict) == (None, Verdict.NO_PLAN)
    assert nothing.needed_bytes == smallest_peak(COSTS, TRAINING, SAMPLES, Policy.PAPER)
    assert (beyond.end.verdict, beyond.plan is None) == (Verdict.TOO_LARGE, False)
    assert beyond.needed_bytes < 400 * MIB  # what its plan needs counts, not the budget
    assert f"needs {format_size(beyond.needed_bytes, round_up=True)}" in beyond.end.message


def test_a_plan_that_fits_is_proved_though_its_budget_does_not(play: Callable[..., Any]) -> None:
    report, requests = play(GOOD, free=200 * MIB, budgets=(1 << 40,))
    (row,) = report.plans
    assert (row.end.verdict, row.budget_bytes) == (Verdict.TRAINED, 1 << 40)
    assert requests[-1]["budget"]["budget_bytes"] == 200 * MIB


def test_a_plan_that_several_budgets_give_is_proved_once_under_the_smallest(play: Callable[..., Any]) -> None:
    need = plan_need(200 * MIB)
    report, requests = play(GOOD, free=200 * MIB, budgets=(need, need + 1, 200 * MIB))
    assert len(requests) == UNITS + 1
    assert requests[-1]["budget"]["budget_bytes"] == need
    assert [row.end.verdict for row in report.plans] == [Verdict.TRAINED] * 3


def test_rows_that_go_wrong_say_so_and_the_report_goes_on(play: Callable[..., Any]) -> None:
    scenes = [
        {"do": "die"},
        {"do": "over", "miss": 5},
        {"do": "fail", "outcome": "error"},
        {"do": "ok", "peak": 300 * MIB},
        {"do": "fail", "outcome": "declined"},
        GOOD,
    ]
    report, requests = play(*scenes, free=200 * MIB, budgets=(200 * MIB,))
    verdicts = [row.end.verdict for row in report.units]
    assert verdicts[:5] == [
        Verdict.DIED,
        Verdict.OVER_BUDGET,
        Verdict.FAILED,
        Verdict.OVER_BUDGET,
        Verdict.TOO_LARGE,
    ]
    assert set(verdicts[5:]) == {Verdict.TRAINED}
    assert report.units[3].end.message == "took 100.0 MiB more than its limit"
    assert report.units[3].end.measured is not None
    # After a death, and after a limit that was met, a new trainer.
    assert len({request["pid"] for request in requests[:3]}) == 3
    assert len({request["pid"] for request in requests[2:]}) == 1


def test_the_ladder_is_between_the_smallest_plan_and_what_is_free(play: Callable[..., Any]) -> None:
    report, _ = play(GOOD, free=200 * MIB, budgets=())
    budgets = [row.budget_bytes for row in report.plans]
    assert budgets[0] == smallest_peak(COSTS, TRAINING, SAMPLES, Policy.PAPER)
    assert budgets == [plan_need(budget) for budget in budgets]  # one byte less gives another plan
    assert budgets[-1] <= report.full_training_bytes
    assert 3 <= len(budgets) <= 6


def test_without_room_for_any_plan_the_ladder_is_the_smallest_one(play: Callable[..., Any]) -> None:
    report, requests = play(GOOD, free=MIB, budgets=())
    (row,) = report.plans
    assert (row.end.verdict, requests) == (Verdict.TOO_LARGE, [])
    assert row.budget_bytes == smallest_peak(COSTS, TRAINING, SAMPLES, Policy.PAPER)


def test_every_rung_is_clearly_better_than_the_one_before() -> None:
    rungs = ladder(COSTS, most_bytes=1 << 40, training=TRAINING, sample_count=SAMPLES, policy=Policy.AUTO, count=6)
    ranks = [(len(rung.plan.untrained), len(rung.plan.stages)) for rung in rungs]
    work = [rung.work for rung in rungs]
    steps = list(zip(zip(ranks, work, strict=True), zip(ranks[1:], work[1:], strict=True), strict=False))
    for (rank, slow), (better, fast) in steps[:-1]:  # the last is full training, whatever comes before it
        assert better < rank or (better == rank and fast < CLEARLY_LESS * slow)
    assert len(rungs) >= 3
    assert [rung.budget_bytes for rung in rungs] == sorted({rung.budget_bytes for rung in rungs})
    assert ranks[-1] == (0, 1)


def test_tables_name_blocks_and_micro_batches(play: Callable[..., Any]) -> None:
    report, _ = play(GOOD, free=200 * MIB, budgets=(30 * MIB,))
    plan = report.plans[0].plan
    assert plan is not None
    assert micro_batches(plan) == "3"  # six samples in two even batches
    assert shown_blocks(plan).startswith("0")
    units, plans = tables(report)
    assert (units.row_count, plans.row_count) == (UNITS, 1)


def test_the_picture_shows_rows_that_failed_too(play: Callable[..., Any], tmp_path: Path) -> None:
    from edge_client.measure.capability_plot import save_capability

    report, _ = play({"do": "die"}, GOOD, free=60 * MIB, budgets=(MIB, 30 * MIB, 400 * MIB))
    save_capability(tmp_path / "report.png", report)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"missing/report\.png: No such file"):
        save_capability(tmp_path / "missing" / "report.png", report)


def test_samples_are_enough_for_a_few_steps() -> None:
    assert (default_samples(32), default_samples(128)) == (256, 384)


def test_a_model_that_this_device_does_not_allow_is_refused(tmp_path: Path) -> None:
    wanted = CapabilityRequest(named_spec("os:getcwd", "1x8x8", 10), TRAINING, Policy.AUTO, 8)
    with pytest.raises(ModelError, match="os:getcwd"):
        asyncio.run(measure_capability(wanted, Config(state=str(tmp_path))))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_traced_where_a_tracer_has_no_room(tmp_path: Path) -> None:
    wanted = CapabilityRequest(TOY, TRAINING, Policy.AUTO, 8)
    config = Config(state=str(tmp_path), memory=MemoryConfig(reserve="1000GiB"))
    with pytest.raises(PlanError, match=r"256\.0 MiB of free memory in addition to the trainer, but only 0 B is"):
        asyncio.run(measure_capability(wanted, config))
    assert list(tmp_path.iterdir()) == []


def test_a_state_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = CapabilityRequest(TOY, TRAINING, Policy.AUTO, 8)
    with pytest.raises(StateError, match="give --state DIR"):
        asyncio.run(measure_capability(wanted, Config(state=str(tmp_path / "file"))))


def test_a_real_trainer_is_inside_every_budget(tmp_path: Path, calibration_told: Path) -> None:
    """As typed: one JSON object on standard output and nothing else."""
    argv = ["report", "digits-cnn", "--batch", "8", "--samples", "16", "--state", str(tmp_path), "--json"]
    argv += ["--budget", "8MiB", "--budget", "1KiB", "--plot", str(tmp_path / "report.png")]
    ended = subprocess.run(
        [sys.executable, "-m", "edge_client.cli", *argv], capture_output=True, text=True, timeout=300, check=True
    )
    told = json.loads(ended.stdout)
    assert (ended.stderr, ended.stdout.count("\n")) == ("", 1)
    assert [row["end"]["verdict"] for row in told["units"]] == ["trained"] * 6
    nothing, trained = told["plans"]
    assert nothing["end"]["verdict"] == "no_plan"
    assert trained["end"]["measured"]["measured_peak_bytes"] <= trained["budget_bytes"] == 8 * MIB
    assert trained["end"]["measured"]["seconds_per_1000_samples"] > 0
    assert (tmp_path / "report.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_the_command_line_holds_no_torch_and_checks_the_picture_first(tmp_path: Path) -> None:
    program = (
        "import sys; import edge_client.cli, edge_client.measure.capability; "
        "from fedepth.models.catalog import named_spec; "
        "named_spec('preresnet20', None, 10); "
        "print([name for name in ('torch', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    held = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert held.stdout == "[]\n"
    argv = [sys.executable, "-m", "edge_client.cli", "report", "digits-cnn", "--plot", str(tmp_path / "no" / "x.png")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "does not exist" in ended.stderr
    assert ended.stderr.count("\n") == 1
