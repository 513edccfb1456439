"""The global model of a job: its first weights, and after every round their average, accuracy and ONNX file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from coordinator.model_worker.client import Models
from coordinator.observe.events import Events
from coordinator.store.records import Prepared, RoundRecord, Store
from fedepth.errors import FedepthError, StateError
from fedepth.job import JobConfig, model_spec, training_spec
from fedepth.layout import ModelLayout

_log = structlog.get_logger()

Update = tuple[tuple[Path, ...], float]  # the parts of an update, and its weight in the average


async def prepare(config: JobConfig, store: Store, models: Models) -> Prepared:
    """Graph, layout and initial weights of the job's model, made now or in an earlier run.

    Raises:
        FedepthError: the model cannot be built, or the state is damaged.
    """
    training = training_spec(config, 1)
    await asyncio.to_thread(store.verify_latest)
    known = store.prepared()
    started = store.latest_round() is not None
    if known is not None and started and known.training == training:
        return known
    partial = store.directory / "weights" / "initial.partial"
    answer = await models.request(
        "prepare",
        model=model_spec(config),
        training=training,
        seed=config.job.seed,
        weights=config.model.weights,
        graph=str(store.files.graph()),
        output=str(partial),
    )
    for note in answer["notes"]:
        _log.info("model", note=note)
    layout = msgspec.convert(answer["layout"], ModelLayout)
    prepared = Prepared(layout, training, answer["graph_digest"], answer["graph_bytes"])
    store.record_prepared(prepared)
    if started:
        partial.unlink()  # only graph and costs were asked for: the weights of this job are trained ones
    else:
        record = await asyncio.to_thread(store.seal_weights, partial, 0, 0, 0)
        if record.digest != answer["digest"]:
            raise StateError(f"initial weights have sha256 {record.digest[:12]}…, the model worker said otherwise")
        store.record_round(record)
    return prepared


class GlobalModel:
    """The weights that devices are given, and what becomes of them. `record` is the latest finished round."""

    def __init__(self, config: JobConfig, store: Store, models: Models, events: Events) -> None:
        self._config = config
        self._store = store
        self._models = models
        self._events = events
        self.record = self._latest()

    def _latest(self) -> RoundRecord:
        record = self._store.latest_round()
        if record is None:
            raise StateError(f"{self._store.directory} has no weights to begin with")
        return record

    async def average(self, round_number: int, updates: Sequence[Update], samples: int) -> None:
        """Replaces the weights by the mean of `updates`, on disk and recorded.

        Raises:
            FedepthError: they cannot be averaged or recorded; the weights before stand.
        """
        store = self._store
        partial = store.files.partial_weights(round_number)
        await asyncio.to_thread(average_updates, store.files.weights(self.record.round), updates, partial)
        record = await asyncio.to_thread(store.seal_weights, partial, round_number, len(updates), samples)
        store.record_round(record)
        self.record = record
        self._events.send("round_closed", round=round_number, updates=len(updates), samples=samples)

    async def evaluate(self) -> None:
        """Accuracy on the job's test data. A failure is logged; the round stands without it."""
        weights = self.record
        try:
            answer = await self._models.request(
                "evaluate",
                model=model_spec(self._config),
                graph=str(self._store.files.graph()),
                weights=str(self._store.files.weights(weights.round)),
                test_data=self._config.test.data,
            )
        except FedepthError as error:
            self._events.send("log", message=f"round {weights.round} could not be evaluated: {error}")
            return
        self._store.set_evaluation(weights.round, answer["accuracy"], answer["loss"])
        self.record = self._latest()
        self._events.send("evaluated", round=weights.round, accuracy=answer["accuracy"], loss=answer["loss"])

    async def export(self) -> None:
        """ONNX with its parity report. A failure is logged; `fedepth-coordinator export` tries again."""
        weights = self.record
        try:
            answer = await self._models.request("export", **export_fields(self._config, self._store, weights))
        except FedepthError as error:
            self._events.send("log", message=f"round {weights.round} could not be exported: {error}")
            return
        self._store.set_export(weights.round, answer["path"], answer["parity_max_abs"])
        self.record = self._latest()
        self._events.send(
            "exported",
            round=weights.round,
            path=answer["path"],
            parity_max_abs=answer["parity_max_abs"],
            samples=answer["samples"],
        )


def average_updates(base: Path, updates: Sequence[Update], output: Path) -> None:
    """Writes the mean of updates, each given by its parts and its weight, to `output`."""
    from fedepth.aggregation.mean import (  # numpy: only when there is something to average
        ClientUpdate,
        average,
    )

    average(base, [ClientUpdate(parts, weight) for parts, weight in updates], output)


def export_fields(config: JobConfig, store: Store, weights: RoundRecord, output: str = "") -> dict[str, Any]:
    """The request that exports a round's weights, to `output` or to their place in the state directory."""
    return {
        "model": model_spec(config),
        "graph": str(store.files.graph()),
        "weights": str(store.files.weights(weights.round)),
        "weights_digest": weights.digest,
        "job": config.job.name,
        "round": weights.round,
        "test_data": config.test.data,
        "output": output or str(store.files.export(store.job_name, weights.round)),
    }
