"""Accuracies and ONNX files of rounds: made when a round closes, and made up for where a crash has left them out."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from coordinator.long_work import LongWork
from coordinator.model_worker.client import Models
from coordinator.observe.events import Events
from coordinator.store.entries import RoundRecord
from coordinator.store.records import Store
from fedepth.errors import ChildError, FedepthError, StateError, UnavailableError
from fedepth.job import model_spec
from fedepth.job_sections import JobConfig
from fedepth.rounds.soundness import Evaluation

TRIES = 3  # of what the model worker died of


class Evaluations:
    """Has the model worker evaluate and export the weights of rounds."""

    def __init__(self, config: JobConfig, store: Store, models: Models, events: Events, long_work: LongWork) -> None:
        self._config = config
        self._store = store
        self._models = models
        self._events = events
        self._long_work = long_work
        self._tries: Counter[tuple[str, int]] = Counter()  # what failed how often since the start

    async def make_up(self, in_force: RoundRecord) -> None:
        """Evaluates and exports what a crash or a failure has left out, of the rounds whose weights are kept.

        A failure is logged, and the job goes on without it. What failed because the worker died is tried again; the
        rest not before the next start.
        """
        for record in await self._store.short(self._store.kept_rounds):
            missing = record.round > 0 and record.accuracy is None and self._config.test is not None
            if missing and self._tries["evaluate", record.round] < TRIES:
                await self._make_up_evaluation(record)
            while self._is_due(record, in_force) and self._tries["export", record.round] < TRIES:
                if await self._export(record):
                    break

    async def _make_up_evaluation(self, record: RoundRecord) -> None:
        try:
            weights = await asyncio.to_thread(self._store.weights_of, record)
        except UnavailableError:
            raise
        except StateError as error:  # of a round that is past: no reason to stop
            self._note_failure("evaluate", record.round, error)
            self._events.send("log", message=f"round {record.round} cannot be evaluated: {error}")
            return
        found = await self.evaluate(record.round, weights)
        if found is not None:
            await self._store.short(self._store.set_evaluation, record.round, found.accuracy, found.loss)
            self._events.send("evaluated", round=record.round, accuracy=found.accuracy, loss=found.loss)

    def _is_due(self, record: RoundRecord, in_force: RoundRecord) -> bool:
        every, last = self._config.export.every, self._config.job.rounds
        due = record.round >= last or (record.round > 0 and every and record.round % every == 0)
        # Where the last rounds were not published, the job's result is that of the round before them.
        due = due or (in_force.round >= last and record.digest == in_force.digest)
        return bool(due) and not record.export_path

    async def _evaluate(self, number: int, weights: Path) -> Evaluation | None:
        try:
            asked = self._models.request(
                "evaluate",
                model=model_spec(self._config),
                graph=str(self._store.files.graph()),
                weights=str(weights),
                test_data=self._config.test_data,
                most_damaged=self._config.most_damaged,
            )
            answer = await self._long_work.wait_for(f"round {number}: the model is being evaluated", asked)
        except UnavailableError:
            raise
        except FedepthError as error:
            self._note_failure("evaluate", number, error)
            self._events.send("log", message=f"round {number} could not be evaluated: {error}")
            return None
        return Evaluation(answer["accuracy"], answer["loss"])

    async def evaluate(self, number: int, weights: Path) -> Evaluation | None:
        """What these weights do on the job's test data, tried again with another worker where the worker died.

        None where the job has no test data, or where that cannot be found out, which is logged.
        """
        found = None
        while self._config.test is not None and found is None and self._tries["evaluate", number] < TRIES:
            found = await self._evaluate(number, weights)
        return found

    def _note_failure(self, what: str, number: int, error: FedepthError) -> None:
        self._tries[what, number] += 1 if isinstance(error, ChildError) else TRIES

    async def _export(self, record: RoundRecord) -> bool:
        """ONNX with its parity report; whether that succeeded. If not, `fedepth-coordinator export` may be tried."""
        try:
            fields = await asyncio.to_thread(export_fields, self._config, self._store, record)
            asked = self._models.request("export", **fields)
            answer = await self._long_work.wait_for(f"round {record.round}: the model is being exported", asked)
        except UnavailableError:
            raise
        except FedepthError as error:
            self._note_failure("export", record.round, error)
            self._events.send("log", message=f"round {record.round} could not be exported: {error}")
            return False
        await asyncio.to_thread(self._store.set_export, record.round, answer["path"], answer["parity_max_abs"])
        self._events.send(
            "exported",
            round=record.round,
            path=answer["path"],
            parity_max_abs=answer["parity_max_abs"],
            samples=answer["samples"],
            compared_on=answer["compared_on"],
        )
        return True


def export_fields(config: JobConfig, store: Store, weights: RoundRecord, output: str = "") -> dict[str, Any]:
    """The request that exports a round's weights, to `output` or to their place in the state directory."""
    return {
        "model": model_spec(config),
        "graph": str(store.files.graph()),
        "weights": str(store.weights_of(weights)),
        "weights_digest": weights.digest,
        "job": config.job.name,
        "round": weights.round,
        "test_data": config.test_data,
        "choices": config.export,
        "output": output or str(store.files.export(store.job_name, weights.round)),
    }
