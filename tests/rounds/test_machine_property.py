"""The rounds under any order of events, records that fail, and restarts: nothing counts twice, and a round closes.

The machine plays the job: it records what the actions say, takes over the new state only if that was possible, and
averages while a round is aggregating. Its record is all that a restart leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedepth.rounds.events import Action, Asked, EndTask, Event, GiveTask, Progressed, RoundDone, TaskFailed, Tick
from fedepth.rounds.machine import Assignment, Facts, Phase, Rules, Standing, accepts, begin, restore, step
from fedepth.rounds.presence import Presence

RULES = Rules(rounds=4, devices_per_round=3, quorum=2, gather_s=5, deadline_s=60, lease_s=20, seed=1)
ALL = "abcdef"
DEVICES = st.sampled_from(ALL)
PICK = st.integers(0, 20)
STANDINGS = {"given": Standing.OPEN, "lost": Standing.EXPIRED, "failed": Standing.FAILED}


@dataclass
class Record:
    """What survives a restart. Rounds by number: the tasks whose updates were averaged in them."""

    owners: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[int, str, int, str]] = field(default_factory=dict)  # round, device, attempt, status
    updates: dict[str, int] = field(default_factory=dict)
    averaged: dict[int, frozenset[str]] = field(default_factory=dict)

    def write(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, GiveTask):
                assert action.task_id not in self.updates, "a task was given again after its update was recorded"
                assert self.owners.setdefault(action.task_id, action.device_id) == action.device_id
                self.rows[action.task_id] = (action.round, action.device_id, action.attempt, "given")
            elif isinstance(action, EndTask):
                number, device, attempt, _ = self.rows[action.task_id]
                self.rows[action.task_id] = (number, device, attempt, action.status)


class Rounds(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.record = Record()
        self.failing = False
        self.recorded: set[str] = set()
        self.presence = Presence(RULES.lease_s)
        self.facts = Facts(self.recorded, self.presence)
        self.state = begin(RULES, 0.0)

    def feed(self, event: Event) -> None:
        state, actions = step(self.state, event, self.facts)
        if self.failing and any(isinstance(action, (GiveTask, EndTask)) for action in actions):
            return  # it could not be recorded, so it has not happened
        self.record.write(actions)
        assert state.round - self.state.round in ((0, 1) if isinstance(event, RoundDone) else (0,))
        self.state = state
        for action in actions:
            if isinstance(action, GiveTask):
                self.presence.leave(action.device_id, self.now)

    def task(self, pick: int) -> Assignment:
        return list(self.state.tasks.values())[pick % len(self.state.tasks)]

    @rule(device=DEVICES, seconds=st.floats(0, 3))
    def wait(self, device: str, seconds: float) -> None:
        self.now += seconds
        self.presence.wait(device, self.now)
        self.feed(Asked(device, self.now))

    @rule(device=DEVICES)
    def leave(self, device: str) -> None:
        self.presence.leave(device, self.now)
        self.feed(Tick(self.now))

    @rule(seconds=st.sampled_from([0.2, 6.0, 21.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick(self.now))

    @rule(failing=st.booleans())
    def disk(self, failing: bool) -> None:
        self.failing = failing

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK, heard=st.booleans())
    def deliver(self, pick: int, heard: bool) -> None:
        """An update is recorded, and the event that says so may be lost."""
        task = self.task(pick)
        if accepts(self.state, self.facts, task.task_id) and not self.failing:
            assert task.task_id not in self.record.updates, "two updates of one task"
            self.record.updates[task.task_id] = self.state.round
            self.recorded.add(task.task_id)
            if heard:
                self.feed(Tick(self.now))

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK, final=st.booleans())
    def fail(self, pick: int, final: bool) -> None:
        self.feed(TaskFailed(self.task(pick).task_id, self.now, "failed", "error", "broken", final))

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK)
    def progress(self, pick: int) -> None:
        task = self.task(pick)
        self.presence.see(task.device_id, self.now)
        self.feed(Progressed(task.task_id, self.now))

    @precondition(lambda self: self.state.phase is Phase.AGGREGATING and not self.failing)
    @rule(heard=st.booleans())
    def close(self, heard: bool) -> None:
        """The average is recorded; the event that says so may be lost, and what it asks for not be recorded."""
        number = self.state.round
        own = frozenset(task for task, of in self.record.updates.items() if of == number)
        assert len(own) >= RULES.quorum
        assert self.record.averaged.setdefault(number, own) == own, "a round was averaged twice, with other updates"
        if heard:
            self.feed(RoundDone(number, self.now))
            if self.state.round != number:
                self.recorded.clear()

    @precondition(lambda self: True)
    @rule()
    def restart(self) -> None:
        finished = max(self.record.averaged, default=0)
        tasks = [
            Assignment(name, device, attempt, STANDINGS[status])
            for name, (number, device, attempt, status) in sorted(self.record.rows.items())
            if number == finished + 1
        ]
        self.presence = Presence(RULES.lease_s)
        self.recorded = {task for task, of in self.record.updates.items() if of == finished + 1}
        self.facts = Facts(self.recorded, self.presence)
        self.state = restore(RULES, finished, tasks, self.now)

    @invariant()
    def what_always_holds(self) -> None:
        tasks = self.state.tasks.values()
        working = [task for task in tasks if task.standing is Standing.OPEN and task.task_id not in self.recorded]
        assert len(working) <= RULES.devices_per_round
        assert len({task.device_id for task in tasks}) == len(tasks)
        if self.state.phase not in (Phase.FINISHED, Phase.GATHERING):
            assert self.recorded == {task for task, of in self.record.updates.items() if of == self.state.round}
            assert self.recorded <= self.state.tasks.keys()

    def teardown(self) -> None:
        """Whatever happened: with a disk that works and devices that answer, the job comes to its end, and each
        recorded update is in exactly one average."""
        self.failing = False
        if self.state.phase is Phase.STUCK:
            self.restart()  # as an operator would
        for _ in range(200):
            if self.state.phase is Phase.FINISHED:
                break
            for device in ALL:
                if device not in self.presence.waiting:
                    self.wait(device, 0.0)
            self.time_passes(7.0)
            for task in list(self.state.tasks.values()):
                if accepts(self.state, self.facts, task.task_id) and task.standing is Standing.OPEN:
                    self.record.updates[task.task_id] = self.state.round
                    self.recorded.add(task.task_id)
                    self.feed(Tick(self.now))
            if self.state.phase is Phase.AGGREGATING:
                self.close(heard=True)
        assert self.state.phase is Phase.FINISHED, f"round {self.state.round} never closed: {self.state}"
        counted = [task for own in self.record.averaged.values() for task in own]
        assert len(counted) == len(set(counted)), "an update is in two averages"
        assert set(counted) == self.record.updates.keys(), "a recorded update is in no average"


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)
