"""docs/benchmarks.md names every benchmark, with options that it has, and shows the figures that came; and the plans
and shares of benchmarks.experiments are what it says. What others say is shown as it is."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.core import TyperGroup

from benchmarks import encodings, federation
from benchmarks.experiments import __main__ as experiments
from benchmarks.experiments import depth, rows
from benchmarks.experiments.depth import even
from benchmarks.experiments.ground import Ground
from benchmarks.experiments.niid_bench import dealt
from edge_client.measure.trial import TrialModel
from fedepth.costs import Size
from fedepth.data.read import DIGITS
from fedepth.errors import ConfigError
from fedepth.planning.check import check_plan
from tests.experiment_tables import tables
from tests.pages import ROOT
from tests.unit_costs import model_costs, unit_cost

TEXT = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
# Lines may break inside of a command.
COMMANDS = sorted(set(re.findall(r"`python -m (benchmarks\.[\w.]+(?: [^`]+)?)`", " ".join(TEXT.split()))))
MIB = 1 << 20


def mains() -> Iterator[str]:
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        if re.search(r'^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.MULTILINE):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__main__")


def test_every_benchmark_is_on_the_page_and_there_is_no_other() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(mains())


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--" in command])
def test_its_options_are_those_of_the_program(command: str) -> None:
    name, *words = shlex.split(command)
    inside = ROOT / name.replace(".", "/") / "__main__.py"
    module = importlib.import_module(f"{name}.__main__" if inside.exists() else name)
    app = getattr(module, "app", None)
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(module.main)
    program = typer.main.get_command(app)
    assert not isinstance(program, TyperGroup), name
    known = {option for each in program.params for option in each.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_figures_of_the_experiments_are_those_that_came() -> None:
    for name, lines in tables():
        assert name in experiments.EXPERIMENTS
        missing = [line for line in lines if f"\n{line}\n" not in TEXT]
        assert not missing, f"{name}: python -m tests.experiment_tables has {missing}"


def test_the_figures_of_encodings_are_those_that_came() -> None:
    page = (ROOT / "docs" / "encodings.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "encodings.json").read_bytes())
    assert not found["quick"]
    names = {
        **{name: name for name in encodings.RUNS},
        "int8_without_feedback": "int8 whose devices forget what it leaves out",
    }
    assert found["encodings"].keys() == names.keys()
    for name, row in found["encodings"].items():
        accuracy = f"{row['accuracy_mean']:.1%}".removesuffix("%") + f" ± {row['accuracy_std']:.1%}".removesuffix("%")
        assert f"| {names[name]} | {accuracy} % | {row['bytes_up'] / MIB:.1f} MiB |" in page
        assert (row["rounds"], row["seeds"]) == (30, 2)


@pytest.mark.parametrize("units", range(1, 30))
def test_blocks_are_even_and_leave_nothing_out(units: int) -> None:
    for count in range(1, units + 1):
        found = even(units, count)
        assert [unit for first, last in found for unit in range(first, last + 1)] == list(range(units))
        sizes = [last - first + 1 for first, last in found]
        assert len(found) == count and max(sizes) - min(sizes) <= 1


def test_the_shares_of_niid_bench_are_whole_and_none_far_above_an_equal_one() -> None:
    labels = np.arange(5000) % 10
    parts = dealt(labels, 10, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(5000))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 10 and len(set(sizes)) > 1
    # Nobody with 500 samples is given more, and a class has 500.
    assert max(sizes) < 1000
    assert all(np.array_equal(left, right) for left, right in zip(parts, dealt(labels, 10, seed=1), strict=True))


def test_the_set_ups_are_plans_that_can_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training: units that are made up, each with a peak that its predicted one stands for."""
    costs = model_costs(
        *(
            unit_cost(
                f"unit {number}",
                parameter_bytes=MIB << max(0, number - 8),
                input_bytes=64 << 10,
                output_bytes=64 << 10,
                saved=Size(0, (10 - number) * 20 << 10),
                flops=1_000_000,
                exit_=unit_cost("head", parameter_bytes=1 << 10, input_bytes=64 << 10),
            )
            for number in range(10)
        ),
        input_bytes=1 << 10,
        raw_input_bytes=256,
    )
    ground = Ground(experiments.EXPERIMENTS["blocks"].full, tmp_path, DIGITS, lambda text: None)
    model = TrialModel(ground.spec, ground.training, costs, tmp_path / "graph", tmp_path / "weights")
    asked: list[Fraction] = []

    def network(width: Fraction) -> TrialModel:
        asked.append(width)
        units = tuple(replace(unit, parameter_bytes=int(unit.parameter_bytes * width)) for unit in costs.units)
        return replace(model, costs=replace(costs, units=units))

    monkeypatch.setattr(ground, "network", network)
    monkeypatch.setattr(ground, "peak", lambda plan, width=Fraction(1): int(plan.predicted_peak_bytes * width))
    clients = ground.scale.clients
    for experiment in (depth.budgets, depth.blocks, depth.epochs, depth.partial, depth.slices):
        setups = list(experiment(ground))
        assert len({setup.name for setup in setups}) == len(setups) > 4
        for setup in setups:
            assert len(setup.plans) == clients
            for plan in setup.plans:
                check_plan(costs, plan)
                assert plan.predicted_peak_bytes <= plan.budget_bytes
    assert [len(setup.plans[0].stages) for setup in depth.blocks(ground)] == [1, 2, 3, 5, 9]
    left_out = [setup for setup in depth.partial(ground) if setup.drawn_from]
    for setup in left_out:
        assert all(not setup.plans[number].untrained for number in setup.drawn_from)
        assert len(setup.drawn_from) >= ground.scale.drawn
    by_name = {setup.name: setup.facts for setup in depth.slices(ground)}
    for level, reference in (("least", "layer-wise"), ("half", "full")):
        most = by_name[reference]["measured_peak_bytes"] * (0.5 if level == "half" else 1.0) * 1.05
        assert by_name[f"depth-{level}"]["measured_peak_bytes"] <= most
        assert by_name[f"width-{level}"]["measured_peak_bytes"] <= most
    assert asked


def test_rows_are_split_in_an_order_that_is_drawn_and_always_the_same(tmp_path: Path) -> None:
    news = tmp_path / "news.csv.gz"
    with gzip.open(news, "wt") as file:
        file.writelines(f'"{1 + number % 4}","title {number}","a ""text"", {number}"\n' for number in range(50))
    diamonds = tmp_path / "diamonds.csv"
    diamonds.write_text('"carat","cut"\n' + "".join(f'{number},"Ideal"\n' for number in range(50)))
    for make, file, tests in ((rows.ag_news, news, 30), (rows.diamonds, diamonds, 5)):
        found = []
        for folder in (tmp_path / "one", tmp_path / "two"):
            made = make(file, 20, folder)
            found.append([(made / f"{split}.csv").read_text().splitlines() for split in ("train", "test")])
        train, test = found[0]
        assert found[0] == found[1] and (len(train), len(test)) == (21, 1 + tests)  # with the names of the columns
        assert not {*train[1:]} & {*test[1:]} and train[1:] != sorted(train[1:])


@pytest.mark.parametrize(
    "name", [name for name, experiment in experiments.EXPERIMENTS.items() if experiment.source is not None]
)
def test_data_that_are_not_given_are_asked_for_by_their_option(tmp_path: Path, name: str) -> None:
    experiment = experiments.EXPERIMENTS[name]
    assert experiment.source is not None
    with pytest.raises(ConfigError, match=f"^{name} needs {experiment.source.option}: "):
        experiments.data_of(name, experiment.full, tmp_path, {experiment.source.option: None})


@pytest.mark.parametrize("event", [{"event": "task_failed", "device": "small-1"}, {"event": "log"}])
def test_a_message_is_shown_as_it_is(event: dict[str, Any]) -> None:
    """torch begins its own with a place in brackets, which is no markup."""
    message = "met its limit: [enforce fail at alloc_cpu.cpp:127] can't allocate memory [/bold]"
    shown = io.StringIO()
    Console(file=shown, width=200).print(federation._line({**event, "message": message}))
    assert message in shown.getvalue()
