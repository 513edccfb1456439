"""The global model of a job: its first weights, and which are in force."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog
from fedepth_wire.chunks import Source

from coordinator.closing import Closing
from coordinator.evaluations import Evaluations
from coordinator.long_work import LongWork
from coordinator.model_worker.client import Models
from coordinator.observe.events import Events
from coordinator.soundness import pause
from coordinator.store.entries import PREPARED_VERSION, Prepared, RoundRecord
from coordinator.store.records import Store
from fedepth.aggregation.combine import Paths
from fedepth.errors import StateError, UnavailableError
from fedepth.job import fixes_statistics, model_spec, training_spec
from fedepth.job_sections import JobConfig
from fedepth.layout import ModelLayout
from fedepth.preparation import preparation
from fedepth.task import Result, TrainingSpec
from fedepth.tensor_index import SMALL, encode_index, index_of

NO_TEST_DATA = "no [test] data: the accuracy stays unknown, and exports are compared on random inputs"

_log = structlog.get_logger()


async def prepare(config: JobConfig, store: Store, models: Models) -> Prepared:
    """Graph, layout and initial weights of the job's model, made now or in an earlier run.

    Raises:
        FedepthError: the model cannot be built, or not be exported with the operator set that the job names, or the
            state is damaged.
    """
    training = training_spec(config, 1)
    if not config.test_data:
        _log.info("job", note=NO_TEST_DATA)
    known = await asyncio.to_thread(store.prepared)
    started = await store.short(store.latest_round) is not None
    in_force = await asyncio.to_thread(store.weights_in_force) if started else None
    fixed = fixes_statistics(config)
    if known is not None and in_force and _is_current(known, training, fixed):
        await _check_export(config, store, models, in_force)
        return known
    partial = store.directory / "weights" / "initial.partial"
    answer = await models.request("prepare", **vars(preparation(config, store.files.graph(), partial)))
    for note in answer["notes"]:
        _log.info("model", note=note)
    await _check_export(config, store, models, partial)
    layout = msgspec.convert(answer["layout"], ModelLayout)
    prepared = Prepared(layout, training, answer["graph_digest"], answer["graph_bytes"], PREPARED_VERSION, fixed)
    await asyncio.to_thread(store.record_prepared, prepared)
    if started:
        # Only graph and costs were asked for: the weights of this job are trained ones.
        await asyncio.to_thread(partial.unlink)
    else:
        sealed = await asyncio.to_thread(store.seal_weights, partial, 0)
        if sealed.digest != answer["digest"]:
            raise StateError(f"initial weights have sha256 {sealed.digest[:12]}…, the model worker said otherwise")
        await asyncio.to_thread(store.record_round, RoundRecord(0, sealed.digest, sealed.size_bytes, time.time(), 0, 0))
    return prepared


def _is_current(known: Prepared, training: TrainingSpec, fixed: bool) -> bool:
    """Whether what was found out holds for this training; `fixed`: it is to fix statistics in some round."""
    alike = (known.training, known.version) == (training, PREPARED_VERSION)
    return alike and (known.fixed_statistics or not fixed)


async def _check_export(config: JobConfig, store: Store, models: Models, weights: Path) -> None:
    """An operator set that the job file names may be too low for the model: told now, not after rounds."""
    if config.export.opset is None:
        return
    graph = str(store.files.graph())
    await models.request(
        "check_export", model=model_spec(config), graph=graph, weights=str(weights), choices=config.export
    )


class GlobalModel:
    """The weights that devices are given, and what becomes of them. `record` is the latest finished round.

    It is made in a thread: it reads the record.
    """

    def __init__(
        self, config: JobConfig, store: Store, models: Models, events: Events, parameters: frozenset[str]
    ) -> None:
        """`parameters`: the names of the model's trainable parameters."""
        self._config = config
        self._store = store
        self._events = events
        self.long_work = LongWork(events)
        self._evaluations = Evaluations(config, store, models, events, self.long_work)
        self._closing = Closing(config, store, events, self._evaluations, parameters, self.long_work)
        self.record = self._latest()
        self._indexes: dict[str, Source | None] = {}  # of the weights in force and of those before, by their digests
        self._learn_index(self.record)

    @property
    def index(self) -> Source | None:
        """Of the weights in force (fedepth.tensor_index); None where it would save nothing."""
        return self._indexes.get(self.record.digest)

    def find_index(self, digest: str) -> Source | None:
        """The index with this digest of its own."""
        return next((index for index in self._indexes.values() if index is not None and index.digest == digest), None)

    def _learn_index(self, record: RoundRecord) -> None:
        """Makes the index of these weights. It follows from them, so that after a restart it is the same."""
        if record.digest not in self._indexes:
            before = {digest: index for digest, index in self._indexes.items() if digest == self.record.digest}
            self._indexes = {**before, record.digest: self._index_of(record)}

    def _index_of(self, record: RoundRecord) -> Source | None:
        found = self._store.find_weights(record.digest)
        if found is None:
            return None
        try:
            data = encode_index(index_of(self._store.files.weights(found.round, found.digest)))
        except (StateError, OSError) as error:
            _log.warning("the weights have no index; devices fetch all of them", error=str(error))
            return None
        if SMALL * len(data) > record.size_bytes:
            return None
        return Source(data, len(data), hashlib.sha256(data).hexdigest())

    async def _take_over(self, record: RoundRecord) -> None:
        await asyncio.to_thread(self._learn_index, record)
        self.record = record

    def _latest(self) -> RoundRecord:
        record = self._store.latest_round()
        if record is None:
            raise StateError(f"{self._store.directory} has no weights to begin with")
        return record

    def path(self) -> Path:
        """Where the weights in force lie, as the record says. They were hashed when they came, or at the start."""
        found = self._store.find_weights(self.record.digest)
        if found is None:
            raise StateError(f"{self._store.directory} has no weights {self.record.digest[:12]}…")
        return self._store.files.weights(found.round, found.digest)

    async def look_at(self, digest: str) -> None:
        """Sees that weights which could not be sent are sound, fetched again from where there is another copy.

        Raises:
            UnavailableError: that cannot be seen now.
            StateError: they are in force, and lost. The message says how to go on.
        """
        found = await self._store.short(self._store.find_weights, digest)
        if found is None:  # of a round that is no longer kept
            return
        latest = await self._store.short(self._latest)
        try:
            if digest == latest.digest:
                path = await asyncio.to_thread(self._store.weights_in_force)
            else:
                path = await asyncio.to_thread(self._store.weights_of, found)
        except UnavailableError:
            raise
        except StateError as error:
            if digest == latest.digest:
                raise
            self._events.send("log", message=f"weights of round {found.round}, which is past, are lost: {error}")
        else:
            self._events.send("log", message=f"{path} could not be sent to a device; it is sound now")

    async def close(self, number: int, results: Sequence[Result], paths: Paths) -> None:
        """Closes a round with these updates (see `Closing`), unless that was done and the word of it lost.

        Raises:
            UnavailableError: something cannot be written now.
            FedepthError: they cannot be combined; the weights before stand.
        """
        await self._store.short(self._store.check_hold)  # from here on, what is recorded is all that was
        before = await self._store.short(self._latest)
        if before.round >= number:
            await asyncio.to_thread(self._store.record_round, before)
        await self._take_over(before)
        if before.round < number:
            await self._take_over(await self._closing.close(number, before, results, paths))

    async def make_up(self) -> None:
        """Evaluates and exports what is missing of the rounds whose weights are kept (see `Evaluations`)."""
        await self._evaluations.make_up(self.record)
        await self._take_over(await self._store.short(self._latest))

    def why_paused(self) -> str:
        """Why no other round is to begin, as the record says, which is asked; empty if one may."""
        guard, store = self._config.guard, self._store
        latest = store.rounds(guard.pause_after)
        sound = store.find_weights(latest[-1].digest) if latest else None
        number = "N" if sound is None else sound.round
        return pause(latest, guard, f"--state {store.directory} --round {number}")
