"""The global model of a job: its first weights, and after every round their average, accuracy and ONNX file."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from coordinator.model_worker.client import Models
from coordinator.observe.events import Events
from coordinator.soundness import Evaluation, objection, pause
from coordinator.store.entries import PREPARED_VERSION, Prepared, RoundRecord, Sealed, finite
from coordinator.store.records import Store, Summary
from fedepth.errors import ChildError, DamagedUpdateError, FedepthError, NotFiniteError, StateError, UnavailableError
from fedepth.files import disk_errors
from fedepth.job import aggregation_rule, model_spec, training_spec
from fedepth.job_sections import JobConfig
from fedepth.layout import ModelLayout
from fedepth.task import Result

TRIES = 3  # of what the model worker died of
DAMAGED_TRIES = 3  # of a disk that changes what it holds while it is read

_log = structlog.get_logger()


async def prepare(config: JobConfig, store: Store, models: Models) -> Prepared:
    """Graph, layout and initial weights of the job's model, made now or in an earlier run.

    Raises:
        FedepthError: the model cannot be built, or the state is damaged.
    """
    training = training_spec(config, 1)
    known = store.prepared()
    started = store.latest_round() is not None
    if started:
        await asyncio.to_thread(store.weights_in_force)
    if known is not None and started and (known.training, known.version) == (training, PREPARED_VERSION):
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
        folder=config.folder,
    )
    for note in answer["notes"]:
        _log.info("model", note=note)
    layout = msgspec.convert(answer["layout"], ModelLayout)
    prepared = Prepared(layout, training, answer["graph_digest"], answer["graph_bytes"], PREPARED_VERSION)
    store.record_prepared(prepared)
    if started:
        partial.unlink()  # only graph and costs were asked for: the weights of this job are trained ones
    else:
        sealed = await asyncio.to_thread(store.seal_weights, partial, 0)
        if sealed.digest != answer["digest"]:
            raise StateError(f"initial weights have sha256 {sealed.digest[:12]}…, the model worker said otherwise")
        store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, time.time(), 0, 0))
    return prepared


class GlobalModel:
    """The weights that devices are given, and what becomes of them. `record` is the latest finished round."""

    def __init__(
        self, config: JobConfig, store: Store, models: Models, events: Events, parameters: frozenset[str]
    ) -> None:
        """`parameters`: the names of the model's trainable parameters."""
        self._config = config
        self._store = store
        self._models = models
        self._events = events
        self._parameters = parameters
        self._tries: Counter[tuple[str, int]] = Counter()  # what failed how often since the start
        self.record = self._latest()

    def _latest(self) -> RoundRecord:
        record = self._store.latest_round()
        if record is None:
            raise StateError(f"{self._store.directory} has no weights to begin with")
        return record

    def path(self) -> Path:
        """Where the weights in force lie. They were hashed when they were put there, or at the start."""
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
        found = self._store.find_weights(digest)
        if found is None:  # of a round that is no longer kept
            return
        try:
            if digest == self._latest().digest:
                path = await asyncio.to_thread(self._store.weights_in_force)
            else:
                path = await asyncio.to_thread(self._store.weights_of, found)
        except UnavailableError:
            raise
        except StateError as error:
            if digest == self._latest().digest:
                raise
            self._events.send("log", message=f"weights of round {found.round}, which is past, are lost: {error}")
        else:
            self._events.send("log", message=f"{path} could not be sent to a device; it is sound now")

    async def close(self, number: int, results: Sequence[Result], paths: Callable[[Result], tuple[Path, ...]]) -> None:
        """Combines a round's updates, evaluates what comes of them, and records the round: with the new weights in
        force, or with those of before where the new ones are not sound. Can be done again after any failure.

        Raises:
            UnavailableError: something cannot be written now.
            FedepthError: they cannot be combined; the weights before stand.
        """
        store, before = self._store, self._latest()
        if before.round >= number:  # it was recorded, and the word of it was lost
            await asyncio.to_thread(store.record_round, before)
        self.record = before
        if before.round >= number:
            return
        base = await asyncio.to_thread(store.weights_in_force)
        partial = store.files.partial_weights(number)
        sound, note = await asyncio.to_thread(self._combine, number, base, results, paths, partial)
        found = None if note else await self._evaluate_or_retry(number, partial)
        if not note:
            note = objection(found, store.summary().accuracy, self._config.guard)
        aside = ""
        in_force: Sealed | RoundRecord = before
        if partial.exists():
            sealed = await asyncio.to_thread(store.seal_weights, partial, number)
            in_force, aside = (before, sealed.digest) if note else (sealed, "")
        record = RoundRecord(
            round=number,
            digest=in_force.digest,
            size_bytes=in_force.size_bytes,
            closed_at=time.time(),
            devices=len(sound),
            samples=sum(result.sample_count for result in sound),
            accuracy=None if found is None else found.accuracy,
            loss=None if found is None else found.loss,
            published=not note,
            note=note,
            aside_digest=aside,
            **await asyncio.to_thread(self._privacy_spent),
        )
        was = await asyncio.to_thread(store.summary)
        await asyncio.to_thread(store.record_round, record)
        self.record = record
        self._tell(record, [store.device_name(result.device_id) for result in sound])
        self._tell_of_privacy(record, was)

    def _combine(
        self,
        number: int,
        base: Path,
        results: Sequence[Result],
        paths: Callable[[Result], tuple[Path, ...]],
        output: Path,
    ) -> tuple[list[Result], str]:
        """Writes the new weights to `output`. Returns the updates in them, and why there are no weights, if so.

        A part that is no longer what was accepted is fetched again where there is another copy. Where there is none,
        the update is lost for good, since its device has let go of it: what is left is combined without it, and it is
        told.
        """
        sound = list(results)
        for _ in range(DAMAGED_TRIES):
            if not sound:
                break
            try:
                notes = combine(self._config, base, self.record.digest, sound, paths, self._parameters, output)
            except NotFiniteError as error:
                return sound, str(error)
            except DamagedUpdateError as error:
                damaged = set(error.paths)
                sound = [each for each in sound if damaged.isdisjoint(paths(each)) or self._fetched(number, each)]
                continue
            for note in notes:
                self._events.send("log", message=f"round {number}: {note}")
            return sound, ""
        return [], "the updates of the round are damaged on the coordinator's disk"

    def _fetched(self, number: int, result: Result) -> bool:
        try:
            self._store.fetch_parts(result)
        except UnavailableError:
            raise
        except StateError as error:
            device = self._store.device_name(result.device_id)
            self._events.send("update_damaged", round=number, device=device, task_id=result.task_id, message=str(error))
            return False
        return True

    def _privacy_spent(self) -> dict[str, Any]:
        """The noise of this round, and what all rounds have spent with it, each with the noise that it was closed
        with; also those that were not published or were taken back: their averages were made, and evaluated."""
        privacy = self._config.privacy
        if privacy is None:
            return {"noise_multiplier": 0.0}
        from fedepth.aggregation.privacy import spent_epsilon

        own = {
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": privacy.clip_norm,
            "delta": privacy.delta,
        }
        known: list[float] = [privacy.noise_multiplier]
        for each in self._store.noise_multipliers():
            if each is None:
                return {**own, "epsilon": None}
            known.append(each)
        return {**own, "epsilon": finite(spent_epsilon(known, privacy.delta))}

    def _tell_of_privacy(self, record: RoundRecord, was: Summary) -> None:
        """What has changed in what the rounds' noise is worth."""
        now = self._store.summary()
        if now.not_private and now.not_private != was.not_private:
            self._events.send("log", message=f"round {record.round}: {now.not_private}")
        elif now.epsilon is not None and was.epsilon is not None and now.delta != was.delta:
            self._events.send(
                "log",
                message=f"round {record.round}: privacy spent: epsilon {now.epsilon:.3g} with delta {now.delta:g}; it "
                f"was {was.epsilon:.3g} with delta {was.delta or 0:g}",
            )

    def why_paused(self) -> str:
        """Why no other round is to begin, as the record says; empty if one may."""
        guard, store = self._config.guard, self._store
        latest = store.rounds(guard.pause_after)
        sound = store.find_weights(latest[-1].digest) if latest else None
        number = "N" if sound is None else sound.round
        return pause(latest, guard, f"--state {store.directory} --round {number}")

    def _tell(self, record: RoundRecord, devices: Sequence[str]) -> None:
        if record.published:
            self._events.send("round_closed", round=record.round, updates=record.devices, samples=record.samples)
        else:
            self._events.send("not_published", round=record.round, reason=record.note, devices=devices)
        if record.accuracy is not None:
            self._events.send("evaluated", round=record.round, accuracy=record.accuracy, loss=record.loss)

    async def make_up(self) -> None:
        """Evaluates and exports what a crash or a failure has left out, of the rounds whose weights are kept.

        A failure is logged, and the job goes on without it. What failed because the worker died is tried again; the
        rest not before the next start.
        """
        for record in self._store.kept_rounds():
            if record.round > 0 and record.accuracy is None and self._tries["evaluate", record.round] < TRIES:
                await self._make_up_evaluation(record)
            while self._is_due(record) and self._tries["export", record.round] < TRIES:
                if await self._export(record):
                    break
        self.record = self._latest()

    async def _make_up_evaluation(self, record: RoundRecord) -> None:
        try:
            weights = await asyncio.to_thread(self._store.weights_of, record)
        except UnavailableError:
            raise
        except StateError as error:  # of a round that is past: no reason to stop
            self._note_failure("evaluate", record.round, error)
            self._events.send("log", message=f"round {record.round} cannot be evaluated: {error}")
            return
        found = await self._evaluate_or_retry(record.round, weights)
        if found is not None:
            self._store.set_evaluation(record.round, found.accuracy, found.loss)
            self._events.send("evaluated", round=record.round, accuracy=found.accuracy, loss=found.loss)

    def _is_due(self, record: RoundRecord) -> bool:
        every, last = self._config.export.every, self._config.job.rounds
        due = record.round >= last or (record.round > 0 and every and record.round % every == 0)
        # Where the last rounds were not published, the job's result is that of the round before them.
        due = due or (self.record.round >= last and record.digest == self.record.digest)
        return bool(due) and not record.export_path

    async def _evaluate(self, number: int, weights: Path) -> Evaluation | None:
        """What these weights do on the job's test data; None if that cannot be found out, which is logged."""
        try:
            answer = await self._models.request(
                "evaluate",
                model=model_spec(self._config),
                graph=str(self._store.files.graph()),
                weights=str(weights),
                test_data=self._config.test.data,
            )
        except UnavailableError:
            raise
        except FedepthError as error:
            self._note_failure("evaluate", number, error)
            self._events.send("log", message=f"round {number} could not be evaluated: {error}")
            return None
        return Evaluation(answer["accuracy"], answer["loss"])

    async def _evaluate_or_retry(self, number: int, weights: Path) -> Evaluation | None:
        """`_evaluate`, again with another worker where the worker died."""
        found = None
        while found is None and self._tries["evaluate", number] < TRIES:
            found = await self._evaluate(number, weights)
        return found

    def _note_failure(self, what: str, number: int, error: FedepthError) -> None:
        self._tries[what, number] += 1 if isinstance(error, ChildError) else TRIES

    async def _export(self, record: RoundRecord) -> bool:
        """ONNX with its parity report; whether that succeeded. If not, `fedepth-coordinator export` may be tried."""
        try:
            fields = await asyncio.to_thread(export_fields, self._config, self._store, record)
            answer = await self._models.request("export", **fields)
        except UnavailableError:
            raise
        except FedepthError as error:
            self._note_failure("export", record.round, error)
            self._events.send("log", message=f"round {record.round} could not be exported: {error}")
            return False
        self._store.set_export(record.round, answer["path"], answer["parity_max_abs"])
        self._events.send(
            "exported",
            round=record.round,
            path=answer["path"],
            parity_max_abs=answer["parity_max_abs"],
            samples=answer["samples"],
        )
        return True


def combine(
    config: JobConfig,
    base: Path,
    base_digest: str,
    results: Sequence[Result],
    paths: Callable[[Result], tuple[Path, ...]],
    parameters: frozenset[str],
    output: Path,
) -> list[str]:
    """Writes what the job's rule makes of updates to `output`, and returns what there is to tell of it.

    Raises:
        NotFiniteError: a new value would be no finite number; nothing is written.
        DiskError: it cannot be written now.
        StateError: an update does not fit the weights, or the weights are damaged.
    """
    # numpy: only when there is something to combine
    from fedepth.aggregation.aggregate import aggregate
    from fedepth.aggregation.updates import ClientUpdate

    training = training_spec(config, 1)
    updates = [
        ClientUpdate(
            paths(result),
            float(result.sample_count),
            tuple(part.digest for part in result.parts),
            result.steps(training),
        )
        for result in results
    ]
    with disk_errors("the average cannot be written", output):
        told = aggregate(
            base, updates, output, aggregation_rule(config), parameters=parameters, base_digest=base_digest
        )
    names = [result.device_id for result in results]
    notes = [
        f"the {each.kind} of {names[each.update]} changed by {each.change:.3g}, and count as if by {each.bound:.3g}"
        for each in told.clipped
    ]
    if told.left_out:
        notes.append(f"left out, being far from the others: {', '.join(names[index] for index in told.left_out)}")
    if told.unjudged:
        notes.append(f"taken without being judged, for want of others: {', '.join(names[i] for i in told.unjudged)}")
    return [*notes, *told.notes]


def export_fields(config: JobConfig, store: Store, weights: RoundRecord, output: str = "") -> dict[str, Any]:
    """The request that exports a round's weights, to `output` or to their place in the state directory."""
    return {
        "model": model_spec(config),
        "graph": str(store.files.graph()),
        "weights": str(store.weights_of(weights)),
        "weights_digest": weights.digest,
        "job": config.job.name,
        "round": weights.round,
        "test_data": config.test.data,
        "output": output or str(store.files.export(store.job_name, weights.round)),
    }
