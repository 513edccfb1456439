"""The rounds of a job as a state machine: events in, a new state and actions out.

No I/O, no clock (events carry the time), no randomness but the seed of the rules.

    gathering ──draw──> training ──quorum──> aggregating ──RoundDone──> gathering … finished
                         │    ^
                         └────┘ too few updates: what was accepted is kept, other devices are drawn

A device has at most one task per round. Handing it out again, after a reconnect or a failure, raises its
attempt. A task whose lease or deadline ran out stays welcome until its round closes, so that a link that was
down loses no update.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from coordinator.round_events import (
    Action,
    CloseRound,
    DeviceWaiting,
    Event,
    Finish,
    GiveTask,
    Left,
    Log,
    LoseTask,
    Progressed,
    RoundDone,
    StartRound,
    TaskFailed,
    UpdateRecorded,
)


class Phase(str, Enum):
    GATHERING = "gathering"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    FINISHED = "finished"


class Standing(str, Enum):
    """Where a task of the current round stands."""

    OPEN = "open"
    EXPIRED = "expired"  # its lease or deadline ran out; its update is still welcome in this round
    FAILED = "failed"  # the device said so, or its update was refused
    ACCEPTED = "accepted"


@dataclass(frozen=True)
class Rules:
    """What does not change while a job runs. Times are seconds."""

    rounds: int
    devices_per_round: int
    quorum: int
    gather_s: float
    deadline_s: float
    lease_s: float
    seed: int
    task_prefix: str = "task"


@dataclass(frozen=True)
class Assignment:
    """A task of the current round.

    Attributes:
        lease_until: without a sign of life by then, it expires.
        ended_at: when it failed; decides when its device may be drawn again.
    """

    task_id: str
    device_id: str
    attempt: int = 1
    standing: Standing = Standing.OPEN
    lease_until: float = 0.0
    ended_at: float = 0.0


@dataclass(frozen=True)
class State:
    """Where the job is.

    Attributes:
        round: the round in work, from 1; the last one once finished.
        since: when this round began to gather.
        deadline: when it should start (gathering) or close (training).
        complain_after: not to say more often than once a deadline that devices are missing.
        waiting: devices that wait for a task now.
        seen: when each device last gave a sign of life.
    """

    rules: Rules
    phase: Phase
    round: int
    since: float
    deadline: float
    complain_after: float
    tasks: tuple[Assignment, ...]
    waiting: frozenset[str]
    seen: Mapping[str, float]


def begin(rules: Rules, now: float) -> State:
    """A job that has done no round."""
    return restore(rules, 0, (), now)


def restore(rules: Rules, finished_round: int, tasks: Sequence[Assignment], now: float) -> State:
    """The state after a restart: the last recorded round, and the tasks of the one after it.

    Leases and deadlines start anew, since nobody could renew them while the coordinator was down.
    """
    finished = finished_round >= rules.rounds
    phase = Phase.FINISHED if finished else Phase.TRAINING if tasks else Phase.GATHERING
    room = rules.devices_per_round
    kept: list[Assignment] = []
    for task in () if finished else tasks:
        if task.standing is Standing.OPEN:
            standing = Standing.OPEN if room > 0 else Standing.EXPIRED
            room -= 1
            task = replace(task, standing=standing, lease_until=now + rules.lease_s)
        kept.append(task)
    return State(
        rules=rules,
        phase=phase,
        round=rules.rounds if finished else finished_round + 1,
        since=now,
        deadline=now + rules.deadline_s,
        complain_after=now + rules.deadline_s,
        tasks=tuple(kept),
        waiting=frozenset(),
        seen={},
    )


def find(state: State, task_id: str) -> Assignment | None:
    """The task, if it is one of the current round."""
    return next((task for task in state.tasks if task.task_id == task_id), None)


def accepts(state: State, task_id: str) -> bool:
    """Whether an update for this task would count now. If not, it is late."""
    task = find(state, task_id)
    welcome = (Standing.OPEN, Standing.EXPIRED)
    return task is not None and state.phase is Phase.TRAINING and task.standing in welcome


def live_devices(state: State, now: float) -> frozenset[str]:
    """Devices that wait, work, or gave a sign of life within a lease."""
    recent = {device for device, seen in state.seen.items() if now - seen <= state.rules.lease_s}
    working = {task.device_id for task in state.tasks if task.standing is Standing.OPEN}
    return frozenset(recent | working) | state.waiting


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """Takes one event, and then whatever follows from it and from its time."""
    actions: tuple[Action, ...] = ()
    if isinstance(event, DeviceWaiting):
        state, actions = _wait(state, event)
    elif isinstance(event, Left):
        state = replace(_see(state, event.device_id, event.now), waiting=state.waiting - {event.device_id})
    elif isinstance(event, Progressed):
        state = _renew(state, event)
    elif isinstance(event, UpdateRecorded):
        if not accepts(state, event.task_id):
            raise ValueError(f"task {event.task_id} cannot be accepted in round {state.round}, {state.phase.value}")
        state = _set(state, event.task_id, Standing.ACCEPTED, event.now)
    elif isinstance(event, TaskFailed):
        if accepts(state, event.task_id):
            state = _set(state, event.task_id, Standing.FAILED, event.now)
    elif isinstance(event, RoundDone):
        state, actions = _next_round(state, event)
    state, more = _advance(state, event.now)
    return state, actions + more


def _see(state: State, device_id: str, now: float) -> State:
    return replace(state, seen={**state.seen, device_id: now})


def _set(state: State, task_id: str, standing: Standing, now: float) -> State:
    tasks = tuple(
        replace(task, standing=standing, ended_at=now) if task.task_id == task_id else task for task in state.tasks
    )
    task = find(state, task_id)
    assert task is not None
    return _see(replace(state, tasks=tasks), task.device_id, now)


def _wait(state: State, event: DeviceWaiting) -> tuple[State, tuple[Action, ...]]:
    state = _see(state, event.device_id, event.now)
    if state.phase is Phase.FINISHED:
        return state, ()
    for task in state.tasks:
        if task.device_id == event.device_id and task.standing is Standing.OPEN and state.phase is Phase.TRAINING:
            # The device has forgotten its task, or our answer never reached it.
            return _give(state, [task.device_id], event.now)
    return replace(state, waiting=state.waiting | {event.device_id}), ()


def _renew(state: State, event: Progressed) -> State:
    task = find(state, event.task_id)
    if task is None:
        return state
    state = _see(state, task.device_id, event.now)
    if not accepts(state, event.task_id):
        return state
    taken = len(_with(state, Standing.OPEN)) >= state.rules.devices_per_round
    if task.standing is Standing.EXPIRED and (taken or task.device_id in state.waiting):
        return state  # its place is taken, or it asks for work already; its update is welcome all the same
    renewed = replace(task, standing=Standing.OPEN, lease_until=event.now + state.rules.lease_s)
    return replace(state, tasks=tuple(renewed if each is task else each for each in state.tasks))


def _next_round(state: State, event: RoundDone) -> tuple[State, tuple[Action, ...]]:
    if state.phase is not Phase.AGGREGATING or event.round != state.round:
        raise ValueError(f"round {event.round} is done, but round {state.round} is {state.phase.value}")
    if state.round >= state.rules.rounds:
        finished = replace(state, phase=Phase.FINISHED, tasks=(), waiting=frozenset())
        return finished, (Finish(state.rules.rounds),)
    deadline = event.now + state.rules.deadline_s
    following = replace(
        state,
        phase=Phase.GATHERING,
        round=state.round + 1,
        since=event.now,
        deadline=deadline,
        complain_after=deadline,
        tasks=(),
    )
    return following, ()


def _advance(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    if state.phase is Phase.GATHERING:
        return _gather(state, now)
    if state.phase is Phase.TRAINING:
        return _train(state, now)
    return state, ()


def _gather(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    rules, count = state.rules, len(state.waiting)
    all_here = live_devices(state, now) <= state.waiting
    waited = now - state.since
    full = count >= rules.devices_per_round and (all_here or waited >= rules.gather_s)
    # Devices that have died must not hold up those that are left: after a lease nobody else is to be expected.
    left = count >= rules.quorum and all_here and waited >= max(rules.gather_s, rules.lease_s)
    if full or left or (now >= state.deadline and count >= rules.quorum):
        drawn = _draw(state, state.waiting, min(count, rules.devices_per_round))
        state = replace(state, phase=Phase.TRAINING, complain_after=now)
        state, given = _give(state, drawn, now)
        return state, (StartRound(state.round, tuple(drawn)), *given)
    return _complain(state, now, f"{count} devices wait, {rules.quorum} are needed to start it")


def _train(state: State, now: float) -> tuple[State, tuple[Action, ...]]:
    silent = [task for task in _with(state, Standing.OPEN) if now > task.lease_until]
    state, actions = _expire(state, silent, "no sign of life within its lease")
    rules = state.rules
    accepted = _with(state, Standing.ACCEPTED)
    over = now >= state.deadline
    if _with(state, Standing.OPEN) and not over:
        return state, actions
    why = "the round closed without it" if len(accepted) >= rules.quorum else "the round's deadline passed"
    state, expired = _expire(state, _with(state, Standing.OPEN), why)
    actions += expired
    if len(accepted) >= rules.quorum:
        close = CloseRound(state.round, tuple(sorted(task.task_id for task in accepted)))
        return replace(state, phase=Phase.AGGREGATING), (*actions, close)
    if over:
        state = replace(state, deadline=now + rules.deadline_s)
    drawn = _draw(state, _candidates(state, now), rules.devices_per_round - len(accepted))
    if drawn:
        state, given = _give(state, drawn, now)
        return state, (*actions, Log(f"round {state.round}: {', '.join(drawn)} step in"), *given)
    state, said = _complain(
        state,
        now,
        f"{len(accepted)} of the {rules.quorum} updates needed are here (and kept), but no device is waiting",
    )
    return state, actions + said


def _candidates(state: State, now: float) -> Iterable[str]:
    """Waiting devices that were not drawn in this round; if there are none, those whose task broke.

    A device that has just failed waits as long as a round gathers, lest it fails in a tight loop.
    """
    had = {task.device_id: task for task in state.tasks}
    fresh = state.waiting - set(had)
    if fresh:
        return fresh

    def again(task: Assignment) -> bool:
        rested = now - task.ended_at >= state.rules.gather_s
        return task.standing is Standing.EXPIRED or (task.standing is Standing.FAILED and rested)

    return [device for device in state.waiting if again(had[device])]


def _draw(state: State, candidates: Iterable[str], count: int) -> list[str]:
    """Uniformly without replacement; the order in which devices came does not matter."""
    pool = sorted(candidates)
    handed = sum(task.attempt for task in state.tasks)  # another draw in the same round is another one
    chance = random.Random(f"{state.rules.seed}/{state.round}/{handed}")
    return chance.sample(pool, min(count, len(pool)))


def _give(state: State, devices: Sequence[str], now: float) -> tuple[State, tuple[Action, ...]]:
    tasks = {task.device_id: task for task in state.tasks}
    actions: list[Action] = []
    for device in devices:
        old = tasks.get(device)
        name = f"{state.rules.task_prefix}-{state.round:04d}-{len(tasks):04d}" if old is None else old.task_id
        attempt = 1 if old is None else old.attempt + 1
        tasks[device] = Assignment(name, device, attempt, lease_until=now + state.rules.lease_s)
        actions.append(GiveTask(name, device, attempt, state.round))
    deadline = state.deadline
    if not _with(state, Standing.OPEN):  # the first draw of a round, or replacements for all that was lost
        deadline = now + state.rules.deadline_s
    waiting = state.waiting - set(devices)
    return replace(state, tasks=tuple(tasks.values()), waiting=waiting, deadline=deadline), tuple(actions)


def _expire(state: State, gone: Sequence[Assignment], reason: str) -> tuple[State, tuple[Action, ...]]:
    tasks = tuple(replace(task, standing=Standing.EXPIRED) if task in gone else task for task in state.tasks)
    return replace(state, tasks=tasks), tuple(LoseTask(task.task_id, task.device_id, reason) for task in gone)


def _complain(state: State, now: float, what: str) -> tuple[State, tuple[Action, ...]]:
    if now < state.complain_after:
        return state, ()
    later = replace(state, complain_after=now + state.rules.deadline_s)
    return later, (Log(f"round {state.round}: {what}"),)


def _with(state: State, standing: Standing) -> list[Assignment]:
    return [task for task in state.tasks if task.standing is standing]
