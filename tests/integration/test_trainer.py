"""The real trainer under its real limits: it refuses, waits, recovers, and is used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge_client.config import TrainerConfig
from edge_client.measure.trial import TrialModel, fixed_budget, trial_request, try_training, write_noise
from edge_client.outbox import trained_result
from edge_client.trainer.client import TrainerKeeper, TrainerProcess
from edge_client.trainer.protocol import Done, Failed, Measure, Paused, StageStarted, TrainRequest
from fedepth.estimate.peak import needed_bytes
from fedepth.memory.environment import find_tcmalloc
from fedepth.models.traced import TracedModel, write_traced
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.planning.planner import full_training_peak, make_plan
from fedepth.prepare import PreparedModel, trace_model
from fedepth.task import ModelSpec, Outcome, TrainingSpec
from fedepth.weights import save

MIB = 1 << 20
SPEC = ModelSpec("digits-cnn", tuple("0123456789"), (1, 64, 64), (0.5,), (0.5,))
BATCH = 64
ENOUGH = 400 * MIB
EPOCHS = 10  # a second at least: a stage looks at what is free once a second
ALLOCATORS = ["glibc", *(["tcmalloc"] if find_tcmalloc() else [])]

Request = Callable[..., TrainRequest]


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return trace_model(SPEC, TrainingSpec(BATCH, 1, "sgd", 0.01, 0.9, 0.0, 0.0, "none", 1), seed=1)


@pytest.fixture
def request_of(tmp_path: Path, prepared: PreparedModel) -> Request:
    weights, graph = tmp_path / "weights.safetensors", tmp_path / "graph.json"
    save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    data = write_noise(tmp_path / "data", SPEC, 3 * BATCH)
    traced = prepared.traced.costs
    # An estimate of a TiB, so that no smaller micro-batch seems to fit.
    costs = replace(traced, units=tuple(replace(unit, parameter_bytes=1 << 40) for unit in traced.units))
    write_traced(graph, TracedModel(prepared.traced.graph, costs))

    def request(first: int, last: int, budget: int, *, epochs: int = 1) -> TrainRequest:
        training = TrainingSpec(BATCH, epochs, "sgd", 0.01, 0.9, 0.0, 0.0, "none", 1)
        stage = Stage(first, last, BATCH, CachePlace.DISK, 4, PeakComponents(0, 0, 0, 0, 0, 0, 0))
        untrained = tuple(unit for unit in range(6) if not first <= unit <= last)
        plan = Plan((stage,), untrained, Policy.PAPER, budget)
        trial = TrialModel(SPEC, training, costs, graph, weights)
        return trial_request(trial, plan, budget, data, tmp_path / f"run-{first}", enforce=True)

    return request


@asynccontextmanager
async def running(allocator: str) -> AsyncIterator[TrainerProcess]:
    trainer = await TrainerProcess.start(msgspec.structs.replace(TrainerConfig(), allocator=allocator))
    try:
        yield trainer
    finally:
        await trainer.kill()


def play(scene: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 120))


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_what_does_not_fit_is_refused_with_numbers_and_the_next_task_is_trained(
    request_of: Request, allocator: str
) -> None:
    async def scene() -> None:
        keeper = TrainerKeeper(msgspec.structs.replace(TrainerConfig(), allocator=allocator))
        try:
            first = await keeper.take()
            end = await try_training(first, request_of(0, 5, 12 * MIB))
            assert isinstance(end, Failed) and end.outcome is Outcome.OVER_BUDGET
            assert "stage 0 (units 0-5" in end.message and "12.0 MiB" in end.message
            assert end.capped == (allocator == "tcmalloc")
            assert not first.alive  # it could be unable to compile another kernel
            again = await try_training(await keeper.take(), replace(request_of(0, 5, 12 * MIB), release_freed=True))
            assert isinstance(again, Failed) and again.outcome is Outcome.OVER_BUDGET and not again.capped
            # Other units, and enough memory.
            done = await try_training(await keeper.take(), request_of(4, 5, ENOUGH))
            assert isinstance(done, Done), done
            assert done.result.trained_units == (4, 5)
            assert trained_result(Path(request_of(4, 5, ENOUGH).output)) == done.result  # its last act
            (stage,) = done.result.stages
            assert 0 < stage.rehearsed_peak_bytes <= stage.measured_peak_bytes <= ENOUGH
        finally:
            await keeper.close()

    play(scene())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_an_lstm_is_trained_in_what_it_writes_to(tmp_path: Path, allocator: str) -> None:
    """It asks for three times as much, which a cap on the heap counts."""
    spec = ModelSpec("benchmarks.custom_models:wide_lstm", SPEC.classes, (48, 32), (0.3,) * 48, (0.35,) * 48)
    training = TrainingSpec(BATCH, 1, "sgd", 0.01, 0.9, 0.0, 0.0, "none", 1)
    prepared = trace_model(spec, training, seed=1)
    weights, graph = tmp_path / "weights.safetensors", tmp_path / "graph.json"
    save(weights, {name: tensor.detach().numpy() for name, tensor in prepared.tensors.items()})
    write_traced(graph, prepared.traced)
    costs = prepared.traced.costs
    samples = 2 * BATCH
    budget = needed_bytes(full_training_peak(costs, training, samples).total)
    plan = make_plan(costs, budget_bytes=budget, training=training, sample_count=samples, policy=Policy.AUTO)
    (only,) = plan.stages
    assert sum(unit.unwritten.at(only.micro_batch) for unit in costs.units) > budget / 4
    trial = TrialModel(spec, training, costs, graph, weights)
    request = trial_request(
        trial, plan, budget, write_noise(tmp_path / "data", spec, samples), tmp_path / "run", enforce=True
    )

    async def scene() -> None:
        async with running(allocator) as trainer:
            end = await try_training(trainer, request)
            assert isinstance(end, Done), end
            assert end.result.stages[0].measured_peak_bytes <= budget

    play(scene())


def test_a_file_that_cannot_be_written_is_told_and_is_no_death(request_of: Request, tmp_path: Path) -> None:
    async def scene() -> None:
        (tmp_path / "file").touch()
        async with running("glibc") as trainer:
            end = await try_training(
                trainer, replace(request_of(5, 5, ENOUGH), output=str(tmp_path / "file" / "below"))
            )
            assert isinstance(end, Failed) and end.outcome is Outcome.ERROR
            assert "NotADirectoryError" in end.message and "below" in end.message

    play(scene())


def test_training_that_diverges_is_told_and_the_trainer_lives_on(request_of: Request) -> None:
    async def scene() -> None:
        async with running("glibc") as trainer:
            request = request_of(5, 5, ENOUGH)
            task = request.task
            far = replace(request, task=replace(task, training=replace(task.training, learning_rate=1e30)))
            end = await try_training(trainer, far)
            assert isinstance(end, Failed) and end.outcome is Outcome.DIVERGED, end
            assert "at learning rate 1e+30; lower training.learning_rate" in end.message
            assert isinstance(await try_training(trainer, request), Done)

    play(scene())


def test_no_more_than_was_reported_is_trained_on(request_of: Request) -> None:
    async def scene() -> None:
        async with running("glibc") as trainer:
            done = await try_training(trainer, replace(request_of(5, 5, ENOUGH), most_samples=BATCH + 1))
            assert isinstance(done, Done), done
            assert done.result.sample_count == BATCH + 1
            assert done.result.stages[0].samples_seen == BATCH + 1

    play(scene())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_stage_that_paused_goes_on_with_its_whole_micro_batch(request_of: Request, allocator: str) -> None:
    async def scene() -> None:
        async with running(allocator) as trainer:
            waited = 0
            started = False
            async for event in trainer.train(request_of(0, 5, ENOUGH, epochs=EPOCHS)):
                if isinstance(event, Measure):
                    # Once the stage runs, others take everything for two looks.
                    budget = 0 if started and waited < 2 else ENOUGH
                    await trainer.answer(fixed_budget(budget))
                started = started or isinstance(event, StageStarted)
                waited += isinstance(event, Paused)
                if isinstance(event, (Done, Failed)):
                    break
            assert waited == 2
            assert isinstance(event, Done), event
            (stage,) = event.result.stages
            assert stage.micro_batch == BATCH and stage.steps == EPOCHS * 3

    play(scene())
