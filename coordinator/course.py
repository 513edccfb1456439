"""What a job does by itself: it lets time pass, closes rounds, makes up for what is missing, and tries all of it again.

Every step can be done again, and is, until it succeeds or the job ends with a sentence.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fedepth.errors import JobError, StateError, UnavailableError
from fedepth.rounds.events import RoundDone, Tick
from fedepth.rounds.machine import Phase

if TYPE_CHECKING:
    from coordinator.job import Job

TICK_S = 0.2
HOLD_S = 5.0  # how often it is checked that nobody else has the record
REMIND_S = 60.0  # how often trouble with the storage is told
REMIND_OF_PAUSE_S = 180.0
LONGEST_PAUSE_S = 20.0


class Course:
    """The course of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._wake = asyncio.Event()
        self._to_tidy, self._tidy_at = True, float("-inf")  # the second: not before
        self._suspects: set[str] = set()  # digests of files that could not be sent
        self._told: dict[str, float] = {}  # when trouble of each kind was told last
        self._pause_told = float("-inf")
        self._held_at = job.now()  # when the record was known to be ours

    def wake(self) -> None:
        """There is something to do before the next tick."""
        self._wake.set()

    def suspect(self, digest: str) -> None:
        """Notes that the file with this digest could not be sent or read: it is looked at before a round is closed."""
        self._suspects.add(digest)
        self._wake.set()

    async def run(self) -> None:
        """Lets time pass, and closes rounds, until it is cancelled.

        Raises:
            JobError: no device can train this job.
            FedepthError: a round could not be averaged or recorded, for good. The state is sound; start again.
        """
        job = self._job
        pause = TICK_S
        while True:
            try:
                await self._turn()
                pause = TICK_S
            except (UnavailableError, OSError) as error:
                self.tell_trouble(error)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            if job.state.phase is Phase.AGGREGATING and pause == TICK_S:
                continue
            await self._sleep(pause)

    async def _turn(self) -> None:
        """What there is to do now. Every step of it can be done again."""
        job = self._job
        self._wake.clear()
        if job.now() - self._held_at >= HOLD_S:  # a job that idles writes nothing, and would not notice
            await job.store.short(job.store.check_hold)
            self._held_at = job.now()
        await job.apply(Tick(job.now()))
        if job.state.phase is Phase.STUCK:
            raise JobError(f"{job.state.why}; fix the job file and start it again")
        for digest in tuple(self._suspects):
            await self._look_at(digest)
        if job.state.phase is Phase.AGGREGATING:
            await self._close(job.state.round)
        if self._to_tidy and job.now() >= self._tidy_at:
            await self._tidy()
        if job.state.phase is Phase.FINISHED and not job.finished.is_set():
            job.finish()
        if job.state.phase is Phase.PAUSED:
            self._remind_of_pause()

    async def _sleep(self, seconds: float) -> None:
        waker = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({waker}, timeout=seconds)
        finally:
            waker.cancel()

    async def _look_at(self, digest: str) -> None:
        """Sees that a file that could not be sent is sound, fetched again from where there is another copy.

        Raises:
            StateError: the job cannot go on without it.
        """
        job = self._job
        if digest == job.graph_digest:
            if await asyncio.to_thread(job.store.prepared) is None:
                raise StateError(
                    f"{job.store.files.graph()} is missing or damaged; start the coordinator again, which rebuilds it"
                )
        else:
            await job.weights.look_at(digest)
        self._suspects.discard(digest)

    async def _close(self, number: int) -> None:
        job = self._job
        if job.weights.record.round < number:
            results = await asyncio.to_thread(job.store.updates_of, number)
            await job.weights.close(number, results, job.uploads.paths)
        why_paused = await job.store.short(job.weights.why_paused)
        await job.apply(RoundDone(number, job.now(), why_paused))
        job.uploads.forget_round()  # once: what streams of the next round have claimed of the spool must count
        self._to_tidy, self._tidy_at = True, float("-inf")

    async def _tidy(self) -> None:
        """What a closed round leaves to do, or a crash has left. Files that cannot be deleted hold up nothing else."""
        job = self._job
        pruned = True
        try:
            await asyncio.to_thread(job.store.prune, job.config.retention)
        except (UnavailableError, OSError) as error:
            pruned = False
            self._tidy_at = job.now() + REMIND_S
            self._tell("what the job no longer keeps cannot be deleted now, which is tried again", error)
        await job.weights.make_up()
        self._to_tidy = not pruned

    def _remind_of_pause(self) -> None:
        """A pause ends only by what its operator does, who may look at the log at any time."""
        job = self._job
        if job.now() - self._pause_told >= REMIND_OF_PAUSE_S:
            self._pause_told = job.now()
            job.events.send("paused", round=job.weights.record.round, reason=job.state.why)

    def tell_trouble(self, error: UnavailableError | OSError) -> None:
        self._tell("the job cannot continue now, and tries again", error)

    def _tell(self, trouble: str, error: UnavailableError | OSError) -> None:
        now = self._job.now()
        if now - self._told.get(trouble, float("-inf")) >= REMIND_S:
            self._told[trouble] = now
            self._job.events.send("log", message=f"{trouble}: {error}")
