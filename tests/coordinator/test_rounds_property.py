"""The rounds under any order of events: what must hold always."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordinator.round_events import (
    CloseRound,
    DeviceWaiting,
    Event,
    GiveTask,
    Left,
    Progressed,
    RoundDone,
    TaskFailed,
    Tick,
    UpdateRecorded,
)
from coordinator.rounds import (
    Phase,
    Rules,
    Standing,
    accepts,
    begin,
    restore,
    step,
)

RULES = Rules(rounds=4, devices_per_round=3, quorum=2, gather_s=5, deadline_s=60, lease_s=20, seed=1)
DEVICES = st.sampled_from("abcdef")
PICK = st.integers(0, 20)


class Rounds(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.state = begin(RULES, 0.0)
        self.accepted: dict[str, str] = {}  # of the current round: task by device
        self.owners: dict[str, str] = {}
        self.closing = False

    def feed(self, event: Event) -> None:
        before = self.state.round
        self.state, actions = step(self.state, event)
        assert self.state.round - before in ((0, 1) if isinstance(event, RoundDone) else (0,))
        for action in actions:
            if isinstance(action, GiveTask):
                assert action.device_id not in self.accepted, "drawn again after it contributed"
                assert self.owners.setdefault(action.task_id, action.device_id) == action.device_id
            elif isinstance(action, CloseRound):
                assert not self.closing, "closed twice"
                assert len(action.task_ids) >= RULES.quorum
                assert set(action.task_ids) == set(self.accepted.values()), "an accepted update was lost"
                self.closing = True

    @rule(device=DEVICES, seconds=st.floats(0, 3))
    def wait(self, device: str, seconds: float) -> None:
        self.now += seconds
        self.feed(DeviceWaiting(device, self.now))

    @rule(device=DEVICES)
    def leave(self, device: str) -> None:
        self.feed(Left(device, self.now))

    @rule(seconds=st.sampled_from([0.2, 6.0, 21.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick(self.now))

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK)
    def accept(self, pick: int) -> None:
        task = self.state.tasks[pick % len(self.state.tasks)]
        if accepts(self.state, task.task_id):
            assert task.device_id not in self.accepted, "two updates of one device"
            self.accepted[task.device_id] = task.task_id
            self.feed(UpdateRecorded(task.task_id, self.now))

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK)
    def fail(self, pick: int) -> None:
        self.feed(TaskFailed(self.state.tasks[pick % len(self.state.tasks)].task_id, self.now))

    @precondition(lambda self: self.state.tasks)
    @rule(pick=PICK)
    def progress(self, pick: int) -> None:
        self.feed(Progressed(self.state.tasks[pick % len(self.state.tasks)].task_id, self.now))

    @precondition(lambda self: self.closing)
    @rule()
    def done(self) -> None:
        self.closing = False
        self.accepted = {}
        self.feed(RoundDone(self.state.round, self.now))

    @precondition(lambda self: not self.closing and self.state.phase is not Phase.FINISHED)
    @rule()
    def restart(self) -> None:
        self.state = restore(RULES, self.state.round - 1, self.state.tasks, self.now)

    @invariant()
    def what_always_holds(self) -> None:
        standing = [task.standing for task in self.state.tasks]
        assert standing.count(Standing.OPEN) <= RULES.devices_per_round
        held = {task.device_id: task.task_id for task in self.state.tasks if task.standing is Standing.ACCEPTED}
        if self.state.phase is not Phase.FINISHED:
            assert held == self.accepted
        assert len({task.device_id for task in self.state.tasks}) == len(self.state.tasks)
        assert not self.state.waiting & {task.device_id for task in self.state.tasks if task.standing is Standing.OPEN}


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)
