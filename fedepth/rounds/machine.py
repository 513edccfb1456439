"""The rounds of a job as a state machine: an event in, a new state and actions out.

No I/O, no clock (events carry the time), no randomness but the seed of the rules.

    gathering ──draw──> training ──quorum──> aggregating ──RoundDone──> gathering … finished
                         │    ^
                         └────┘ too few updates: what was accepted is kept, other devices are drawn

    training ──every device fails for good, in the same way──> stuck
    aggregating ──too many rounds in a row were not published──> paused

What is recorded decides. `step` is given the recorded updates of the round with every event and keeps no account of
its own of them, so that nothing can disagree with the record. Its caller records what the actions change, and only then
takes over the new state: an event whose actions cannot be recorded has not happened, and what follows from it follows
from the next event, at the latest from the next `Tick`. For the same reason what is to be done in a phase is no action:
while a round is aggregating, its updates are to be averaged, however often that has failed.

A device has at most one task per round. Handing it out again, after a reconnect or a failure, raises its attempt. A
task whose lease or deadline ran out stays welcome until its round closes, so that a link that was down loses no update.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum

from fedepth.rounds.events import (
    Action,
    Asked,
    EndTask,
    Event,
    GiveTask,
    Log,
    Progressed,
    RoundDone,
    StartRound,
    TaskFailed,
)
from fedepth.rounds.presence import Presence

SETTLE_S = 10.0  # a round that has just begun may find its devices without a word


class Phase(str, Enum):
    GATHERING = "gathering"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    FINISHED = "finished"
    PAUSED = "paused"  # until an operator has decided what becomes of the rounds that were not published
    STUCK = "stuck"  # no device that is there can train this job as it is


class Standing(str, Enum):
    """Where a task of the current round stands, as long as it has no recorded update."""

    OPEN = "open"
    EXPIRED = "expired"  # its lease or deadline ran out; its update is still welcome in this round
    FAILED = "failed"  # the device said so, or its update was refused
    HOPELESS = "hopeless"  # failed, and would again: not given to the device any more in this round


@dataclass(frozen=True)
class Rules:
    """What does not change while a job runs. Times are seconds.

    Attributes:
        remind_s: how often it is said again what is waited for, while that stays the same.
    """

    rounds: int
    devices_per_round: int
    quorum: int
    gather_s: float
    deadline_s: float
    lease_s: float
    seed: int
    task_prefix: str = "task"
    remind_s: float = 180.0


@dataclass(frozen=True)
class Assignment:
    """A task of the current round.

    Attributes:
        given_at: without a sign of life of its device for a lease since then, it expires.
        ended_at: when it failed; decides when its device may be drawn again.
        failure: why it failed, for people.
    """

    task_id: str
    device_id: str
    attempt: int = 1
    standing: Standing = Standing.OPEN
    given_at: float = 0.0
    ended_at: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class State:
    """Where the job is.

    Attributes:
        round: the round in work, from 1; the last one once finished.
        since: when this round began to gather.
        deadline: when it should start (gathering) or close (training).
        said: what it was said to wait for last.
        said_at: when; something else may be said SETTLE_S later, the same after `remind_s`.
        tasks: of this round, by id, in the order in which they were given first.
        why: why the job is paused or stuck.
    """

    rules: Rules
    phase: Phase
    round: int
    since: float
    deadline: float
    said_at: float
    tasks: Mapping[str, Assignment]
    why: str = ""
    said: str = ""


@dataclass(frozen=True)
class Facts:
    """What the state machine reads and does not decide.

    Attributes:
        recorded: ids of the tasks of this round whose update is recorded.
        presence: which devices are there.
    """

    recorded: Set[str]
    presence: Presence


def begin(rules: Rules, now: float) -> State:
    """A job that has done no round."""
    return restore(rules, 0, (), now)


def restore(rules: Rules, finished_round: int, tasks: Sequence[Assignment], now: float, paused: str = "") -> State:
    """The state after a restart: the last recorded round, and the tasks of the one after it.

    Leases and deadlines start anew, since nobody could renew them while the coordinator was down. What had failed for
    good may be tried again: a restart is how an operator mends a job.
    """
    finished = finished_round >= rules.rounds
    phase = Phase.TRAINING if tasks else Phase.GATHERING
    if finished or paused:
        phase = Phase.FINISHED if finished else Phase.PAUSED
    room = rules.devices_per_round
    kept: dict[str, Assignment] = {}
    for task in () if finished else tasks:
        if task.standing is Standing.OPEN:
            standing = Standing.OPEN if room > 0 else Standing.EXPIRED
            room -= 1
            task = replace(task, standing=standing, given_at=now)
        kept[task.task_id] = task
    return State(
        rules=rules,
        phase=phase,
        round=rules.rounds if finished else finished_round + 1,
        since=now,
        deadline=now + rules.deadline_s,
        said_at=now,
        tasks=kept,
        why=paused,
    )


def taken_over(state: State, tasks: Sequence[Assignment], now: float) -> State:
    """The state with the tasks of its round as the record has them, after a write of which nobody knows what became."""
    kept: dict[str, Assignment] = {}
    for task in tasks:
        known = state.tasks.get(task.task_id)
        same = known is not None and (known.device_id, known.attempt) == (task.device_id, task.attempt)
        if known is not None and same:
            failed = known.standing is Standing.HOPELESS and task.standing is Standing.FAILED
            kept[task.task_id] = known if failed else replace(known, standing=task.standing)
        else:
            kept[task.task_id] = replace(task, given_at=now)
    if state.phase is Phase.GATHERING and kept:
        state = replace(state, phase=Phase.TRAINING, deadline=now + state.rules.deadline_s)
    return replace(state, tasks=kept)


def accepts(state: State, facts: Facts, task_id: str) -> bool:
    """Whether an update for this task would count now. If not, it is late, or there is one already."""
    task = state.tasks.get(task_id)
    welcome = (Standing.OPEN, Standing.EXPIRED)
    return (
        task is not None
        and state.phase is Phase.TRAINING
        and task.standing in welcome
        and task_id not in facts.recorded
    )


def step(state: State, event: Event, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    """Takes one event, and then whatever follows from it, from the record, and from its time."""
    actions: tuple[Action, ...] = ()
    if isinstance(event, Asked):
        state, actions = _ask(state, event, facts)
    elif isinstance(event, Progressed):
        state = _renew(state, event, facts)
    elif isinstance(event, TaskFailed):
        state, actions = _fail(state, event, facts)
    elif isinstance(event, RoundDone):
        state = _next_round(state, event)
    state, more = _advance(state, event.now, facts)
    return state, actions + more


def _ask(state: State, event: Asked, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    if state.phase is Phase.TRAINING:
        for task in _open(state, facts):
            if task.device_id == event.device_id:
                # The device has forgotten its task, or our answer never reached it.
                return _give(state, [task.device_id], event.now, facts)
    return state, ()


def _renew(state: State, event: Progressed, facts: Facts) -> State:
    """Revives a task that had expired. One that is open needs nothing: its device has given a sign of life."""
    task = state.tasks.get(event.task_id)
    if task is None or task.standing is not Standing.EXPIRED or not accepts(state, facts, event.task_id):
        return state
    taken = len(_open(state, facts)) >= state.rules.devices_per_round
    if taken or task.device_id in facts.presence.waiting:
        return state  # its place is taken, or it asks for work already; its update is welcome all the same
    return _with(state, replace(task, standing=Standing.OPEN, given_at=event.now))


def _fail(state: State, event: TaskFailed, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    if not accepts(state, facts, event.task_id):
        return state, ()
    task = state.tasks[event.task_id]
    standing = Standing.HOPELESS if event.final else Standing.FAILED
    state = _with(state, replace(task, standing=standing, ended_at=event.now, failure=event.message))
    return state, (EndTask(task.task_id, task.device_id, event.status, event.reason, event.message),)


def _next_round(state: State, event: RoundDone) -> State:
    if state.phase is not Phase.AGGREGATING or event.round != state.round:
        raise ValueError(f"round {event.round} is done, but round {state.round} is {state.phase.value}")
    if state.round >= state.rules.rounds:
        return replace(state, phase=Phase.FINISHED, tasks={})
    if event.paused:
        return replace(state, phase=Phase.PAUSED, round=state.round + 1, why=event.paused, tasks={})
    rules = state.rules
    return replace(
        state,
        phase=Phase.GATHERING,
        round=state.round + 1,
        since=event.now,
        deadline=event.now + rules.deadline_s,
        said_at=event.now,
        tasks={},
    )


def _advance(state: State, now: float, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    if state.phase is Phase.GATHERING:
        return _gather(state, now, facts)
    if state.phase is Phase.TRAINING:
        return _train(state, now, facts)
    return state, ()


def _gather(state: State, now: float, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    rules, waiting = state.rules, facts.presence.waiting
    count, all_here = len(waiting), facts.presence.everyone_waits(now)
    waited = now - state.since
    full = count >= rules.devices_per_round and (all_here or waited >= rules.gather_s)
    # Devices that have died must not hold up those that are left: after a lease nobody else is to be expected.
    left = count >= rules.quorum and all_here and waited >= max(rules.gather_s, rules.lease_s)
    if full or left or (now >= state.deadline and count >= rules.quorum):
        drawn = _draw(state, waiting, min(count, rules.devices_per_round))
        state = replace(state, phase=Phase.TRAINING, said="", said_at=float("-inf"))
        state, given = _give(state, drawn, now, facts)
        return state, (StartRound(state.round, tuple(drawn)), *given)
    return _say(state, now, waits_for(state, facts, now))


def waits_for(state: State, facts: Facts, now: float, least: int = 0) -> str:
    """What a round that gathers waits for, and which devices cannot help it.

    Args:
        least: so many devices are there for certain, such as the one that asks.
    """
    rules, presence = state.rules, facts.presence
    here = max(least, len(presence.live(now)))  # one that has just been answered asks again at once
    missing = rules.quorum - here
    if missing > 0:
        words = f"waiting for {missing} more of {rules.quorum} devices"
    else:
        are = "1 device is" if here == 1 else f"{here} devices are"
        words = f"{are} here; it starts once they all wait for a task, or at its deadline"
    return "; ".join(filter(None, (words, presence.rejections(now))))


def _train(state: State, now: float, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    rules = state.rules
    silent = [task for task in _open(state, facts) if now - _alive_at(task, facts) > rules.lease_s]
    state, actions = _expire(state, silent, "no sign of life within its lease")
    accepted = len(facts.recorded)
    over = now >= state.deadline
    working = len(_open(state, facts))
    if working and not over:
        # Others step in at once where the round cannot reach its quorum any more; else that would only make it longer.
        state, more = _replace(state, now, facts, rules.quorum - accepted - working)
        return state, actions + more
    why = "the round closed without it" if accepted >= rules.quorum else "the round's deadline passed"
    state, expired = _expire(state, _open(state, facts), why)
    actions += expired
    if accepted >= rules.quorum:
        return replace(state, phase=Phase.AGGREGATING), actions
    hopeless = _hopeless(state, now, facts)
    if hopeless:
        return replace(state, phase=Phase.STUCK, why=hopeless), actions
    if over:
        state = replace(state, deadline=now + rules.deadline_s)
    state, more = _replace(state, now, facts, rules.devices_per_round - accepted)
    if more:
        return state, actions + more
    state, said = _say(
        state,
        now,
        f"{accepted} of the {rules.quorum} updates needed are here (and kept), but {_why_nobody(state, facts)}",
    )
    return state, actions + said


def _replace(state: State, now: float, facts: Facts, count: int) -> tuple[State, tuple[Action, ...]]:
    """Gives tasks to at most `count` devices that step in."""
    drawn = _draw(state, _candidates(state, now, facts), count) if count > 0 else []
    if not drawn:
        return state, ()
    state, given = _give(state, drawn, now, facts)
    return state, (Log(f"round {state.round}: {', '.join(drawn)} step in"), *given)


def _why_nobody(state: State, facts: Facts) -> str:
    """Why no device can step in."""
    failures = [task.failure for task in state.tasks.values() if task.standing is Standing.HOPELESS]
    if facts.presence.waiting and failures:
        return f"no device that waits can train it: {failures[0]}"
    return "no device is waiting that has not had its turn" if facts.presence.waiting else "no device is waiting"


def _open(state: State, facts: Facts) -> list[Assignment]:
    """Tasks that are worked on."""
    return [
        task for task in state.tasks.values() if task.standing is Standing.OPEN and task.task_id not in facts.recorded
    ]


def _alive_at(task: Assignment, facts: Facts) -> float:
    return max(task.given_at, facts.presence.seen_at(task.device_id))


def _hopeless(state: State, now: float, facts: Facts) -> str:
    """Why the round can never close: every device of it has failed for good, in the same way, and no other is there.

    As many as a quorum must have failed, and two at least where there can be two: one alone may have a fault of its
    own, or want to end the job.
    """
    tasks = state.tasks.values()
    failures = {task.failure for task in tasks if task.standing is Standing.HOPELESS}
    if len(tasks) < max(state.rules.quorum, min(2, state.rules.devices_per_round)) or len(failures) != 1:
        return ""
    if any(task.standing is not Standing.HOPELESS for task in tasks):
        return ""
    if facts.presence.live(now) - {task.device_id for task in tasks}:
        return ""
    return f"round {state.round}: all {len(tasks)} devices failed in the same way: {next(iter(failures))}"


def _candidates(state: State, now: float, facts: Facts) -> Iterable[str]:
    """Waiting devices that were not drawn in this round; if there are none, those whose task broke.

    A device that has just failed waits as long as a round gathers, lest it fails in a tight loop.
    """
    had = {task.device_id: task for task in state.tasks.values()}
    waiting = facts.presence.waiting
    fresh = waiting - had.keys()
    if fresh:
        return fresh

    def again(task: Assignment) -> bool:
        rested = now - task.ended_at >= state.rules.gather_s
        broken = task.standing is Standing.EXPIRED or (task.standing is Standing.FAILED and rested)
        return broken and task.task_id not in facts.recorded

    return [device for device in waiting if again(had[device])]


def _draw(state: State, candidates: Iterable[str], count: int) -> list[str]:
    """Uniformly without replacement; the order in which devices came does not matter."""
    pool = sorted(candidates)
    handed = sum(task.attempt for task in state.tasks.values())  # another draw in the same round is another one
    chance = random.Random(f"{state.rules.seed}/{state.round}/{handed}")
    return chance.sample(pool, min(count, len(pool)))


def _give(state: State, devices: Sequence[str], now: float, facts: Facts) -> tuple[State, tuple[Action, ...]]:
    had = {task.device_id: task for task in state.tasks.values()}
    tasks = dict(state.tasks)
    actions: list[Action] = []
    for device in devices:
        old = had.get(device)
        name = f"{state.rules.task_prefix}-{state.round:04d}-{len(tasks):04d}" if old is None else old.task_id
        attempt = 1 if old is None else old.attempt + 1
        tasks[name] = Assignment(name, device, attempt, given_at=now)
        actions.append(GiveTask(name, device, attempt, state.round))
    deadline = state.deadline
    if not _open(state, facts):  # the first draw of a round, or replacements for all that was lost
        deadline = now + state.rules.deadline_s
    return replace(state, tasks=tasks, deadline=deadline), tuple(actions)


def _expire(state: State, gone: Sequence[Assignment], reason: str) -> tuple[State, tuple[Action, ...]]:
    actions = tuple(EndTask(task.task_id, task.device_id, "lost", "lost", reason) for task in gone)
    return _with(state, *(replace(task, standing=Standing.EXPIRED) for task in gone)), actions


def _say(state: State, now: float, what: str) -> tuple[State, tuple[Action, ...]]:
    """Says what the round waits for: when it changes, though not too soon, and from time to time."""
    pause = state.rules.remind_s if what == state.said else min(SETTLE_S, state.rules.remind_s)
    if now < state.said_at + pause:
        return state, ()
    return replace(state, said=what, said_at=now), (Log(f"round {state.round}: {what}"),)


def _with(state: State, *tasks: Assignment) -> State:
    return replace(state, tasks={**state.tasks, **{task.task_id: task for task in tasks}}) if tasks else state
