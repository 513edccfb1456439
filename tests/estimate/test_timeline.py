"""Memory over time: its peak is the plan's, stage by stage."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.costs import Calibration, ModelCosts, Size
from fedepth.estimate.peak import needed_bytes
from fedepth.estimate.timeline import timeline
from fedepth.plan import CachePlace, Policy
from fedepth.planning.planner import full_training_peak, make_plan, smallest_peak
from fedepth.task import TrainingSpec
from tests.drawn_costs import models
from tests.unit_costs import unit_cost

KIB = 1024
TRAINING = TrainingSpec(8, 1, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)
BARE = Calibration(fixed_bytes=0, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0)


def model(count: int) -> ModelCosts:
    """Units that keep their input of 10 KiB and 100 KiB of every sample, and have 4 KiB of weights in one tensor."""
    one = unit_cost(
        parameter_bytes=4 * KIB,
        input_bytes=10 * KIB,
        output_bytes=10 * KIB,
        saved=Size(0, 100 * KIB),
        flops=1000,
        exit_=unit_cost("exit", input_bytes=10 * KIB, flops=1000),
    )
    return ModelCosts("hand", (one,) * count, 10 * KIB, 2 * KIB, 1, BARE)


def test_the_moments_of_two_stages_in_order() -> None:
    costs = model(3)
    two_units = needed_bytes(int(2.2 * 1024) * KIB)
    plan = make_plan(costs, budget_bytes=two_units, training=TRAINING, sample_count=8, policy=Policy.PAPER)
    assert plan.blocks == "0 | 1-2"
    assert [stage.cache for stage in plan.stages] == [CachePlace.RAM, CachePlace.RAM]
    moments = timeline(costs, TRAINING, 8, plan)
    assert [(moment.stage, moment.label) for moment in moments] == [
        (0, "build"), (0, "forward 0"), (0, "forward exit"), (0, "backward exit"), (0, "backward 0"),
        (1, "build 0"), (1, "forward 1"), (1, "forward 2"), (1, "forward exit"),
        (1, "backward exit"), (1, "backward 2"), (1, "backward 1"),
    ]  # fmt: skip
    by_label = {(moment.stage, moment.label): moment.components for moment in moments}
    # Eight samples: pixels of 2 KiB, the inputs of unit 1 of 10 KiB; both caches live while the second is built.
    assert by_label[0, "build"].cache == 16 * KIB
    assert by_label[1, "build 0"].cache == (16 + 80) * KIB
    assert by_label[1, "forward 1"].cache == 80 * KIB
    assert by_label[1, "build 0"].parameters == 4 * KIB
    # The second unit of the block runs beside what the first has saved.
    assert by_label[1, "forward 1"].activations == (80 + 800) * KIB
    assert by_label[1, "forward 2"].activations == (80 + 800 + 80 + 800) * KIB
    assert by_label[1, "forward 2"].gradients == 0
    assert by_label[1, "backward 2"].gradients == 4 * KIB


def test_with_checkpointing_every_unit_runs_again() -> None:
    costs = model(2)
    tight = needed_bytes((3 * 10 + 100 + 20 + 5 * 8) * KIB)
    plan = make_plan(costs, budget_bytes=tight, training=TRAINING, sample_count=8, policy=Policy.AUTO)
    assert plan.stages[0].checkpoint
    labels = [moment.label for moment in timeline(costs, TRAINING, 8, plan)]
    assert labels[-6:] == ["again exit", "backward exit", "again 1", "backward 1", "again 0", "backward 0"]
    assert labels[:3] == ["build", "forward 0", "forward 1"]


@settings(max_examples=150, deadline=None)
@given(models(Calibration()), st.floats(0, 1.1), st.sampled_from(Policy), st.floats(0, 1), st.integers(1, 60))
def test_the_peak_of_a_stage_is_its_largest_moment(
    costs: ModelCosts, share: float, policy: Policy, proximal_mu: float, samples: int
) -> None:
    training = replace(TRAINING, proximal_mu=proximal_mu)
    samples = max(samples, costs.smallest_micro_batch)
    least = smallest_peak(costs, training, samples, policy)
    budget = least + int(share * max(0, needed_bytes(full_training_peak(costs, training, samples).total) - least))
    plan = make_plan(costs, budget_bytes=budget, training=training, sample_count=samples, policy=policy)
    moments = timeline(costs, training, samples, plan)
    for index, stage in enumerate(plan.stages):
        own = [moment.components for moment in moments if moment.stage == index]
        assert stage.predicted in own
        assert max(each.total for each in own) == stage.predicted_peak_bytes
    assert [moment.stage for moment in moments] == sorted(moment.stage for moment in moments)
