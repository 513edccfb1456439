"""Which units are trained, as [tuning] says: graphs, plans, and what a task trains of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from torch import nn

from fedepth.data.read import open_images
from fedepth.errors import ModelError
from fedepth.estimate.tracing import trace_costs
from fedepth.files import file_digest
from fedepth.job_sections import TuningSection
from fedepth.memory.meter import Baseline
from fedepth.models.export import export_model
from fedepth.models.fixed_statistics import with_fixed_statistics
from fedepth.models.graph import Graph, check
from fedepth.models.traced import TracedModel, write_traced
from fedepth.models.tuning import described, embeddings, tuned
from fedepth.plan import Policy, Stage
from fedepth.planning.planner import full_training_peak, make_plan
from fedepth.task import ModelSpec, TrainingSpec
from fedepth.training.session import Known, run
from fedepth.weights import load_numpy
from tests.training.jobs import PRERESNET, SPEC, TRAINING, TRANSFORMER, Quiet, assignment, exported, fresh, stage

CPU = torch.device("cpu")
ADAMW = replace(TRAINING, optimizer="adamw", weight_decay=0.1, learning_rate=1e-2)


class Silent(Quiet):
    """Hooks of a session."""

    def begin(self, epochs: int, baseline: Baseline) -> None: ...

    def rehearsing(self) -> None: ...


def graph_of(spec: ModelSpec, **settings: object) -> Graph:
    return tuned(exported(spec).graph, structs.replace(TuningSection(), **settings), spec.name)


def names(graph: Graph) -> list[set[str]]:
    """What an update holds of every unit."""
    return [{tensor.name for tensor in unit.tensors} for unit in graph.layout().units]


def test_by_default_everything_is_trained() -> None:
    for spec in (TRANSFORMER, PRERESNET):
        graph = exported(spec).graph
        assert graph_of(spec) is graph
        assert described(graph, graph) == ""


def test_a_vision_transformers_embeddings_are_its_patches_positions_and_class_token() -> None:
    whole = exported(TRANSFORMER).graph
    assert embeddings(whole) == 1
    graph = graph_of(TRANSFORMER, embeddings="frozen")
    check(graph)
    fixed = {"class_token", "conv_proj.bias", "conv_proj.weight", "encoder.pos_embedding"}
    assert set(graph.units[0].fixed) >= fixed
    assert names(graph) == [set(), *names(whole)[1:]]
    assert described(graph, whole) == (
        "[tuning] freezes the first 1 of 3 units, up to conv_proj; the last 2 and the head are trained"
    )


def test_only_the_last_units_are_trained() -> None:
    whole = exported(PRERESNET).graph
    for last_units in (0, 3, 10):
        graph = graph_of(PRERESNET, last_units=last_units)
        check(graph)
        assert names(graph) == [set()] * (10 - last_units) + names(whole)[10 - last_units :]
        frozen, trained_units = graph.units[: 10 - last_units], graph.units[10 - last_units :]
        assert all(unit.training == unit.evaluation for unit in frozen)
        assert trained_units == whole.units[10 - last_units :]
    assert "the head alone is trained" in described(graph_of(PRERESNET, last_units=0), whole)


def test_frozen_batch_norms_need_no_second_sample() -> None:
    graph = structs.replace(exported(PRERESNET).graph, smallest_micro_batch=2)
    found = [tuned(graph, TuningSection(last_units=count), "net").smallest_micro_batch for count in (0, 1)]
    assert found == [2, 2]  # the head has a BatchNorm of its own
    head = structs.replace(graph.head, training=graph.head.evaluation)
    graph = structs.replace(graph, head=head)
    assert [tuned(graph, TuningSection(last_units=n), "net").smallest_micro_batch for n in (0, 1)] == [1, 2]


def test_both_settings_freeze_what_either_does() -> None:
    assert names(graph_of(PRERESNET, last_units=10, embeddings="frozen"))[0] == set()
    assert graph_of(PRERESNET, last_units=4, embeddings="frozen") == graph_of(PRERESNET, last_units=4)


def test_more_units_than_there_are_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(ModelError, match=r"last_units is 11, but preresnet20 has 10 units"):
        graph_of(PRERESNET, last_units=11)
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh())
    graph = export_model(plain, "plain", (4,), "F32", 3).graph
    if graph.head.parameters:
        graph = structs.replace(graph, head=structs.replace(graph.head, parameters=(), fixed=graph.head.parameters))
    with pytest.raises(ModelError, match="leaves nothing of plain to train"):
        tuned(graph, TuningSection(last_units=0), "plain")


@pytest.mark.parametrize("policy", list(Policy))
def test_plans_begin_with_the_first_trained_unit(policy: Policy) -> None:
    graph = graph_of(PRERESNET, last_units=4)
    costs = trace_costs(graph, "preresnet20", TRAINING.batch)
    assert costs.first_trained == 6
    assert [unit.parameter_bytes > 0 for unit in costs.units] == [False] * 6 + [True] * 4
    plan = make_plan(costs, budget_bytes=1 << 30, training=TRAINING, sample_count=16, policy=policy)
    assert plan.blocks == "6-9"
    whole = trace_costs(exported(PRERESNET).graph, "preresnet20", TRAINING.batch)
    few, all_of_them = (full_training_peak(each, TRAINING, 16) for each in (costs, whole))
    assert few.activations < all_of_them.activations / 4
    assert few.total < all_of_them.total


def trained(folder: Path, graph: Graph, spec: ModelSpec, stages: list[Stage], training: TrainingSpec) -> set[str]:
    """Runs a task; the names of what it delivers, all of which has moved."""
    asked = assignment(folder, stages, spec, training=training)
    costs = [trace_costs(each, spec.name, training.batch) for each in (graph, with_fixed_statistics(graph))]
    write_traced(asked.graph, TracedModel(graph, *costs))
    frozen = 0
    while not graph.layout().units[frozen].tensors and frozen < stages[0].first:
        frozen += 1
    plan = replace(asked.plan, untrained=tuple(unit for unit in asked.plan.untrained if unit >= frozen))
    task = replace(asked.task, plan=plan, graph_digest=file_digest(asked.graph))
    result = run(replace(asked, plan=plan, task=task), Silent(), CPU, Known())
    before = load_numpy(asked.weights)
    after = {
        name: tensor
        for part in result.parts
        for name, tensor in load_numpy(asked.output / f"part-{part.part:04d}.safetensors").items()
    }
    assert all((tensor != before[name]).any() for name, tensor in after.items())
    return set(after)


@pytest.mark.parametrize("training", [TRAINING, ADAMW], ids=["sgd", "adamw"])
def test_frozen_embeddings_are_no_part_of_an_update(tmp_path: Path, training: TrainingSpec) -> None:
    """Neither by weight decay nor by momentum, in one stage of full depth and in two."""
    graph = graph_of(TRANSFORMER, embeddings="frozen")
    expected = {name for unit in names(graph) for name in unit} | set(graph.head.parameters)
    for number, stages in enumerate(([stage(1, 2)], [stage(1, 1), stage(2, 2)], [stage(0, 2)])):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert trained(folder, graph, TRANSFORMER, stages, training) == expected


def test_by_default_embeddings_are_trained_with_the_first_block_only(tmp_path: Path) -> None:
    graph = exported(TRANSFORMER).graph
    assert trained(tmp_path, graph, TRANSFORMER, [stage(0, 1), stage(2, 2)], ADAMW) == set(graph.tensors)
    first = load_numpy(tmp_path / "out" / "part-0000.safetensors")
    second = load_numpy(tmp_path / "out" / "part-0001.safetensors")
    assert first.keys() >= set(graph.units[0].parameters)
    assert second.keys() == set(graph.units[2].parameters)


@pytest.mark.parametrize("fixed_statistics", [False, True])
def test_only_the_last_units_and_the_head_are_delivered(tmp_path: Path, fixed_statistics: bool) -> None:
    graph = graph_of(PRERESNET, last_units=2)
    form = with_fixed_statistics(graph) if fixed_statistics else graph
    training = replace(ADAMW, fixed_statistics=fixed_statistics)
    expected = {tensor.name for tensor in form.layout().tensors}
    assert trained(tmp_path, graph, PRERESNET, [stage(8, 9)], training) == expected


def test_the_head_alone_is_trained(tmp_path: Path) -> None:
    graph = graph_of(SPEC, last_units=0)
    costs = trace_costs(graph, SPEC.name, TRAINING.batch)
    plan = make_plan(costs, budget_bytes=1 << 30, training=TRAINING, sample_count=16, policy=Policy.AUTO)
    assert plan.blocks == "5"
    assert trained(tmp_path, graph, SPEC, [stage(5, 5)], TRAINING) == set(graph.head.parameters)


def test_gradients_are_those_of_the_module_with_the_same_frozen(tmp_path: Path) -> None:
    """One step of full depth with the embeddings frozen, against plain autograd."""
    graph = graph_of(TRANSFORMER, embeddings="frozen")
    asked = assignment(tmp_path, [stage(1, 2)], TRANSFORMER, count=8, training=replace(TRAINING, local_epochs=1))
    write_traced(asked.graph, TracedModel(graph, trace_costs(graph, "vit", 8)))
    plan = replace(asked.plan, untrained=())
    asked = replace(asked, plan=plan, task=replace(asked.task, plan=plan))
    result = run(asked, Silent(), CPU, Known())
    got = {
        name: torch.from_numpy(tensor)
        for part in result.parts
        for name, tensor in load_numpy(asked.output / f"part-{part.part:04d}.safetensors").items()
    }
    module, images = fresh(TRANSFORMER), open_images(tmp_path, TRANSFORMER, "train")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in got)
    x = (torch.from_numpy(images.read(np.arange(8))).float() / 255 - 0.5) / 0.5
    update = torch.optim.SGD(
        [each for each in module.parameters() if each.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3
    )
    nn.functional.cross_entropy(module(x), torch.from_numpy(images.labels).long()).backward()
    update.step()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, module.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
