"""One round in simulated time, by the state machine of a coordinator (fedepth.rounds.machine).

Time stands still but for what a trace says that tasks take. What happens in a round, and so who is drawn, who is late
and who steps in, follows from seed, trace and the outcome of tasks, never from how long workers really train.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedepth.errors import JobError
from fedepth.rounds.events import Asked, EndTask, Event, GiveTask, Log, TaskFailed, Tick
from fedepth.rounds.machine import Facts, Phase, Rules, accepts, restore, step
from fedepth.rounds.presence import Presence
from fedepth.simulation.trace import Trace
from fedepth.task import Failure, Result

_IDLE_STEPS = 8  # so many times the clock moves on, with nothing but deadlines passing, before a round is given up
_MOST_IDLE_STEPS = 100_000  # whatever a trace says of who comes when


@dataclass(frozen=True)
class Given:
    """A task that a client was given, and how long it takes it in simulated seconds, from weights to update."""

    task_id: str
    client: str
    attempt: int
    round: int
    seconds: float


@dataclass
class Played:
    """What came of a round.

    Attributes:
        ended_at: in simulated seconds.
        updates: that count, in the order in which they came.
        given: all tasks, in the order in which they were given.
        ends: what became of those without an update, by task: lost, failed or refused, and why.
        late: those whose clients came, or would have come, when their updates did not count any more.
        notes: what there is to tell.
    """

    ended_at: float = 0.0
    updates: list[Result] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    late: list[Given] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Train = Callable[[Given], Coroutine[Any, Any, Result | Failure]]
Judge = Callable[[Result], str]


class Round:
    """One round, until it may be closed."""

    def __init__(
        self,
        rules: Rules,
        number: int,
        now: float,
        durations: Mapping[str, float],
        trace: Trace,
        train: Train,
        judge: Judge,
    ) -> None:
        """
        Args:
            now: when it begins, in simulated seconds.
            durations: of a task, for every client that can take part, in seconds.
            train: trains a task in reality.
            judge: why an update is refused; empty if it is not.
        """
        self._rules = rules
        self._trace = trace
        self._durations = durations
        self._train = train
        self._judge = judge
        self._now = now
        self._presence = Presence(rules.lease_s)
        self._recorded: set[str] = set()
        self._facts = Facts(self._recorded, self._presence)
        self._state = restore(rules, number - 1, (), now)
        self._busy: dict[str, Given] = {}  # by client
        self._away: set[str] = set()  # dropped out
        self._training: dict[str, asyncio.Task[Result | Failure]] = {}  # by task
        self._ends: list[tuple[float, int, Given]] = []  # when tasks are over, the earliest first
        self._count = itertools.count()
        self._mobile = [client for client in durations if trace.of(client).available]
        self.played = Played()

    async def play(self) -> Played:
        """Plays the round to its end.

        Raises:
            JobError: it cannot reach its quorum.
        """
        try:
            self._arrive(self._durations)
            self._step(Tick(self._now))
            idle, since = 0, self._now
            while self._state.phase in (Phase.GATHERING, Phase.TRAINING):
                if self._ends and self._ends[0][0] <= self._next_look():
                    self._now, _, given = heapq.heappop(self._ends)
                    await self._end(given)
                    idle, since = 0, self._now
                    continue
                idle += 1
                look = self._next_look()
                # Everybody who comes and goes has done so by then, those with the longest way twice.
                everybody_came = look > self._trace.comes_round(self._mobile, since)
                patience = _IDLE_STEPS + 2 * (len(self._mobile) + len(self._away))
                given_up = idle > patience and (everybody_came or idle > _MOST_IDLE_STEPS)
                if given_up or not math.isfinite(look):
                    raise JobError(self._hopeless())
                self._now = look
                self._arrive(self._mobile)
                self._step(Tick(self._now))
            if self._state.phase is Phase.STUCK:
                raise JobError(f"{self._state.why}; fix the job file and start it again")
        finally:
            await self._drop()
        self.played.late += self._busy.values()
        self.played.ended_at = self._now
        return self.played

    def _arrive(self, clients: Mapping[str, float] | list[str]) -> None:
        """Those who are there now wait for work, the others leave."""
        for client in clients:
            if client in self._busy or client in self._away:
                continue
            there = self._trace.of(client).is_there(self._now)
            there = there and self._trace.may_be_drawn(client, self._state.round)
            if there and client not in self._presence.waiting:
                self._presence.wait(client, self._now)
            elif not there and client in self._presence.waiting:
                self._presence.leave(client, self._now)

    def _step(self, event: Event) -> None:
        for given in self._busy.values():
            self._presence.see(given.client, self._now)
        self._state, actions = step(self._state, event, self._facts)
        for action in actions:
            if isinstance(action, GiveTask):
                self._give(action)
            elif isinstance(action, EndTask):
                self.played.ends[action.task_id] = f"{action.status}: {action.message}"
            elif isinstance(action, Log):
                self.played.notes.append(action.message)

    def _give(self, action: GiveTask) -> None:
        client = action.device_id
        self._presence.leave(client, self._now)
        given = Given(action.task_id, client, action.attempt, action.round, self._durations[client])
        self.played.given.append(given)
        self.played.ends.pop(action.task_id, None)
        gone = self._trace.drops_out(self._rules.seed, action.round, client, action.attempt)
        if gone is not None:
            # Nobody hears of it again: its lease runs out.
            self._away.add(client)
            self._presence.see(client, self._now + gone * given.seconds)
            return
        self._busy[client] = given
        ends_at = self._now + given.seconds
        heapq.heappush(self._ends, (ends_at, next(self._count), given))
        if ends_at <= self._state.deadline:  # else it is trained only if it still counts when it comes
            self._start(given)

    def _start(self, given: Given) -> asyncio.Task[Result | Failure]:
        self._training[given.task_id] = task = asyncio.create_task(self._train(given))
        return task

    async def _end(self, given: Given) -> None:
        """A client delivers, and asks for work again."""
        self._busy.pop(given.client, None)
        if accepts(self._state, self._facts, given.task_id):
            outcome = await (self._training.pop(given.task_id, None) or self._start(given))
            self._training.pop(given.task_id, None)
            self._deliver(given, outcome)
        else:
            self.played.late.append(given)
        self._arrive([given.client])
        self._step(Asked(given.client, self._now) if given.client in self._presence.waiting else Tick(self._now))

    def _deliver(self, given: Given, outcome: Result | Failure) -> None:
        if isinstance(outcome, Failure):
            # What fails here fails again: nothing about the machine changes.
            why, message = outcome.outcome.value, outcome.message
            self._step(TaskFailed(given.task_id, self._now, "failed", why, message, final=True))
            return
        refusal = self._judge(outcome)
        if refusal:
            self._step(TaskFailed(given.task_id, self._now, "refused", "norm", refusal, final=True))
            return
        self._recorded.add(given.task_id)
        self.played.updates.append(outcome)

    def _next_look(self) -> float:
        """When something may happen by itself: a deadline, a lease that runs out, a client that comes or goes."""
        state, rules = self._state, self._rules
        times = [state.deadline]
        if state.phase is Phase.GATHERING:
            times += [state.since + rules.gather_s, state.since + max(rules.gather_s, rules.lease_s)]
        for client in self._away:
            times.append(math.nextafter(self._presence.seen_at(client) + rules.lease_s, math.inf))
        times += [task.ended_at + rules.gather_s for task in state.tasks.values() if task.ended_at]
        times += [self._trace.of(client).next_change(self._now) for client in self._mobile]
        return min((time for time in times if time > self._now), default=math.inf)

    def _hopeless(self) -> str:
        ends = list(self.played.ends.values())
        why = f"; the last task was {ends[-1]}" if ends else ""
        return (
            f"round {self._state.round} cannot reach its quorum of {self._rules.quorum}: {len(self._recorded)} updates "
            f"of {len(self._durations)} clients that can take part{why}; lower [job] quorum, or change the trace"
        )

    async def _drop(self) -> None:
        """What is still trained counts no more."""
        for task in self._training.values():
            task.cancel()
        await asyncio.gather(*self._training.values(), return_exceptions=True)
