"""Depth-wise training against plain torch loops, with exact weights; and what partial training leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedepth.costs import Size
from fedepth.data.transforms import augment, views_key
from fedepth.errors import OverBudgetError, PlanError
from fedepth.memory.meter import Meter
from fedepth.models.skip import skip
from fedepth.plan import CachePlace, Ending, Stage
from fedepth.task import ModelSpec
from fedepth.training import limits, pressure, stages
from fedepth.training.block import BlockTraining, _seed, epoch_batches
from fedepth.training.context import TrainingContext
from fedepth.training.stages import train
from fedepth.weights import load_numpy
from tests.training.jobs import (
    COSTS,
    NOTHING,
    PRERESNET,
    SPEC,
    TRAINING,
    Quiet,
    Tensors,
    assert_equal,
    context,
    exported,
    fresh,
    parts_of,
    stage,
    trained_tensors,
)
from tests.training.open_files import open_files
from tests.unit_costs import unit_cost

HUNGRY = unit_cost(
    parameter_bytes=1 << 40, input_bytes=256, output_bytes=256, exit_=unit_cost("exit", parameter_bytes=1 << 40)
)


def order(job: TrainingContext, index: int, count: int) -> list[torch.Tensor]:
    """The index batches that stage `index` trains on, all epochs."""
    generator = torch.Generator().manual_seed(_seed(job, index))
    training = job.task.training
    batches = -(-count // training.batch)
    return [b for _ in range(training.local_epochs) for b in epoch_batches(count, batches, generator)]


def pixels(job: TrainingContext, count: int, epoch: int) -> torch.Tensor:
    """All images as an epoch of the first stage sees them."""
    indices, training = np.arange(count), job.task.training
    key = views_key(training.seed, job.task.round, job.device_id, epoch)
    views = augment(job.images.read(indices), training.augmentation, key, indices)
    return (torch.from_numpy(views).float() / 255 - 0.5) / 0.5


def by_hand(
    job: TrainingContext, blocks: Sequence[tuple[int, int]], count: int, *, trains_head: bool = True
) -> Tensors:
    """The algorithm of the paper, written as plainly as possible with torch.optim, on the module itself."""
    module = fresh(job.task.model)
    parts, head = parts_of(module)
    epochs = job.task.training.local_epochs
    by_epoch = [pixels(job, count, epoch) for epoch in range(epochs)]
    y = torch.from_numpy(job.images.labels)
    start = {parameter: parameter.detach().clone() for parameter in module.parameters()}
    for index, (first, last) in enumerate(blocks):
        block = nn.Sequential(*parts[first : last + 1])
        parameters = [*block.parameters(), *(head.parameters() if trains_head else ())]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
        block.train()
        head.train()
        batches = order(job, index, count)
        for number, batch in enumerate(batches):
            x = by_epoch[number * epochs // len(batches)]
            optimizer.zero_grad()
            z = skip(block(x[batch]), job.model.graph.head_shape)
            functional.cross_entropy(head(z), y[batch]).backward()
            with torch.no_grad():
                for p in parameters:
                    p.grad.add_(p - start[p], alpha=job.task.training.proximal_mu)  # type: ignore[union-attr]
            optimizer.step()
        block.eval()
        with torch.no_grad():
            by_epoch = [block(by_epoch[0])] * epochs
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def test_one_stage_is_plain_training(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 5)])
    assert_equal(trained_tensors(job), by_hand(job, [(0, 5)], 16))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_where_the_units_behind_are_untrained_the_head_keeps_its_global_value(tmp_path: Path, checkpoint: bool) -> None:
    blocks = [(0, 1), (2, 3)]
    job = context(tmp_path, [replace(stage(*block), checkpoint=checkpoint) for block in blocks])
    outcome = train(job, Meter(), Quiet())
    assert outcome.plan.ending is Ending.FROZEN_HEAD
    got = {name: tensor for part in outcome.parts for name, tensor in load_numpy(part).items()}
    layout = exported(SPEC).graph.layout()
    assert got.keys() == {tensor.name for unit in layout.units[:4] for tensor in unit.tensors}
    expected = by_hand(job, blocks, 16, trains_head=False)
    assert_equal(got, {name: expected[name] for name in got})


@pytest.mark.parametrize("place", CachePlace)
def test_blocks_in_sequence_are_the_papers_algorithm(tmp_path: Path, place: CachePlace) -> None:
    job = context(tmp_path, [stage(0, 1, cache=place), stage(2, 3, cache=place), stage(4, 5, cache=place)])
    assert_equal(trained_tensors(job), by_hand(job, [(0, 1), (2, 3), (4, 5)], 16))
    assert open_files(tmp_path / "cache") == []


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("place", CachePlace)
def test_the_first_stage_sees_new_views_in_every_epoch_and_later_ones_the_first_views(
    tmp_path: Path, place: CachePlace, micro_batch: int
) -> None:
    """A view for a whole task is learnt by heart in ten epochs: LeNet on CIFAR-10, the calibration of niid_bench."""
    training = replace(TRAINING, augmentation="crop-flip", local_epochs=3)
    blocks = [(0, 1), (2, 3), (4, 5)]
    job = context(tmp_path, [stage(*block, micro_batch, place) for block in blocks], SPEC, training)
    assert not torch.equal(pixels(job, 16, 0), pixels(job, 16, 1))
    assert_equal(trained_tensors(job), by_hand(job, blocks, 16))


def test_a_stage_behind_frozen_units_sees_the_first_views_in_every_epoch(tmp_path: Path) -> None:
    training = replace(TRAINING, augmentation="crop-flip", local_epochs=3)
    job = context(tmp_path, [stage(3, 5)], SPEC, training)
    got = trained_tensors(job)
    streamed = context(tmp_path, [replace(stage(3, 5), build_streamed=True)], SPEC, training)
    assert_equal(trained_tensors(streamed), got, 0)
    units, head = parts_of(module := fresh(SPEC))
    module.eval()
    with torch.no_grad():
        x = nn.Sequential(*units[:3])(pixels(job, 16, 0))
    block = nn.Sequential(*units[3:], head).train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for batch in order(job, 0, 16):
        optimizer.zero_grad()
        functional.cross_entropy(block(x[batch]), torch.from_numpy(job.images.labels)[batch]).backward()
        optimizer.step()
    expected = {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}
    assert_equal(got, {name: expected[name] for name in got})


def test_micro_batches_are_exact_with_group_norm(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 5, micro_batch=3)])
    assert_equal(trained_tensors(job), by_hand(job, [(0, 5)], 16))


@pytest.mark.parametrize("spec", [SPEC, PRERESNET], ids=["group norm", "batch norm"])
def test_checkpointing_trains_alike_to_the_running_statistics(tmp_path: Path, spec: ModelSpec) -> None:
    last = 5 if spec is SPEC else 9
    plain = trained_tensors(context(tmp_path, [stage(0, 2), stage(3, last)], spec))
    again = [replace(stage(0, 2), checkpoint=True), replace(stage(3, last), checkpoint=True)]
    assert_equal(trained_tensors(context(tmp_path, again, spec)), plain)


def test_checkpointing_goes_with_micro_batches(tmp_path: Path) -> None:
    job = context(tmp_path, [replace(stage(0, 5, micro_batch=3), checkpoint=True)])
    assert_equal(trained_tensors(job), by_hand(job, [(0, 5)], 16))


def test_untrained_units_are_not_in_the_update_and_are_run_at_their_global_value(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(2, 3), stage(5, 5)])
    outcome = train(job, Meter(), Quiet())
    names = {name for part in outcome.parts for name in load_numpy(part)}
    layout = exported(SPEC).graph.layout()
    expected = {t.name for unit in (2, 3, 5) for t in layout.units[unit].tensors} | {t.name for t in layout.head}
    assert names == expected
    assert outcome.plan.untrained == (0, 1, 4)


def test_frozen_batch_norm_keeps_its_statistics_and_the_head_tracks_only_full_depth(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 4), stage(5, 9)], spec=PRERESNET, training=replace(TRAINING, local_epochs=1))
    train(job, Meter(), Quiet())
    first = load_numpy(tmp_path / "out" / "part-0000.safetensors")
    statistics = [name for name in first if name.endswith("num_batches_tracked")]
    assert statistics and all(first[name] == 2 for name in statistics)  # two steps, none while building the cache
    head = load_numpy(tmp_path / "out" / "part-0002.safetensors")
    mean = next(tensor for name, tensor in head.items() if name.endswith("running_mean"))
    # Were the first stage tracked, the 16 channels that exist there would have moved twice as often as the others.
    variance = next(tensor for name, tensor in head.items() if name.endswith("running_var"))
    assert mean.shape == (64,) and np.all(variance[32:] > 0.5)


def test_a_shard_of_one_image_trains(tmp_path: Path) -> None:
    job = context(tmp_path, [stage(0, 5, micro_batch=1)], count=1)
    got = trained_tensors(job)
    before = load_numpy(tmp_path / "weights.safetensors")
    assert any(not np.array_equal(got[name], before[name]) for name in got)


def test_the_proximal_term_pulls_towards_the_global_weights(tmp_path: Path) -> None:
    free = trained_tensors(context(tmp_path, [stage(0, 5)]))
    held = trained_tensors(context(tmp_path, [stage(0, 5)], training=replace(TRAINING, proximal_mu=5.0)))
    start = load_numpy(tmp_path / "weights.safetensors")
    distance = {
        key: sum(float(np.square(value[name] - start[name]).sum()) for name in start)
        for key, value in (("free", free), ("held", held))
    }
    assert distance["held"] < 0.7 * distance["free"]


def test_every_sample_is_seen_once_in_batches_of_almost_one_size() -> None:
    batches = epoch_batches(10, 3, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [4, 3, 3]
    assert sorted(torch.cat(batches).tolist()) == list(range(10))


@pytest.mark.parametrize(("count", "steps"), [(16, 2), (17, 3), (9, 2), (7, 1)])
def test_a_stage_sees_every_sample_once_an_epoch(tmp_path: Path, count: int, steps: int) -> None:
    job = context(tmp_path, [stage(0, 5, micro_batch=3)], count=count)
    (result,) = train(job, Meter(), Quiet()).stages
    assert (result.samples_seen, result.steps) == (2 * count, 2 * steps)


def test_no_piece_is_smaller_than_batch_norm_can_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    accumulate = BlockTraining._accumulate

    def counted(block: BlockTraining, piece: torch.Tensor, batch: int) -> float:
        pieces.append(len(piece))
        return accumulate(block, piece, batch)

    monkeypatch.setattr(BlockTraining, "_accumulate", counted)
    job = context(tmp_path, [stage(0, 9, micro_batch=2)], spec=PRERESNET, count=9)
    job = replace(job, costs=replace(job.costs, smallest_micro_batch=2))
    train(job, Meter(), Quiet())
    assert pieces == [3, 2, 2, 2] * 2  # batches of 5 and 4 samples: a piece of one more, rather than one alone


def test_without_memory_for_what_is_left_the_task_fails_and_leaves_no_file_open(tmp_path: Path) -> None:
    class Falling(Quiet):
        """Next to nothing is free once the first stage is through."""

        def measure(self, stage: int, held_bytes: int) -> int:
            return self.budget if stage == 0 else 1

    planned = [replace(stage(first, first + 2), cache=CachePlace.DISK) for first in (0, 3)]
    job = context(tmp_path, planned)
    job = replace(job, costs=replace(COSTS, units=(HUNGRY,) * 6))
    with pytest.raises(PlanError, match="the smallest plan needs"):
        train(job, Meter(), Falling())
    assert open_files(tmp_path / "cache") == []


def test_the_head_is_pulled_towards_its_global_value_in_every_stage(tmp_path: Path) -> None:
    blocks = [(0, 1), (2, 3), (4, 5)]
    job = context(tmp_path, [stage(*block) for block in blocks], training=replace(TRAINING, proximal_mu=2.0))
    assert_equal(trained_tensors(job), by_hand(job, blocks, 16))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The micro-batch of every step that is trained."""
    found: list[int] = []
    step = BlockTraining.step

    def counted(block: BlockTraining, indices: torch.Tensor) -> float:
        found.append(block._micro_batch.now)
        return step(block, indices)

    monkeypatch.setattr(BlockTraining, "step", counted)
    return found


@pytest.mark.parametrize(
    ("free", "rehearsed", "expected"),
    [
        pytest.param(90, 0, 2, id="less than predicted"),
        pytest.param(90, 80, 8, id="as much as was rehearsed"),
        pytest.param(200, 195, 8, id="no less than before: its cap leaves it less to keep"),
    ],
)
def test_what_is_missing_while_inputs_are_computed_is_missing_in_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], free: int, rehearsed: int, expected: int
) -> None:
    """In MiB: 200 are free when the stage begins, of which it is predicted to take 100."""
    monkeypatch.setattr(pressure, "fitting_micro_batch", lambda *_, **__: 2)
    monkeypatch.setattr(stages, "peak_bytes", lambda meter, device: 10 << 20)  # of the inputs
    monkeypatch.setattr(stages, "LOOK_S", 3600)  # no later look that would let the whole micro-batch come back

    class Falling(Quiet):
        measured = 0

        def measure(self, stage: int, held_bytes: int) -> int:
            self.measured += 1
            return (200 if self.measured == 1 else free) << 20

    planned = replace(stage(0, 5), predicted=replace(NOTHING, activations=100 << 20))
    job = replace(context(tmp_path, [planned]), enforce=True)
    (result,) = train(job, Meter(), Falling(), {planned: rehearsed << 20} if rehearsed else None).stages
    assert sizes[:2] == [expected] * 2
    assert result.micro_batch == expected


class Shrinking(Quiet):
    """What is free falls to `later` after the first look; `measured` counts the looks."""

    def __init__(self, later: int) -> None:
        super().__init__()
        self.later = later
        self.measured = 0
        self.waits = 0

    def measure(self, stage: int, held_bytes: int) -> int:
        self.measured += 1
        return self.budget if self.measured == 1 else self.later

    def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None:
        self.waits += 1
        self.later = self.budget  # and then it is there again


@pytest.mark.parametrize(("later", "waits"), [(1 << 39, 0), (0, 1)], ids=["enough for what it takes", "nothing"])
def test_a_stage_waits_only_while_what_it_really_takes_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int, waits: int
) -> None:
    monkeypatch.setattr(stages, "LOOK_S", 0.001)
    monkeypatch.setattr(stages, "LONGEST_PAUSE_S", 0.05)
    hooks = Shrinking(later)
    costs = replace(COSTS, units=(HUNGRY,) * 6)
    job = context(tmp_path, [stage(0, 5)])
    job = replace(job, costs=costs, enforce=True)
    (result,) = train(job, Meter(), hooks).stages
    assert hooks.measured > 1 and hooks.waits == waits
    assert result.micro_batch == 8  # the estimate of a TiB does not shrink what was seen to fit


def test_a_stage_that_made_room_runs_as_planned_when_memory_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    monkeypatch.setattr(stages, "LOOK_S", 0.0)
    monkeypatch.setattr(stages, "peak_bytes", lambda meter, device: 100 << 20)
    monkeypatch.setattr(pressure, "fitting_micro_batch", lambda *_, **__: 2)
    caps: list[int] = []
    monkeypatch.setattr(stages.allocator.HeapCap, "_limit", lambda _, cap_bytes: caps.append(cap_bytes))
    monkeypatch.setattr(stages.allocator.HeapCap, "_lift", lambda _: caps.append(0))

    class Dipping(Quiet):
        def measure(self, stage: int, held_bytes: int) -> int:
            return (50 if len(sizes) in (1, 2) else 200) << 20

    job = replace(context(tmp_path, [stage(0, 5)], count=40), enforce=True)
    (result,) = train(job, Meter(), Dipping()).stages
    # It looks after every step; two looks find too little.
    assert sizes[:5] == [8, 2, 2, 8, 8]
    assert result.micro_batch == 2
    whole, low, whole_again, none = caps
    assert whole == whole_again == low + (150 << 20) and none == 0


@pytest.mark.parametrize(("low", "waits"), [(0, 1), (50 << 20, 0)], ids=["nothing", "enough for what is predicted"])
def test_a_stage_waits_for_memory_while_its_inputs_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: int, waits: int
) -> None:
    monkeypatch.setattr(stages, "LOOK_S", 0.0)
    monkeypatch.setattr(stages, "peak_bytes", lambda meter, device: 100 << 20)
    asked: list[int] = []

    class Dipping(Quiet):
        """Less is free at the third look, which comes after the second batch of four inputs."""

        def measure(self, stage: int, held_bytes: int) -> int:
            asked.append(stage)
            return low if len(asked) == 3 else 200 << 20

        def waiting(self, index: int, stage: Stage, budget_bytes: int) -> None:
            waited.append((len(asked), budget_bytes))

    waited: list[tuple[int, int]] = []
    job = replace(context(tmp_path, [stage(0, 5)], training=replace(TRAINING, local_epochs=1)), enforce=True)
    train(job, Meter(), Dipping())
    assert waited == [(3, low)] * waits
    # Before the stage, after each of four batches of inputs and once more after a wait, before training, after each of
    # two steps.
    assert len(asked) == 1 + 4 + waits + 1 + 2


def test_a_failed_stage_leaves_no_file_open(tmp_path: Path) -> None:
    large = replace(SPEC, input_shape=(1, 64, 64))
    training = replace(TRAINING, batch=64, local_epochs=1)
    planned = [stage(0, 5, micro_batch=64, cache=CachePlace.DISK)]
    job = replace(context(tmp_path, planned, large, training, count=64), enforce=True)
    with pytest.raises(OverBudgetError):
        train(job, Meter(), Quiet(budget=4 << 20))
    assert open_files(tmp_path / "cache") == []


def test_a_stage_that_goes_over_its_budget_says_by_how_much(tmp_path: Path) -> None:
    # Tens of MiB, more than earlier tests can have left in this process's heap.
    large = replace(SPEC, input_shape=(1, 64, 64))
    training = replace(TRAINING, batch=64, local_epochs=1)
    job = replace(context(tmp_path, [stage(0, 5, micro_batch=64)], large, training, count=64), enforce=True)
    with pytest.raises(OverBudgetError, match=r"stage 0 \(units 0-5\) took .* the budget is 4\.0 MiB") as caught:
        train(job, Meter(), Quiet(budget=4 << 20))
    assert caught.value.stage == 0 and caught.value.miss_bytes > 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 300 bytes. Error code 12", 300),
        ("[enforce fail a", 0),  # what is left of it where the text itself found no memory
        ("could not create a memory object", 0),
        ("could not execute a primitive", 0),  # what oneDNN says where its scratch memory is refused
        ("CUDA out of memory. Tried to allocate 2.50 MiB. GPU 0 has a total capacity of 139.80 GiB of which", 5 << 19),
    ],
)
def test_what_an_allocator_says_is_told_from_other_errors(text: str, wanted: int) -> None:
    told = limits.over_budget(RuntimeError(text), 3, stage(4, 5), 900, 1000, capped=True)
    assert isinstance(told, OverBudgetError)
    assert (told.stage, told.miss_bytes, told.capped) == (3, 100 + wanted, True)
    assert "GPU 0" not in str(told)  # CUDA's goes on for a page
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert limits.over_budget(other, 3, stage(4, 5), 900, 1000, capped=True) is other


def test_what_lies_outside_the_heap_is_off_the_cap_and_off_a_lowered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caps: list[int] = []
    monkeypatch.setattr(stages.allocator.HeapCap, "_limit", lambda cap, cap_bytes: caps.append(cap._held + cap_bytes))
    meter = SimpleNamespace(baseline=SimpleNamespace(heap_bytes=100 << 20), outside_heap_bytes=5 << 20)
    job = replace(context(tmp_path, [stage(0, 5)]), enforce=True)
    with limits.heap_cap(job, meter, {}, stage(0, 5), 50 << 20) as cap:  # type: ignore[arg-type]
        cap.resize(30 << 20)
    # Of 50 MiB, 2 are left to what may still come outside the heap.
    assert caps == [(100 + 48 - 5) << 20, (100 + 30 - 5) << 20]


def test_what_is_known_to_be_left_unwritten_is_no_part_of_the_budget(tmp_path: Path) -> None:
    job = replace(context(tmp_path, [stage(0, 5)]), enforce=True)
    modest, asking = unit_cost(), replace(unit_cost(), unwritten=Size(100, 10))
    job = replace(job, costs=replace(job.costs, units=(modest, asking, *[modest] * 4)))
    assert limits.unwritten_bytes(job, stage(1, 5, micro_batch=4)) == 140
    assert limits.releases(job, stage(1, 5)) and not limits.releases(job, stage(2, 5))
    assert limits.releases(replace(job, release_freed=True), stage(2, 5))
    # The heap gives back what is freed at once there, so that it may ask for more than the budget.
    budget = 50 << 20
    assert limits.whole_heap(job, stage(1, 5, micro_batch=4), budget) == budget + (16 << 20) + 140
    assert limits.whole_heap(job, stage(2, 5), budget) == budget - (2 << 20)
    assert limits.expected_bytes(job, stage(1, 5), 10 << 20, budget) == 10 << 20
    assert limits.expected_bytes(job, stage(2, 5), 10 << 20, budget) == 12 << 20
