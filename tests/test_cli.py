"""`fedepth plan` as it is typed."""

import functools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedepth import prepare
from fedepth.cli import app
from fedepth.costs import Calibration
from fedepth.errors import ConfigError, ModelError, PlanError
from fedepth.estimate.peak import needed_bytes
from fedepth.sizes import format_size

MODEL = "digits-cnn"
MIB = 1 << 20


def plan(*argv: str) -> str:
    return CliRunner().invoke(app, ["plan", *argv], catch_exceptions=False, env={"COLUMNS": "200"}).stdout


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a second, and gives the same for the same model and settings."""
    monkeypatch.setattr(prepare, "trace_model", _traced)


_traced = functools.cache(prepare.trace_model)


@pytest.fixture
def tensors_only(tmp_path: Path) -> Path:
    """The calibration of a device that takes nothing beside tensors."""
    record = tmp_path / "tensors-only.json"
    nothing = replace(
        Calibration(), fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0
    )
    record.write_text(json.dumps({"calibration": asdict(nothing)}))
    return record


def test_the_plan_and_what_other_budgets_buy(tensors_only: Path) -> None:
    budget = needed_bytes(37 * MIB // 10)  # two stages take up to 3.5 MiB, one 4.4
    shown = plan(MODEL, "--budget", str(budget), "--policy", "paper", "--calibration", str(tensors_only))
    assert f"digits-cnn, batch 128, sgd, policy paper, budget {format_size(budget)}" in shown
    rows = [line.split() for line in shown.splitlines()]
    (first, second) = (row for row in rows if row[1:2] == ["128"])
    assert (first[0][0], second[0][-1]) == ("0", "5")
    *components, peak, _ = map(float, first[4:])
    assert sum(components) == pytest.approx(peak, abs=0.3)  # each is rounded to a tenth
    assert "all units at once, 128 samples in one piece" in shown
    assert "1 stage instead of 2: 0-5" in shown
    assert "Less memory: as good down to" in shown


def test_json_holds_the_plan_the_explanation_and_the_peak(tensors_only: Path) -> None:
    def told_of(budget: int) -> dict[str, Any]:
        options = ("--policy", "paper", "--optimizer", "adamw", "--calibration", str(tensors_only), "--json")
        told: dict[str, Any] = json.loads(plan(MODEL, "--budget", str(budget), *options))
        return told

    budget = needed_bytes(37 * MIB // 10)
    told = told_of(budget)
    stages = told["plan"]["stages"]
    peak = max(sum(stage["predicted"].values()) for stage in stages)
    assert told["timeline"]["peak_bytes"] == peak
    assert sum(stages[told["timeline"]["peak_stage"]]["predicted"].values()) == peak
    assert told["needed_bytes"] == needed_bytes(peak) <= budget
    assert told["training"]["optimizer"] == "adamw"
    larger = told["explanation"]["larger"]
    assert larger["budget_bytes"] > budget
    assert told["explanation"]["coarser"][-1]["plan"]["untrained"] == []
    # The budget that it names gives the plan that it promises.
    assert told_of(larger["budget_bytes"])["plan"] == larger["plan"]


def test_models_are_told_and_what_one_more_takes(tensors_only: Path) -> None:
    options = ("--mutual", "2", "--calibration", str(tensors_only))
    shown = plan(MODEL, "--budget", "100MiB", *options)
    assert "2 models are trained, each distilling from the others; one of them is the update." in shown
    assert "below, 1 model instead of 2: 0-5, micro-batch 128" in shown
    told = json.loads(plan(MODEL, "--budget", "100MiB", *options, "--json"))
    assert told["plan"]["models"] == 2
    needed = told["needed_bytes"]
    below = plan(MODEL, "--budget", str(needed - 1), *options)  # where it needs its cache on disk, it is two still
    assert "2 models" in below


def test_samples_and_classes_and_input_count() -> None:
    def cache(*options: str) -> int:
        (stage,) = json.loads(plan(MODEL, "--budget", "1GiB", "--json", *options))["plan"]["stages"]
        return int(stage["predicted"]["cache"])

    assert cache("--samples", "100") == 100 * 64  # pixels as bytes
    assert cache("--samples", "100", "--input", "3x16x16", "--classes", "3") == 100 * 3 * 256


JOB = """\
[job]
name = "trial"
rounds = 4
policy = "paper"
[model]
name = "preresnet20"
classes = 3
input_shape = [1, 16, 16]
mean = [0.3]
std = [0.3]
[training]
batch = 32
optimizer = "adamw"
heads = "auxiliary"
mutual = 2
batch_norm = "fixed"
fixed_after = 2
[tuning]
last_units = 4
[transfer]
encoding = "int8"
"""


def test_a_job_file_is_planned_with_all_its_settings(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)

    def told_of(*options: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(plan(str(job), "--budget", "100MiB", "--json", *options))
        return told

    told = told_of()
    training = told["training"]
    assert (training["batch"], training["optimizer"], training["heads"]) == (32, "adamw", "auxiliary")
    assert (training["mutual"], training["fixed_statistics"], told["plan"]["policy"]) == (2, False, "paper")
    assert training["encoding"] == "int8"
    assert "budget 100.0 MiB, updates as int8" in " ".join(plan(str(job), "--budget", "100MiB").split())
    (stage,) = told["plan"]["stages"]
    changed = told_of("--round", "3", "--batch", "8", "--mutual", "1", "--policy", "auto")
    assert (changed["training"]["batch"], changed["plan"]["models"], changed["plan"]["policy"]) == (8, 1, "auto")
    assert changed["training"]["fixed_statistics"]
    # Frozen units have no gradients and no optimizer state.
    job.write_text(JOB.replace("last_units = 4", "last_units = 10"))
    (whole,) = told_of()["plan"]["stages"]
    assert stage["predicted"]["optimizer_state"] < whole["predicted"]["optimizer_state"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["job.toml", "--classes", "3"], "job.toml says both in its section"),
        (["job.toml", "--input", "1x8x8"], "job.toml says both in its section"),
        (["job.toml", "--round", "5"], "--round 5: job.toml has 4 rounds"),
        ([MODEL, "--round", "2"], "--round is for a job file; digits-cnn is a model"),
        (["absent.toml"], "absent.toml: cannot be read"),
    ],
)
def test_what_does_not_go_with_a_job_file_is_told(
    options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    with pytest.raises(ConfigError, match=says):
        plan(*options, "--budget", "1GiB")


@pytest.mark.parametrize("argv", [["--budget", "16MiB", "--policy", "paper"], ["--budget", "1GiB"]])
def test_the_plot_is_a_png(argv: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    shown = plan(MODEL, *argv, "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in shown


def test_a_plot_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plot: \S+missing does not exist; make it"):
        plan(MODEL, "--budget", "16MiB", "--plot", str(tmp_path / "missing" / "plan.png"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("fedepth.estimate.plot", "fedepth.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedepth\[plot\]'"):
        plan(MODEL, "--budget", "16MiB", "--plot", str(tmp_path / "plan.png"))


def custom_model() -> object:
    from torch import nn

    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


def test_a_custom_model_needs_an_input_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = f"{Path(__file__).stem}:custom_model"
    with pytest.raises(ConfigError, match="as --input 3x32x32"):
        plan(name, "--budget", "1GiB")
    with pytest.raises(ConfigError, match="--input: '8xx' is not a shape"):
        plan(name, "--budget", "1GiB", "--input", "8xx")
    assert json.loads(plan(name, "--budget", "1GiB", "--input", "1x8x8", "--json"))["plan"]["untrained"] == []


@pytest.mark.parametrize(
    ("argv", "error", "says"),
    [
        ([MODEL, "--budget", "1MiB"], PlanError, "the smallest plan needs"),
        ([MODEL, "--budget", "much"], ConfigError, '"much" is not a size'),
        (["resnet19", "--budget", "1GiB"], ConfigError, "resnet19 is none of digits-cnn"),
        (["resnet19", "--budget", "1GiB", "--input", "3x32x32"], ModelError, "there is no model 'resnet19'"),
    ],
)
def test_errors_name_the_cause(argv: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        plan(*argv)


def test_an_error_ends_the_program_with_status_1() -> None:
    program = [sys.executable, "-m", "fedepth.cli", "plan", MODEL, "--budget", "1MiB"]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("fedepth: --budget 1.0 MiB is too small for digits-cnn at batch 128, policy auto: ")
    assert "the smallest plan needs" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_device_has_its_own_calibration(tmp_path: Path) -> None:
    record = tmp_path / "device.json"
    record.write_text(json.dumps({"calibration": {"fixed_bytes": 5 << 20, "kept": 0.0}, "stages": 10}))

    def scratch(*options: str) -> int:
        (stage,) = json.loads(plan(MODEL, "--budget", "1GiB", "--json", *options))["plan"]["stages"]
        return int(stage["predicted"]["scratch"])

    assert scratch("--calibration", str(record)) >= 5 << 20
    record.write_text("{}")
    with pytest.raises(ConfigError, match="holds no calibration"):
        scratch("--calibration", str(record))
