"""What is predicted of a loss with teachers, against a trace of that loss; and where logits are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import PlanError
from fedepth.estimate.peak import logits_peak, logits_way, needed_bytes, training_step
from fedepth.estimate.teachers import LOGITS_IN_RAM_BYTES, kept_logits_bytes, logits_place, taught
from fedepth.estimate.timeline import timeline
from fedepth.estimate.tracing import StepTrace, _filled, _input_like, _inputs_inside, _trace
from fedepth.models.auxiliary import with_auxiliary
from fedepth.models.export import export_model
from fedepth.models.graph import Graph
from fedepth.models.preresnet import PreResNet
from fedepth.models.skip import skip
from fedepth.plan import CachePlace, PeakComponents, Policy, Stage
from fedepth.planning.planner import make_plan, smallest_peak
from fedepth.task import Distil, Heads, TrainingSpec
from fedepth.training.objective import Teachers, objective
from tests.training.jobs import PRERESNET, SPEC, traced
from tests.unit_costs import unit_cost

PLAIN = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
DISTILLING = replace(PLAIN, distil=Distil.GLOBAL)
CLASSES = 700  # logits that are larger than anything else behind a small head


@pytest.fixture(scope="module")
def graphs() -> dict[Heads, Graph]:
    torch.manual_seed(0)
    plain = export_model(PreResNet(1, CLASSES), "preresnet", (1, 8, 8), "F32", CLASSES)
    return {Heads.SHARED: plain.graph, Heads.AUXILIARY: with_auxiliary(plain, CLASSES, seed=1).graph}


def trace_exit(graph: Graph, index: int, samples: int, temperature: float, teachers: int) -> StepTrace:
    """One exit and the loss as they run in a trainer."""
    with FakeTensorMode():
        model = _filled(graph)
        exit_ = model.exit(index)

        def step(x: torch.Tensor) -> torch.Tensor:
            given = tuple(torch.empty(len(x), CLASSES) for _ in range(teachers))
            groups = [Teachers(given, 1.0, temperature)] if given else []
            logits = exit_(skip(x, exit_.unit.input_shape))
            return objective(logits, targets=torch.zeros(len(x), dtype=torch.int64), batch=8, teachers=groups)

        x = _inputs_inside(model)[index + 1].make(samples, grad=True)
        assert _input_like(x).shape == graph.output_shapes[index]
        return _trace(step, (exit_,), x)


@pytest.mark.parametrize("heads", Heads)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("samples", [2, 16])
def test_a_teacher_takes_no_more_than_is_predicted(
    graphs: dict[Heads, Graph], heads: Heads, temperature: float, samples: int
) -> None:
    graph = graphs[heads]
    alone, both = (trace_exit(graph, 3, samples, temperature, count) for count in (0, 1))
    cost = unit_cost("exit")
    extra = taught(cost, ModelCosts("m", (), 0, 0, 1, logit_bytes=4 * CLASSES), DISTILLING).training
    logits = 4 * CLASSES * samples
    saved = extra.saved.at(samples) - cost.training.saved.at(samples)
    assert saved == 3 * logits
    assert logits <= both.saved - alone.saved <= saved
    for more, less, kind in ((both.forward, alone.forward, "forward"), (both.backward, alone.backward, "backward")):
        passed = getattr(extra, kind).peak.at(samples) - getattr(cost.training, kind).peak.at(samples)
        saved_more = both.saved - alone.saved
        assert saved_more + more - less <= saved + passed
        assert saved + passed <= saved_more + more - less + 7 * logits  # nor far from it


def test_without_distillation_nothing_is_added() -> None:
    cost = unit_cost("exit")
    costs = ModelCosts("m", (), 0, 0, 1, logit_bytes=4000)
    assert taught(cost, costs, PLAIN) is cost
    assert kept_logits_bytes(costs, PLAIN, 100) == 0


def test_few_logits_lie_in_ram_and_many_in_a_file() -> None:
    costs = ModelCosts("m", (), 0, 0, 1, logit_bytes=400)
    most = LOGITS_IN_RAM_BYTES // 400
    assert logits_place(costs, most) is CachePlace.RAM
    assert kept_logits_bytes(costs, DISTILLING, most) == 400 * most
    assert logits_place(costs, most + 1) is CachePlace.DISK
    # Plans are made for up to 1/128 more samples than a device has: those keep to its RAM as well.
    assert kept_logits_bytes(costs, DISTILLING, most * 129 // 128) == LOGITS_IN_RAM_BYTES
    assert kept_logits_bytes(costs, DISTILLING, most * 2) == 0


def test_logits_are_computed_as_fast_as_the_stages_own_peak_allows() -> None:
    """Of two units that hold 1,000 and 2,000 bytes and pass on 10 a sample, and a head of 500 that gives 8."""
    nothing = Calibration(fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0)
    head = unit_cost("head", parameter_bytes=500, input_bytes=10)
    first = unit_cost(parameter_bytes=1000, input_bytes=10, output_bytes=10)
    second = unit_cost(parameter_bytes=2000, input_bytes=10, output_bytes=10, exit_=head)
    costs = ModelCosts("m", (first, second), 40, 10, 1, nothing, logit_bytes=8)

    def peak(samples: int, streamed: bool) -> int:
        return logits_peak(costs, 0, samples, cache_bytes=7, streamed=streamed).total

    assert peak(1, False) >= 3500 + 7 + 20
    assert 2000 + 7 + 20 <= peak(1, True) < 3500
    room = PeakComponents(peak(4, False), 0, 0, 0, 0, 0, 0)
    stage = Stage(0, 1, 8, CachePlace.DISK, 8, room)
    assert logits_way(costs, DISTILLING, stage, 1 << 20) == (8, True)  # the batch at once, unit by unit, is quicker
    assert logits_way(costs, DISTILLING, replace(stage, predicted=replace(room, parameters=0)), 1 << 20) == (1, True)


@pytest.mark.parametrize("spec", [SPEC, PRERESNET], ids=lambda spec: spec.name)
@pytest.mark.parametrize("heads", Heads)
@pytest.mark.parametrize("distil", Distil)
def test_every_plan_keeps_to_its_budget_down_to_the_smallest(spec, heads: Heads, distil: Distil) -> None:  # type: ignore[no-untyped-def]
    costs = traced(spec, heads).costs
    training = replace(PLAIN, heads=heads, distil=distil)
    least = smallest_peak(costs, training, 40, Policy.AUTO)
    for budget in (least, least + 50_000, 2 * least, 8 * least):
        plan = make_plan(costs, budget_bytes=budget, training=training, sample_count=40, policy=Policy.AUTO)
        assert needed_bytes(plan.predicted_peak_bytes) <= budget
        moments = timeline(costs, training, 40, plan)
        for index, stage in enumerate(plan.stages):
            own = [moment.components.total for moment in moments if moment.stage == index]
            assert max(own) == stage.predicted_peak_bytes
        assert any(moment.label.startswith("logits head") for moment in moments) == (distil is Distil.GLOBAL)
    with pytest.raises(PlanError):
        make_plan(costs, budget_bytes=least - 1, training=training, sample_count=40, policy=Policy.AUTO)


def test_a_block_counts_the_head_at_its_own_end(graphs: dict[Heads, Graph]) -> None:
    shared, auxiliary = (traced(PRERESNET, heads).costs for heads in (Heads.SHARED, Heads.AUXILIARY))
    for last, (width, unit) in enumerate(zip((16,) * 4 + (32,) * 3 + (64,) * 2, auxiliary.units, strict=False)):
        assert unit.exit is not None
        assert unit.exit.parameter_bytes == 4 * (2 * width + 3 * width + 3)
        peak = training_step(auxiliary, PLAIN, last, last, 8, accumulates=True, cache_bytes=0).peak
        own = unit.parameter_bytes + unit.exit.parameter_bytes
        assert peak.optimizer_state == own
        assert peak.gradients >= own
    assert auxiliary.units[-1].exit == shared.units[-1].exit
