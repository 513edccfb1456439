"""The planner: exact plans worked out by hand, and what holds for every plan."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedepth.costs import Calibration, Convolution, ModelCosts, PassCost, Size, UnitCost
from fedepth.errors import ConfigError, PlanError
from fedepth.estimate.peak import (
    batches_per_epoch,
    build_peak,
    cache_bytes_in,
    effective_batch,
    may_keep_bytes,
    needed_bytes,
    pieces_of,
    training_step,
)
from fedepth.plan import CachePlace, Ending, PeakComponents, Policy
from fedepth.planning.planner import estimated_work, full_training_peak, make_plan
from fedepth.planning.ways import micro_batches
from fedepth.task import TrainingSpec
from tests.drawn_costs import models
from tests.unit_costs import unit_cost

KIB = 1024
MIB = KIB * KIB
SCRATCH = MIB  # whatever the block
DEVICE = Calibration(fixed_bytes=SCRATCH, kept=0.0, kernel_share=0.0, depthwise_share=0.0, reordered_share=0.0)
LEAST = needed_bytes(SCRATCH)
TRAINING = TrainingSpec(8, 2, "sgd", 0.1, 0.9, 0.0, 0.0, "none", 1)


def unit(name: str, parameters: int, saved: int, output: int, input_: int) -> UnitCost:
    """A unit that saves its input and `saved` bytes per sample, and needs nothing on top."""
    return unit_cost(
        name,
        parameter_bytes=parameters,
        input_bytes=input_,
        output_bytes=output,
        saved=Size(0, saved),
        flops=1000,
    )


def model(count: int = 4, saved: int = 1000 * KIB) -> ModelCosts:
    exit_ = unit("exit", 0, 0, 0, 10 * KIB)
    units = tuple(replace(unit(f"u{i}", 0, saved, 10 * KIB, 10 * KIB), exit=exit_) for i in range(count))
    return ModelCosts("hand", units, 10 * KIB, 2 * KIB, smallest_micro_batch=1, calibration=DEVICE)


def saving(one: UnitCost, kib: int) -> UnitCost:
    """The unit, when it keeps so much of every sample."""
    return replace(one, training=replace(one.training, saved=Size(0, kib * KIB)))


def plan(costs: ModelCosts, budget: int, policy: Policy = Policy.PAPER, samples: int = 16, **changes: object):  # type: ignore[no-untyped-def]
    training = replace(TRAINING, **changes)  # type: ignore[arg-type]
    return make_plan(costs, budget_bytes=budget, training=training, sample_count=samples, policy=policy)


def test_the_peak_of_a_stage_is_the_sum_of_what_lives_at_its_worst_moment() -> None:
    # Two units, 3 samples a step: inputs 3·10, saved 2·3·1000, two kept outputs 2·3·10 KiB; 1 MiB scratch.
    peak = training_step(model(), TRAINING, 0, 1, 3, accumulates=False, cache_bytes=7).peak
    assert peak.activations + peak.temporaries == (30 + 6000 + 60) * KIB  # the last output just made, or kept
    assert (peak.scratch, peak.cache, peak.gradients, peak.parameters) == (SCRATCH, 7, 0, 0)
    assert peak.total == (30 + 6000 + 60) * KIB + SCRATCH + 7


def test_the_first_unit_of_a_block_needs_no_gradient_of_its_input() -> None:
    # One sample a step: input and two saved maps, and what the backward pass of the first or second unit adds.
    units = tuple(
        replace(
            u,
            training=replace(u.training, backward=PassCost(Size(0, 500 * KIB))),
            backward_first=PassCost(Size(0, 200 * KIB)),
        )
        for u in model(2).units
    )
    costs = replace(model(2), units=units)
    for checkpoint in (False, True):
        first = training_step(costs, TRAINING, 0, 0, 1, accumulates=False, cache_bytes=0, checkpoint=checkpoint).peak
        assert first.activations + first.temporaries == (10 + 1000 + 200) * KIB
    behind = training_step(costs, TRAINING, 0, 1, 1, accumulates=False, cache_bytes=0).peak
    assert behind.activations + behind.temporaries == (2 * 1000 + 2 * 10 + 500) * KIB


def test_parameters_momentum_and_one_gradient_count_when_weights_bind() -> None:
    costs = model(2, saved=0)
    heavy = tuple(replace(u, parameter_bytes=MIB, largest_parameter_bytes=MIB) for u in costs.units)
    costs = replace(costs, units=heavy)
    sgd = training_step(costs, TRAINING, 0, 1, 1, accumulates=False, cache_bytes=0).peak
    # Each gradient is used up before the next is computed; those of several micro-batches are summed up first.
    assert (sgd.parameters, sgd.optimizer_state, sgd.gradients) == (2 * MIB, 2 * MIB, MIB)
    summed = training_step(costs, TRAINING, 0, 1, 1, accumulates=True, cache_bytes=0).peak
    assert summed.gradients == 3 * MIB
    adamw = training_step(costs, replace(TRAINING, optimizer="adamw"), 0, 1, 1, accumulates=False, cache_bytes=0).peak
    assert adamw.optimizer_state == 4 * MIB
    proximal = training_step(costs, replace(TRAINING, proximal_mu=0.1), 0, 1, 1, accumulates=False, cache_bytes=0).peak
    assert proximal.parameters == 4 * MIB


def in_every_pass(one: UnitCost, *convolutions: Convolution) -> UnitCost:
    """The unit with these convolutions."""

    def with_them(cost: PassCost) -> PassCost:
        return replace(cost, convolutions=convolutions)

    step = one.training
    return replace(
        one,
        training=replace(step, forward=with_them(step.forward), backward=with_them(step.backward)),
        backward_first=with_them(one.backward_first),
        inference=with_them(one.inference),
    )


def test_scratch_follows_the_calibration_of_the_unit_that_runs() -> None:
    device = Calibration("", "", MIB, kept=0.5, kernel_share=2.0, depthwise_share=100.0, reordered_share=0.25)
    one = in_every_pass(
        replace(model(1).units[0], largest_parameter_bytes=3 * MIB),
        Convolution(2 * MIB, MIB // 50, Size(2 * MIB, MIB), Size(0, 1000 * KIB)),
    )
    costs = replace(model(1), units=(one,), calibration=device)
    # 1 MiB + twice 2 MiB + 100 times a fiftieth MiB + a quarter of 2 MiB and of 4 samples' 1 MiB;
    # and half of what may be kept.
    peak = training_step(costs, TRAINING, 0, 0, 4, accumulates=False, cache_bytes=1000).peak
    needed = peak.total - peak.scratch + 8.5 * MIB
    assert peak.gradients == 3 * MIB  # the worst moment is the unit's backward pass
    assert peak.scratch == pytest.approx(8.5 * MIB + 0.5 * may_keep_bytes(int(needed)), abs=100)


def test_what_convolutions_copy_does_not_come_on_top_of_what_lives_when_none_runs() -> None:
    device = Calibration("", "", MIB, kept=0.0, kernel_share=1.0, depthwise_share=0.0, reordered_share=0.0)
    of_weights = 40 * MIB

    def peak(living: int, *, checkpoint: bool = False) -> PeakComponents:
        """One unit saves 2 samples' 1000 KiB; while its convolution runs, it holds `living` KiB of each."""
        running = Convolution(of_weights, 0, Size(0, 0), Size(0, living * KIB))
        other = Convolution(0, 0, Size(0, 0), Size(0, 70 * KIB))  # it copies nothing, and does not count
        one = in_every_pass(model(1).units[0], other, running)
        costs = replace(model(1), units=(one,), calibration=device)
        return training_step(costs, TRAINING, 0, 0, 2, accumulates=False, cache_bytes=0, checkpoint=checkpoint).peak

    for checkpoint in (False, True):
        early = peak(10, checkpoint=checkpoint)
        # The input of 10 KiB, what lives then, the copies and the scratch of any block. With checkpointing the
        # gradient of the output waits when the unit runs again.
        more = 2 * 10 * KIB if checkpoint else 0
        assert early.total == 2 * 10 * KIB + 2 * 10 * KIB + more + of_weights + MIB
        late = peak(60_000, checkpoint=checkpoint)
        assert late.total == 2 * 10 * KIB + 2 * 60_000 * KIB + more + of_weights + MIB
        assert late.activations + late.temporaries == 2 * 60_010 * KIB + more
    # What the unit saves is more than the copies: then it is what counts, without them.
    small = replace(device, kernel_share=0.01)
    running = Convolution(of_weights, 0, Size(0, 0), Size(0, KIB))
    one = in_every_pass(model(1).units[0], running)
    costs = replace(model(1), units=(one,), calibration=small)
    saved = training_step(costs, TRAINING, 0, 0, 2, accumulates=False, cache_bytes=0).peak
    assert saved.scratch == MIB and saved.activations + saved.temporaries == 2 * (10 + 1000 + 10) * KIB


def test_a_budget_leaves_a_margin_above_the_estimate() -> None:
    assert needed_bytes(100 * MIB) == 111 * MIB


def test_checkpointing_keeps_the_inputs_and_one_unit_at_a_time() -> None:
    # Three units, 2 samples a step: inputs of three units and the exit 4·2·10, one unit's 2·1000 saved, the output that
    # is made again and its gradient 2·2·10 KiB.
    peak = training_step(model(), TRAINING, 0, 2, 2, accumulates=False, cache_bytes=0, checkpoint=True).peak
    assert peak.activations + peak.temporaries == (60 + 2000 + 40) * KIB


def test_full_depth_where_it_fits() -> None:
    # Full: inputs 80 + saved 4·8000 + outputs 4·80 KiB + 1 MiB scratch + 16 cached raw samples of 2 KiB.
    full = (80 + 32000 + 320 + 32) * KIB + SCRATCH
    whole = plan(model(), needed_bytes(full))
    assert [(s.first, s.last) for s in whole.stages] == [(0, 3)]
    assert whole.predicted_peak_bytes == full
    assert whole.stages[0].cache is CachePlace.RAM
    on_disk = plan(
        model(), needed_bytes(full) - 1
    )  # one byte less, and the cache goes to disk before the block is split
    assert [(s.first, s.last, s.cache) for s in on_disk.stages] == [(0, 3, CachePlace.DISK)]
    assert len(plan(model(), needed_bytes(full - 32 * KIB) - 1).stages) == 2


def test_the_paper_splits_where_auto_takes_smaller_micro_batches() -> None:
    half = needed_bytes((80 + 16000 + 160 + 200) * KIB + SCRATCH)
    assert [(s.first, s.last, s.micro_batch) for s in plan(model(), half).stages] == [(0, 1, 8), (2, 3, 8)]
    auto = plan(model(), half, Policy.AUTO)
    assert [(s.first, s.last, s.micro_batch) for s in auto.stages] == [(0, 3, 4)]


def test_auto_computes_again_what_even_one_sample_at_a_time_could_not_keep() -> None:
    tight = needed_bytes((4 * 10 + 1000 + 30) * KIB + SCRATCH)
    (whole,) = plan(model(), tight, Policy.AUTO).stages
    assert (whole.first, whole.last, whole.micro_batch, whole.checkpoint) == (0, 3, 1, True)
    assert not any(stage.checkpoint for stage in plan(model(), tight * 8).stages)


def test_a_unit_that_cannot_fit_is_left_untrained_and_the_others_are_trained() -> None:
    costs = model()
    costs = replace(costs, units=(saving(costs.units[0], 9000), *costs.units[1:]))
    found = plan(costs, 32000 * KIB)
    assert found.untrained == (0,)
    assert [(s.first, s.last) for s in found.stages] == [(1, 3)]


def test_what_its_author_froze_at_the_front_is_run_and_not_trained() -> None:
    """Fine-tuning the last units costs what these cost."""
    costs = model()
    frozen = [replace(one, fixed_bytes=50 * KIB) for one in costs.units[:2]]
    costs = replace(costs, units=(*frozen, *costs.units[2:]))
    found = plan(costs, 32000 * KIB)
    assert (found.blocks, found.untrained) == ("2-3", ())
    # Eight samples: the block's input, what two units save, and their outputs. Sixteen are cached.
    assert found.stages[0].predicted.total == SCRATCH + 8 * (10 + 2 * (1000 + 10)) * KIB + 16 * 10 * KIB
    assert full_training_peak(costs, TRAINING, 16).total == SCRATCH + 8 * (10 + 2 * (1000 + 10)) * KIB
    # A frozen unit behind a trained one is part of the block: gradients pass through it.
    behind = replace(costs, units=(costs.units[2], *frozen, costs.units[3]))
    assert plan(behind, 64000 * KIB).blocks == "0-3"


def with_a_large_end(count: int = 4, *, through: bool = True) -> ModelCosts:
    """The last unit cannot be trained within 32000 KiB; frozen it keeps next to nothing."""
    costs = model(count)
    small = saving(costs.units[0], 10).training
    units = [replace(one, frozen=small if through else None) for one in costs.units]
    units[-1] = saving(units[-1], 9000)
    return replace(costs, units=tuple(units))


def test_where_the_last_units_cannot_be_trained_the_last_block_is_trained_through_them() -> None:
    costs = with_a_large_end()
    found = plan(costs, 32000 * KIB)
    assert found.blocks == "0-2 through 3 (untrained: 3)"
    assert found.trained_units == (0, 1, 2)
    # 32 samples in all. Three units of 1000 operations are trained and the exit as well, the fourth gives the gradient
    # of its input alone: a third less. Steps of 8 cost 2 more samples each.
    assert estimated_work(costs, TRAINING, 16, found) == 32 * (3 * 3000 + 3 * 1000 + 2 * 1000) * (1 + 2 / 8)
    # Eight samples: the block's input, what three units save, their outputs; the frozen unit's 10 KiB and its output.
    peak = found.stages[0].predicted
    assert peak.activations + peak.temporaries == 8 * (10 + 3 * (1000 + 10) + 10 + 10) * KIB
    # Two units fit in one block, but not with a third behind them.
    split = plan(with_a_large_end(), 21800 * KIB)
    assert split.blocks == "0-1 | 2 through 3 (untrained: 3)"
    assert [stage.frozen_suffix for stage in split.stages] == [False, True]


def test_where_nothing_can_be_trained_through_them_the_head_keeps_its_global_value() -> None:
    found = plan(with_a_large_end(through=False), 32000 * KIB)
    assert found.blocks == "0-2 (untrained: 3, head)"
    assert (found.ending, found.trains_head) == (Ending.FROZEN_HEAD, False)
    assert not found.stages[0].frozen_suffix
    # As little as one unit needs is enough.
    with pytest.raises(PlanError) as caught:
        plan(with_a_large_end(through=False), MIB)
    assert caught.value.needed_bytes == needed_bytes((10 + 1000 + 10) * 8 * KIB + SCRATCH)
    # A frozen suffix comes first, however few units it leaves.
    assert plan(with_a_large_end(), 14000 * KIB).ending is Ending.FROZEN_SUFFIX


def test_a_plan_to_the_end_comes_before_one_that_trains_more_units() -> None:
    costs = with_a_large_end()
    costs = replace(costs, units=(*costs.units[:-1], saving(costs.units[-1], 1000)))
    costs = replace(costs, units=(saving(costs.units[0], 1000), saving(costs.units[1], 9000), *costs.units[2:]))
    # Of the second unit's 72 MB nothing fits; 0 alone, through the rest, would train as many as 2 and 3.
    assert plan(costs, 32000 * KIB).blocks == "2-3 (untrained: 0-1)"


def test_no_block_ends_where_there_is_no_exit() -> None:
    costs = model()
    two_units = needed_bytes((80 + 16000 + 160 + 200) * KIB + SCRATCH)
    assert plan(costs, two_units).blocks == "0-1 | 2-3"
    closed = replace(costs, units=tuple(replace(u, exit=u.exit if i != 1 else None) for i, u in enumerate(costs.units)))
    assert plan(closed, two_units).blocks == "0 | 1-2 | 3"
    for first, last in ((0, 1), (1, 1)):
        with pytest.raises(ValueError, match="can end behind unit 1"):
            training_step(closed, TRAINING, first, last, 8, accumulates=False, cache_bytes=0)


def with_a_large_run(mib: int, saved: int = 1000) -> ModelCosts:
    """The second of four units takes so much when it runs without autograd; all keep so many KiB of every sample."""
    units = list(model(saved=saved * KIB).units)
    units[1] = replace(units[1], inference=PassCost(Size(mib * MIB, 0)))
    return replace(model(), units=tuple(units))


def test_two_caches_lie_in_memory_while_the_second_is_filled() -> None:
    # 2048 samples take 4 MiB as pixels and 20 MiB as inputs of the third unit. A block of two takes 47.1 MiB in steps
    # of 8, and scratch of 1 MiB: 68.1 MiB with the larger cache.
    budget = needed_bytes((80 + 48000 + 160) * KIB + 21 * MIB)
    for run, places in ((43, ["ram", "ram"]), (46, ["disk", "ram"])):  # 4 + 20 + 46 + 1 MiB are too much
        found = plan(with_a_large_run(run, saved=3000), budget, samples=2048)
        assert found.blocks == "0-1 | 2-3"
        assert [stage.cache.value for stage in found.stages] == places


def test_a_unit_that_cannot_be_run_has_no_block_behind_it() -> None:
    two_units = needed_bytes((80 + 16000 + 160 + 200) * KIB + SCRATCH)
    assert plan(with_a_large_run(14), two_units).blocks == "0-1 | 2-3"
    # Nor can the units in front be passed by.
    assert plan(with_a_large_run(30), two_units).blocks == "0 | 1-2 (untrained: 3, head)"


def test_parameters_that_the_author_froze_are_loaded_and_nothing_else() -> None:
    costs = model(2)
    fixed = replace(costs, units=tuple(replace(u, fixed_bytes=5 * MIB) for u in costs.units))
    before, after = (training_step(c, TRAINING, 0, 0, 4, accumulates=True, cache_bytes=0).peak for c in (costs, fixed))
    assert after == replace(before, parameters=before.parameters + 5 * MIB)
    built = build_peak(fixed, 0, 1, 4, source_bytes=0, cache_bytes=0)
    assert built.parameters == 5 * MIB


def test_the_units_behind_a_block_are_loaded_and_have_no_gradients() -> None:
    heavy = replace(model(3).units[0], parameter_bytes=MIB, largest_parameter_bytes=MIB)
    costs = replace(model(3), units=tuple(replace(heavy, frozen=heavy.training) for _ in range(3)))
    for checkpoint in (False, True):
        peak = training_step(
            costs, TRAINING, 0, 0, 4, accumulates=True, cache_bytes=0, checkpoint=checkpoint, frozen_suffix=True
        ).peak
        assert (peak.parameters, peak.optimizer_state) == (3 * MIB, MIB)
        assert MIB <= peak.gradients <= 2 * MIB


def test_a_shard_too_small_for_batch_norm_is_told() -> None:
    costs = replace(model(), smallest_micro_batch=2)
    with pytest.raises(PlanError, match=r"needs at least 2 samples at once, but the device has 1\."):
        plan(costs, 1 << 30, samples=1)
    assert plan(costs, 1 << 30, samples=2).stages[0].micro_batch == 2


@pytest.mark.parametrize(
    ("batch", "samples", "smallest", "expected"),
    [
        (128, 129, 1, (2, 65)),  # not 128 samples and one, filled up with others that were seen before
        (128, 128, 1, (1, 128)),
        (128, 5, 1, (1, 5)),
        (8, 20, 1, (3, 7)),
        (2, 3, 2, (1, 3)),  # BatchNorm cannot take a batch of one
        (1, 7, 2, (3, 3)),
    ],
)
def test_an_epoch_has_steps_of_almost_one_size(
    batch: int, samples: int, smallest: int, expected: tuple[int, int]
) -> None:
    costs, training = replace(model(), smallest_micro_batch=smallest), replace(TRAINING, batch=batch)
    assert (batches_per_epoch(costs, training, samples), effective_batch(costs, training, samples)) == expected


@given(st.integers(1, 300), st.integers(1, 130), st.integers(1, 4))
def test_every_micro_batch_of_a_plan_leaves_pieces_that_batch_norm_can_take(
    samples: int, batch: int, smallest: int
) -> None:
    costs, training = replace(model(), smallest_micro_batch=smallest), replace(TRAINING, batch=batch)
    samples = max(samples, smallest)
    steps = batches_per_epoch(costs, training, samples)
    for micro_batch in micro_batches(costs, training, samples, Policy.AUTO):
        for size in (samples // steps, -(-samples // steps)):
            pieces = pieces_of(costs, size, micro_batch)
            assert smallest <= size // pieces <= -(-size // pieces) <= micro_batch


def test_nothing_fits_says_what_is_needed_and_what_is_free() -> None:
    with pytest.raises(PlanError, match=r"the smallest plan needs 12\.7 MiB, but only 1\.0 MiB is free") as caught:
        plan(model(), MIB)
    needed = needed_bytes((80 + 8000 + 80) * KIB + SCRATCH)  # one unit, cache on disk
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (needed, MIB)
    assert plan(model(), needed).stages  # and that is enough


def test_a_shard_smaller_than_the_batch_is_one_step() -> None:
    assert plan(model(), 1 << 30, samples=3).stages[0].micro_batch == 3


def test_weights_in_front_that_do_not_fit_together_are_read_one_unit_at_a_time() -> None:
    costs = model(3, saved=0)
    heavy = replace(costs.units[0], parameter_bytes=2 * MIB, largest_parameter_bytes=2 * MIB)
    # Units 0 and 1 cannot be trained (their weights come with momentum and gradient), but can be run one by one.
    costs = replace(costs, units=(heavy, heavy, costs.units[2]))
    (stage,) = plan(costs, needed_bytes(4 * MIB), optimizer="adamw").stages
    assert (stage.first, stage.last, stage.build_streamed) == (2, 2, True)
    (whole,) = plan(costs, needed_bytes(6 * MIB), optimizer="adamw").stages[:1]
    assert not whole.build_streamed


def test_planning_on_after_a_stage_covers_only_what_is_left() -> None:
    first = plan(model(), needed_bytes((80 + 16000 + 160 + 200) * KIB + SCRATCH)).stages[0]
    rest = make_plan(
        model(),
        budget_bytes=13 * MIB,
        training=TRAINING,
        sample_count=16,
        policy=Policy.PAPER,
        done=first,
    )
    assert [(s.first, s.last) for s in rest.stages] == [(2, 2), (3, 3)]


def test_going_on_after_a_stage_trains_all_that_is_left_or_through_it() -> None:
    costs = with_a_large_end()
    first = plan(costs, 21800 * KIB).stages[0]
    arguments = {"training": TRAINING, "sample_count": 16, "policy": Policy.PAPER, "done": first}
    rest = make_plan(costs, budget_bytes=21800 * KIB, **arguments)  # type: ignore[arg-type]
    assert rest.blocks == "2 through 3 (untrained: 3)"
    trained = (Ending.LAST_UNIT, Ending.FROZEN_SUFFIX)
    with pytest.raises(PlanError):
        make_plan(costs, budget_bytes=9000 * KIB, endings=trained, **arguments)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    models(DEVICE),
    st.integers(LEAST, LEAST + 2_000_000),
    st.sampled_from(Policy),
    st.data(),
)
def test_every_plan_fits_and_names_every_unit_once(
    costs: ModelCosts, budget: int, policy: Policy, data: st.DataObject
) -> None:
    training = replace(
        TRAINING, batch=data.draw(st.integers(1, 40)), optimizer=data.draw(st.sampled_from(["sgd", "adamw"]))
    )
    samples = data.draw(st.integers(1, 60))
    try:
        found = make_plan(costs, budget_bytes=budget, training=training, sample_count=samples, policy=policy)
    except PlanError as error:
        assert error.needed_bytes > budget or samples < costs.smallest_micro_batch
        return
    named = [u for s in found.stages for u in range(s.first, s.last + 1)] + list(found.untrained)
    assert sorted(named) == list(range(costs.first_trained, len(costs.units)))
    batch = effective_batch(costs, training, samples)
    previous = None
    for stage in found.stages:
        cached = cache_bytes_in(stage.cache, costs, training, stage.first, samples)
        training_bytes = training_step(
            costs, training, stage.first, stage.last, stage.micro_batch,
            accumulates=stage.micro_batch < batch, cache_bytes=cached, checkpoint=stage.checkpoint,
            frozen_suffix=stage.frozen_suffix,
        ).peak.total  # fmt: skip
        building_bytes = build_peak(
            costs, previous.first if previous else 0, stage.first, stage.build_batch,
            source_bytes=cache_bytes_in(previous.cache, costs, training, previous.first, samples) if previous else 0,
            cache_bytes=cached, streamed=stage.build_streamed,
        ).total  # fmt: skip
        assert max(training_bytes, building_bytes) == stage.predicted_peak_bytes
        assert needed_bytes(stage.predicted_peak_bytes) <= budget
        assert stage.micro_batch == batch or policy is Policy.AUTO
        previous = stage


@settings(max_examples=60, deadline=None)
@given(models(DEVICE), st.integers(LEAST, LEAST + 1_000_000), st.integers(0, 1_000_000))
def test_more_memory_never_trains_less(costs: ModelCosts, budget: int, more: int) -> None:
    def untrained(bytes_: int) -> tuple[int, int, int]:
        try:
            found = make_plan(costs, budget_bytes=bytes_, training=TRAINING, sample_count=20, policy=Policy.PAPER)
        except PlanError:
            return (len(Ending), 0, 0)
        return (found.ending, len(found.untrained), len(found.stages))

    assert untrained(budget + more) <= untrained(budget)


@pytest.mark.parametrize("budget", ["40MiB", 1e9, None])
def test_a_budget_is_a_whole_number_of_bytes(budget: Any) -> None:
    with pytest.raises(ConfigError, match=f"must be a whole number of bytes, is '{budget}'"):
        plan(model(), budget)
