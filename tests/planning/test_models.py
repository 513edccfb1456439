"""How many models a plan trains: what surplus memory holds, and never at the cost of the one that is uploaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.costs import Calibration, ModelCosts, PassCost, Size, StepCost
from fedepth.errors import PlanError
from fedepth.estimate.peak import build_peak, cache_bytes_in, effective_batch, needed_bytes, training_step
from fedepth.estimate.timeline import timeline
from fedepth.plan import MOST_MODELS, CachePlace, Ending, PeakComponents, Plan, Policy
from fedepth.planning.check import check_plan
from fedepth.planning.explain import explain
from fedepth.planning.planner import estimated_work, full_training_peak, make_plan
from fedepth.task import TrainingSpec
from tests.drawn_costs import models
from tests.unit_costs import model_costs, unit_cost

TRAINING = TrainingSpec(8, 2, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
DEVICE = Calibration(fixed_bytes=20_000, kept=0.7, kernel_share=2.0, depthwise_share=9.5, reordered_share=0.95)
BARE = Calibration(fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0)
FLOPS = 10**6  # of a unit, for a sample
LOGITS = 12  # bytes of one sample's
EXIT = unit_cost("exit", parameter_bytes=100, input_bytes=40)


def by_hand() -> ModelCosts:
    """Two units of 1,000 bytes, whose activations are 50 a sample each, and a head of 100."""
    units = (
        unit_cost(
            "a", parameter_bytes=1000, input_bytes=20, output_bytes=30, saved=Size(0, 50), exit_=EXIT, flops=FLOPS
        ),
        unit_cost(
            "b", parameter_bytes=1000, input_bytes=30, output_bytes=40, saved=Size(0, 50), exit_=EXIT, flops=FLOPS
        ),
    )
    return replace(model_costs(*units, input_bytes=20, raw_input_bytes=5, calibration=BARE), logit_bytes=LOGITS)


def components(costs: ModelCosts, count: int, **more: bool) -> dict[str, PeakComponents]:
    step = training_step(
        costs, TRAINING, 0, 1, 8, accumulates=more.pop("accumulates", False), cache_bytes=40, models=count, **more
    )
    return dict(step.moments)


def test_weights_and_state_are_there_once_for_each_model_and_activations_of_one() -> None:
    one, two = components(by_hand(), 1), components(by_hand(), 2)
    assert {"logits 0", "logits 1", "logits exit"} == two.keys() - one.keys()
    alone, peer = one["backward 0"], two["backward 0"]
    assert (alone.parameters, alone.optimizer_state, alone.gradients) == (2100, 2100, 1000)
    assert (peer.parameters, peer.optimizer_state, peer.gradients) == (4200, 4200, 1000)
    # input and 50 of unit 0, each a sample; and what both models say of the samples
    assert alone.activations == 8 * (20 + 50)
    assert peer.activations == alone.activations + 2 * 8 * LOGITS
    assert peer.cache == alone.cache == 40
    # Without autograd: the logits, a unit's input and its output.
    said = two["logits 1"]
    assert (said.activations, said.temporaries, said.gradients) == (2 * 8 * LOGITS, 8 * (30 + 40), 0)
    # The exit keeps the logarithms of both, and compares them.
    assert two["forward exit"].activations == one["forward exit"].activations + 2 * 8 * LOGITS + 2 * 8 * LOGITS
    assert two["forward exit"].temporaries == one["forward exit"].temporaries + 4 * 8 * LOGITS


def test_sums_of_gradients_are_there_for_each_model() -> None:
    one, three = (components(by_hand(), count, accumulates=True)["forward 0"] for count in (1, 3))
    assert (one.gradients, three.gradients) == (2100, 6300)


def test_what_the_author_froze_is_there_once_and_fedprox_keeps_one_reference() -> None:
    costs = by_hand()
    costs = replace(costs, units=(replace(costs.units[0], fixed_bytes=500), costs.units[1]))
    training = replace(TRAINING, proximal_mu=0.1)
    step = training_step(costs, training, 0, 1, 8, accumulates=False, cache_bytes=0, models=3)
    assert step.resident.parameters == 3 * 2100 + 500 + 2100


def test_the_work_of_a_peer_is_a_model_more_and_a_forward_pass() -> None:
    costs = by_hand()
    plans = [make_plan(costs, budget_bytes=1 << 40, training=replace(TRAINING, mutual=count), sample_count=16,
                       policy=Policy.AUTO) for count in (1, 2, 3)]  # fmt: skip
    one, two, three = (estimated_work(costs, TRAINING, 16, plan) for plan in plans)
    forward = 2 * FLOPS * 2 * 16  # flops of two units, epochs, samples
    assert [plan.models for plan in plans] == [1, 2, 3]
    assert two == pytest.approx(2 * one + forward)
    assert three == pytest.approx(3 * one + 2 * forward)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(Policy), st.integers(2, 4), st.booleans())
def test_no_unit_and_no_stage_is_given_for_a_peer_and_more_memory_never_gives_fewer(
    data: st.DataObject, policy: Policy, most: int, prox: bool
) -> None:
    costs = replace(data.draw(models(DEVICE)), logit_bytes=40)
    training = replace(TRAINING, batch=data.draw(st.integers(1, 8)), proximal_mu=0.1 if prox else 0.0)
    samples = data.draw(st.integers(costs.smallest_micro_batch, 40))
    batch = effective_batch(costs, training, samples)
    first, last = costs.first_trained, len(costs.units) - 1

    def need(count: int, place: CachePlace) -> int:
        cached = cache_bytes_in(place, costs, training, first, samples)
        step = training_step(
            costs, training, first, last, batch, accumulates=False, cache_bytes=cached, models=count
        ).peak.total
        build = min(
            build_peak(costs, 0, first, 1, source_bytes=0, cache_bytes=cached, streamed=streamed).total
            for streamed in (False, True)
        )
        return needed_bytes(max(step, build))

    needs = {count: min(need(count, place) for place in CachePlace) for count in range(1, most + 1)}
    budgets = sorted({n + change for n in needs.values() for change in (-1, 0)} | {data.draw(st.integers(0, 1 << 23))})
    before = 0
    for budget in budgets:
        plans = []
        for count in (1, most):
            try:
                plans.append(
                    make_plan(
                        costs,
                        budget_bytes=budget,
                        training=replace(training, mutual=count),
                        sample_count=samples,
                        policy=policy,
                    )
                )
            except PlanError:
                plans.append(None)
        alone, chosen = plans
        if alone is None or chosen is None:
            assert alone is chosen
            continue
        assert alone.models == 1
        fitting = [count for count in range(2, most + 1) if needs[count] <= budget]
        assert chosen.models == max(fitting, default=1) >= before
        before = chosen.models
        assert needed_bytes(chosen.predicted_peak_bytes) <= budget
        if chosen.models == 1:
            assert chosen == alone
            continue
        assert (chosen.ending, chosen.untrained, len(chosen.stages)) == (Ending.LAST_UNIT, (), 1)
        assert (alone.ending, alone.untrained, len(alone.stages)) == (Ending.LAST_UNIT, (), 1)
        assert (chosen.stages[0].micro_batch, chosen.stages[0].checkpoint) == (batch, False)
        check_plan(costs, chosen)
        drawn = timeline(costs, training, samples, chosen)
        assert max(moment.components.total for moment in drawn) == chosen.predicted_peak_bytes


def test_a_plan_that_goes_on_behind_a_trained_block_has_one_model() -> None:
    costs = by_hand()
    training = replace(TRAINING, mutual=2)
    whole = make_plan(costs, budget_bytes=1 << 40, training=training, sample_count=16, policy=Policy.AUTO)
    done = replace(whole.stages[0], last=0)
    rest = make_plan(costs, budget_bytes=1 << 40, training=training, sample_count=16, policy=Policy.AUTO, done=done)
    assert (whole.models, rest.models) == (2, 1)


def test_a_job_cannot_ask_the_planner_for_more_than_there_may_be() -> None:
    plan = make_plan(
        by_hand(),
        budget_bytes=1 << 60,
        training=replace(TRAINING, mutual=1 << 40),
        sample_count=16,
        policy=Policy.PAPER,
    )
    assert plan.models == MOST_MODELS


def test_an_explanation_says_what_a_second_model_takes() -> None:
    costs = by_hand()
    training = replace(TRAINING, mutual=2)
    needs = [needed_bytes(full_training_peak(costs, training, 16, count).total) for count in (1, 2)]
    below = explain(costs, budget_bytes=needs[1] - 1, training=training, sample_count=16, policy=Policy.AUTO)
    assert below.plan.models == 1
    assert below.larger is not None
    assert (below.larger.budget_bytes, below.larger.plan.models) == (needs[1], 2)
    above = explain(costs, budget_bytes=needs[1], training=training, sample_count=16, policy=Policy.AUTO)
    assert above.plan.blocks == "0-1 (2 models)"
    assert above.least_bytes == needs[1]
    assert above.smaller is not None
    assert above.smaller.plan.models == 1
    assert above.larger is None


@pytest.mark.parametrize(
    "changes",
    [{"models": 0}, {"models": MOST_MODELS + 1}, {"untrained": (0,)}, {"stages": ()}],
    ids=["none", "too many", "a unit untrained", "no stage"],
)
def test_a_plan_of_models_that_cannot_be_is_refused(changes: dict[str, object]) -> None:
    costs = by_hand()
    plan = make_plan(
        costs, budget_bytes=1 << 40, training=replace(TRAINING, mutual=2), sample_count=16, policy=Policy.PAPER
    )
    check_plan(costs, plan)
    wrong: Plan = replace(plan, **changes)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"the plan trains \d+ models in the blocks .*; up to 8 are trained, and only"):
        check_plan(costs, wrong)


def test_two_stages_of_several_models_are_refused() -> None:
    costs = by_hand()
    stage = make_plan(costs, budget_bytes=1 << 40, training=TRAINING, sample_count=16, policy=Policy.PAPER).stages[0]
    plan = Plan((replace(stage, last=0), replace(stage, first=1)), (), Policy.PAPER, 1, models=2)
    with pytest.raises(PlanError, match="the plan trains 2 models"):
        check_plan(costs, plan)


def test_a_step_of_the_traced_kind_counts_what_a_divergence_keeps() -> None:
    """An exit that holds more than the others see: the peak moves there, and grows by what is compared."""
    heavy = replace(EXIT, training=StepCost(Size(0, 1000), True, False, PassCost(Size(0, 0)), PassCost(Size(0, 0))))
    costs = by_hand()
    costs = replace(costs, units=(costs.units[0], replace(costs.units[1], exit=heavy)))
    one, two = (
        training_step(costs, TRAINING, 0, 1, 8, accumulates=False, cache_bytes=0, models=count).peak for count in (1, 2)
    )
    assert two.activations - one.activations == 4 * 8 * LOGITS
    assert two.temporaries - one.temporaries == 4 * 8 * LOGITS
