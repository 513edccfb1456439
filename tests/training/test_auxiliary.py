"""Auxiliary heads: blocks trained on classifiers of their own, against plain torch loops; and what an update holds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedepth.errors import ModelError, PlanError
from fedepth.memory.meter import Meter
from fedepth.models.auxiliary import with_auxiliary
from fedepth.models.export import export_model
from fedepth.models.graph import Graph
from fedepth.models.run import Model
from fedepth.plan import Ending, Plan, Policy
from fedepth.task import Heads, ModelSpec
from fedepth.training.session import Known, run
from fedepth.training.stages import train
from fedepth.weights import load_numpy
from tests.training.jobs import (
    FROZEN,
    PRERESNET,
    SPEC,
    TOKENS,
    TRAINING,
    TRANSFORMER,
    VECTORS,
    Quiet,
    Tensors,
    assert_equal,
    assignment,
    context,
    exported_with,
    fresh,
    parts_of,
    stage,
    trained_tensors,
)
from tests.training.test_stages import order

AUXILIARY = replace(TRAINING, heads=Heads.AUXILIARY)


def graph_of(spec: ModelSpec) -> Graph:
    return exported_with(spec, Heads.AUXILIARY).graph


def classifier(index: int, tensors: dict[str, torch.Tensor]) -> nn.Sequential:
    """The auxiliary head of a convolutional network as one would write it."""
    weight = tensors[f"auxiliary.{index}.linear.weight"]
    found = nn.Sequential(
        nn.GroupNorm(1, weight.shape[1]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(weight.shape[1], 3)
    )
    for at, module in (("norm", found[0]), ("linear", found[3])):
        for kind in ("weight", "bias"):
            with torch.no_grad():
                module.get_parameter(kind).copy_(tensors[f"auxiliary.{index}.{at}.{kind}"])
    return found


def by_hand(folder: Path, spec: ModelSpec, blocks: list[tuple[int, int]]) -> Tensors:
    """m-FeDepth, written as plainly as possible: every block but the one at the end with a classifier of its own."""
    job = context(folder, [stage(*block) for block in blocks], spec, AUXILIARY)
    start = {name: tensor.clone() for name, tensor in exported_with(spec, Heads.AUXILIARY).tensors.items()}
    module = fresh(spec)
    units, head = parts_of(module)
    x = (torch.from_numpy(job.images.read(np.arange(16))).float() / 255 - 0.5) / 0.5
    y = torch.from_numpy(job.images.labels)
    found: Tensors = {}
    for index, (first, last) in enumerate(blocks):
        block = nn.Sequential(*units[first : last + 1])
        end = head if last == len(units) - 1 else classifier(last, start)
        optimizer = torch.optim.SGD([*block.parameters(), *end.parameters()], lr=0.05, momentum=0.9, weight_decay=1e-3)
        block.train()
        end.train()
        for batch in order(job, index, 16):
            optimizer.zero_grad()
            functional.cross_entropy(end(block(x[batch])), y[batch]).backward()
            optimizer.step()
        block.eval()
        with torch.no_grad():
            x = block(x)
        if end is not head:
            for at, layer in (("norm", end[0]), ("linear", end[3])):  # type: ignore[index]
                for kind in ("weight", "bias"):
                    found[f"auxiliary.{last}.{at}.{kind}"] = layer.get_parameter(kind).detach().numpy()
    return {**{name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}, **found}


@pytest.mark.parametrize("spec", [SPEC, PRERESNET], ids=["group norm", "batch norm"])
def test_every_block_is_trained_on_the_classifier_at_its_end(tmp_path: Path, spec: ModelSpec) -> None:
    last = len(graph_of(spec).units) - 1
    blocks = [(0, 1), (2, 3), (4, last)]
    got = trained_tensors(context(tmp_path, [stage(*block) for block in blocks], spec, AUXILIARY))
    assert_equal(got, by_hand(tmp_path, spec, blocks), 2e-5)


def test_micro_batches_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    """The classifiers have no statistics of a batch, so that they add none."""
    blocks = [(0, 1), (2, 5)]
    cut = [replace(stage(*block, micro_batch=3), checkpoint=True) for block in blocks]
    assert_equal(trained_tensors(context(tmp_path, cut, SPEC, AUXILIARY)), by_hand(tmp_path, SPEC, blocks), 2e-5)


@pytest.mark.parametrize("spec", [SPEC, PRERESNET, TRANSFORMER, TOKENS, VECTORS, FROZEN], ids=lambda spec: spec.name)
def test_an_update_holds_what_its_plan_says_to_the_name(tmp_path: Path, spec: ModelSpec) -> None:
    graph = graph_of(spec)
    last = len(graph.units) - 1
    assert all(graph.exits)  # also behind an embedding, where no skip connection leads to the head
    outcome = train(context(tmp_path, [stage(0, 0), stage(1, last)], spec, AUXILIARY), Meter(), Quiet())
    held = [name for part in outcome.parts for name in load_numpy(part)]
    assert sorted(held) == sorted(tensor.name for tensor in graph.layout().trained_tensors(outcome.plan))
    assert {name.split(".")[1] for name in held if name.startswith("auxiliary.")} == {"0"}
    assert {name for unit in graph.units for name in unit.trained_names} | set(graph.head.trained_names) <= set(held)


@given(st.data(), st.sampled_from([SPEC, PRERESNET]))
def test_the_heads_in_an_update_are_those_at_the_ends_of_its_blocks(data: st.DataObject, spec: ModelSpec) -> None:
    graph = graph_of(spec)
    count = len(graph.units)
    first, behind = sorted(data.draw(st.lists(st.integers(0, count), min_size=2, max_size=2, unique=True)))
    cuts = sorted(data.draw(st.sets(st.integers(first + 1, behind - 1)))) if behind - first > 1 else []
    starts = [first, *cuts]
    stages = [stage(one, other - 1) for one, other in zip(starts, [*cuts, behind], strict=True)]
    frozen_suffix = behind < count and data.draw(st.booleans())
    stages[-1] = replace(stages[-1], frozen_suffix=frozen_suffix)
    plan = Plan(tuple(stages), (*range(first), *range(behind, count)), Policy.AUTO, 0)
    names = [tensor.name for tensor in graph.layout().trained_tensors(plan)]
    assert len(names) == len(set(names))
    ends = {each.last for each in stages if not each.frozen_suffix} - {count - 1}
    heads = {int(name.split(".")[1]) for name in names if name.startswith("auxiliary.")}
    assert heads == ends
    assert set(graph.head.trained_names).isdisjoint(names) == (behind < count and not frozen_suffix)


def test_a_client_that_cannot_train_the_last_units_trains_the_head_at_its_end(tmp_path: Path) -> None:
    outcome = train(context(tmp_path, [stage(1, 2)], SPEC, AUXILIARY), Meter(), Quiet())
    assert outcome.plan.ending is Ending.FROZEN_HEAD
    names = {name for part in outcome.parts for name in load_numpy(part)}
    assert {name for name in names if not name.startswith("units.")} == {
        f"auxiliary.2.{at}.{kind}" for at in ("norm", "linear") for kind in ("weight", "bias")
    }


def test_through_a_frozen_suffix_the_models_own_head_is_trained(tmp_path: Path) -> None:
    stages = [stage(0, 1), replace(stage(2, 3), frozen_suffix=True)]
    names: list[set[str]] = []
    for training in (TRAINING, AUXILIARY):
        outcome = train(context(tmp_path, stages, SPEC, training), Meter(), Quiet())
        names.append({name for part in outcome.parts for name in load_numpy(part)})
    usual, found = names
    assert usual <= found
    assert {name.partition(".linear")[0].partition(".norm")[0] for name in found - usual} == {"auxiliary.1"}


def test_the_plan_may_end_anywhere_when_memory_shrinks(tmp_path: Path) -> None:
    """With a shared head that a block has trained, plans past the head are out; a block's own head binds nothing."""
    job = context(tmp_path, [stage(0, 1), stage(2, 5)], SPEC, AUXILIARY)
    asked: list[tuple[Ending, ...]] = []

    def plan(*_: object, endings: tuple[Ending, ...], **__: object) -> Plan:
        asked.append(endings)
        raise PlanError("nothing", needed_bytes=1, budget_bytes=0)

    class Shrinking(Quiet):
        def measure(self, stage: int, held_bytes: int) -> int:
            return 0 if stage else 1 << 40

    with pytest.MonkeyPatch.context() as patch, pytest.raises(PlanError):
        patch.setattr("fedepth.training.stages.make_plan", plan)
        train(job, Meter(), Shrinking())
    assert asked == [tuple(Ending)]


def test_the_model_alone_is_what_it_was() -> None:
    graph, plain = (exported_with(PRERESNET, heads).graph for heads in (Heads.AUXILIARY, Heads.SHARED))
    alone = graph.without_auxiliary
    assert (alone.units, alone.head, alone.tensors) == (plain.units, plain.head, plain.tensors)
    assert Model(alone).auxiliary == ()
    assert plain.without_auxiliary is plain


@pytest.mark.parametrize(("heads", "said"), [(Heads.SHARED, "some auxiliary"), (Heads.AUXILIARY, "no auxiliary")])
def test_a_task_and_a_graph_that_do_not_agree_are_refused(tmp_path: Path, heads: Heads, said: str) -> None:
    other = Heads.AUXILIARY if heads is Heads.SHARED else Heads.SHARED
    given = assignment(tmp_path, [stage(0, 5)], training=replace(TRAINING, heads=other))
    asked = replace(given, task=replace(given.task, training=replace(TRAINING, heads=heads)))
    with pytest.raises(ModelError, match=said):
        run(asked, Quiet(), torch.device("cpu"), Known())  # type: ignore[arg-type]


def test_names_of_the_model_and_of_its_heads_must_differ() -> None:
    class Clashing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auxiliary = nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.auxiliary[1](torch.relu(self.auxiliary[0](x)))
            return logits

    with pytest.raises(ModelError, match=r"tensor auxiliary\.0\.bias.*rename that module"):
        with_auxiliary(export_model(Clashing(), "clashing", (12,), "F32", 3), 3, seed=0)


def test_equal_seeds_give_equal_heads() -> None:
    plain = exported_with(VECTORS, Heads.SHARED)
    one, again, other = (with_auxiliary(plain, 3, seed=seed).tensors for seed in (1, 1, 2))
    name = "auxiliary.0.linear.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


def test_stages_do_not_hold_heads_of_others(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 1), stage(2, 3)], SPEC, AUXILIARY)
    train(job, Meter(), Quiet())
    loaded = itertools.chain(job.model.units, [job.model.head], filter(None, job.model.auxiliary))
    assert not any(unit.tensors for unit in loaded)
