"""Closing a round: its updates are combined, what comes of them is evaluated, and published or set aside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.evaluations import Evaluations
from coordinator.long_work import LongWork
from coordinator.observe.events import Events
from coordinator.store.entries import RoundRecord, Sealed, finite
from coordinator.store.records import Store, Summary
from fedepth.aggregation.combine import Paths, combine
from fedepth.errors import DamagedUpdateError, NotFiniteError, StateError, UnavailableError
from fedepth.heap import return_free_pages
from fedepth.job import aggregation_rule, training_spec
from fedepth.job_sections import JobConfig
from fedepth.rounds.soundness import objection
from fedepth.task import Result

DAMAGED_TRIES = 3  # of a disk that changes what it holds while it is read


class Closing:
    """Closes the rounds of one job, one at a time."""

    def __init__(
        self,
        config: JobConfig,
        store: Store,
        events: Events,
        evaluations: Evaluations,
        parameters: frozenset[str],
        long_work: LongWork,
    ) -> None:
        """`parameters`: the names of the model's trainable parameters."""
        self._config = config
        self._store = store
        self._events = events
        self._evaluations = evaluations
        self._parameters = parameters
        self._long_work = long_work

    async def close(self, number: int, before: RoundRecord, results: Sequence[Result], paths: Paths) -> RoundRecord:
        """Combines a round's updates, evaluates what comes of them, and records the round: with the new weights in
        force, or with those of before where the new ones are not sound. Can be done again after any failure.

        Args:
            before: the last recorded round.
            paths: where the parts of an update lie.

        Raises:
            UnavailableError: something cannot be written now.
            FedepthError: they cannot be combined; the weights before stand.
        """
        store = self._store
        partial = store.files.partial_weights(number)
        sound, note, digest = await self._long_work.wait_for(
            f"round {number}: the updates are being combined",
            asyncio.to_thread(self._combine, number, results, paths, partial),
        )
        found = None if note else await self._evaluations.evaluate(number, partial)
        if not note:
            known = await store.short(store.summary)
            note = objection(found, known.accuracy, self._config.guard)
        aside = ""
        in_force: Sealed | RoundRecord = before
        if await asyncio.to_thread(partial.exists):
            sealed = await asyncio.to_thread(store.seal_weights, partial, number, digest)
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
        was = await store.short(store.summary)
        await asyncio.to_thread(store.record_round, record)
        self._tell(record, [await store.short(store.device_name, result.device_id) for result in sound])
        self._tell_of_privacy(record, was, await store.short(store.summary))
        await asyncio.to_thread(return_free_pages)
        return record

    def _combine(
        self,
        number: int,
        results: Sequence[Result],
        paths: Paths,
        output: Path,
    ) -> tuple[list[Result], str, str | None]:
        """Writes the new weights to `output`. Returns the updates in them, why there are no weights, if so, and their
        sha256 (hex).

        A part that is no longer what was accepted is fetched again where there is another copy. Where there is none,
        the update is lost for good, since its device has let go of it: what is left is combined without it, and it is
        told.
        """
        sound = list(results)
        for _ in range(DAMAGED_TRIES):
            if not sound:
                break
            try:
                combined = combine(
                    aggregation_rule(self._config),
                    training_spec(self._config, 1),
                    self._store.weights_in_force(),  # looks at their digest, at each try
                    sound,
                    paths,
                    output,
                    parameters=self._parameters,
                    base_digest=None,
                )
            except NotFiniteError as error:
                return sound, str(error), None
            except DamagedUpdateError as error:
                damaged = set(error.paths)
                sound = [each for each in sound if damaged.isdisjoint(paths(each)) or self._fetched(number, each)]
                continue
            for note in combined.notes:
                self._events.send("log", message=f"round {number}: {note}")
            return sound, "", combined.digest
        return [], "the updates of the round are damaged on the coordinator's disk", None

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

    def _tell_of_privacy(self, record: RoundRecord, was: Summary, now: Summary) -> None:
        """What has changed in what the rounds' noise is worth."""
        if now.not_private and now.not_private != was.not_private:
            self._events.send("log", message=f"round {record.round}: {now.not_private}")
        elif now.epsilon is not None and was.epsilon is not None and now.delta != was.delta:
            self._events.send(
                "log",
                message=f"round {record.round}: privacy spent: epsilon {now.epsilon:.3g} with delta {now.delta:g}; it "
                f"was {was.epsilon:.3g} with delta {was.delta or 0:g}",
            )

    def _tell(self, record: RoundRecord, devices: Sequence[str]) -> None:
        if record.published:
            self._events.send("round_closed", round=record.round, updates=record.devices, samples=record.samples)
        else:
            self._events.send("not_published", round=record.round, reason=record.note, devices=devices)
        if record.accuracy is not None:
            self._events.send("evaluated", round=record.round, accuracy=record.accuracy, loss=record.loss)
