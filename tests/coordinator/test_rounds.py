"""The rounds, step by step: exact states and actions at exact times."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
    Tick,
    UpdateRecorded,
)
from coordinator.rounds import (
    Assignment,
    Phase,
    Rules,
    Standing,
    State,
    accepts,
    begin,
    restore,
    step,
)

RULES = Rules(rounds=2, devices_per_round=2, quorum=1, gather_s=5, deadline_s=100, lease_s=10, seed=3, task_prefix="t")


def play(state: State, *events: Event) -> tuple[State, list[Action]]:
    """The state after the events, and the actions of the last one."""
    actions: tuple[Action, ...] = ()
    for event in events:
        state, actions = step(state, event)
    return state, list(actions)


def started(rules: Rules = RULES) -> tuple[State, dict[str, str]]:
    """Devices a and b have tasks since time 1. Returns the task of each device."""
    state, _ = play(begin(rules, 0), DeviceWaiting("a", 0), DeviceWaiting("b", 1))
    assert state.phase is Phase.TRAINING
    return state, {task.device_id: task.task_id for task in state.tasks}


def test_all_known_devices_wait_so_the_round_starts_at_once() -> None:
    state, actions = play(begin(RULES, 0), DeviceWaiting("a", 0), DeviceWaiting("b", 1))
    assert isinstance(actions[0], StartRound)
    assert set(actions[0].devices) == {"a", "b"}
    assert {action.device_id for action in actions[1:] if isinstance(action, GiveTask)} == {"a", "b"}
    assert state.deadline == 101
    assert state.waiting == frozenset()


def test_it_waits_gather_s_for_a_live_device_that_does_not_wait() -> None:
    events = (DeviceWaiting("c", 0), Left("c", 0), DeviceWaiting("a", 1), DeviceWaiting("b", 2))
    state, actions = play(begin(RULES, 0), *events)
    assert (state.phase, actions) == (Phase.GATHERING, [])
    assert play(state, Tick(4.9))[0].phase is Phase.GATHERING
    assert play(state, Tick(5))[0].phase is Phase.TRAINING


def test_a_quorum_starts_once_nobody_else_has_given_a_sign_of_life_for_a_lease() -> None:
    state, _ = play(begin(RULES, 0), DeviceWaiting("b", 0), Left("b", 1), DeviceWaiting("a", 1))
    assert play(state, Tick(11))[0].phase is Phase.GATHERING
    assert play(state, Tick(11.1))[0].phase is Phase.TRAINING


def test_too_few_devices_start_only_at_the_deadline_and_with_quorum() -> None:
    signs_of_life = (Left("b", at) for at in range(0, 100, 9))  # b lives and never waits
    state, _ = play(begin(RULES, 0), DeviceWaiting("a", 0), *signs_of_life)
    assert play(state, Tick(99.9))[0].phase is Phase.GATHERING
    assert play(state, Tick(100))[0].phase is Phase.TRAINING
    wants_two = begin(replace(RULES, quorum=2), 0)
    state, actions = play(wants_two, DeviceWaiting("a", 0), Tick(100))
    assert state.phase is Phase.GATHERING
    assert [type(action) for action in actions] == [Log]
    assert play(state, Tick(199))[1] == []
    assert [type(action) for action in play(state, Tick(200))[1]] == [Log]


def test_the_draw_is_uniform_and_depends_on_seed_and_round_only() -> None:
    drawn = []
    for seed in range(300):
        state = begin(replace(RULES, seed=seed, devices_per_round=1), 0)
        for device in ("c", "a", "b"):
            state = replace(state, waiting=state.waiting | {device})
        _, actions = step(state, Tick(5))
        assert isinstance(actions[0], StartRound)
        drawn.append(actions[0].devices)
        assert step(replace(state, waiting=frozenset("abc")), Tick(5))[1] == actions
    assert all(75 < drawn.count((device,)) < 125 for device in "abc")


def test_the_round_closes_when_all_have_answered() -> None:
    state, tasks = started()
    state, actions = play(state, UpdateRecorded(tasks["a"], 2))
    assert (state.phase, actions) == (Phase.TRAINING, [])
    state, actions = play(state, UpdateRecorded(tasks["b"], 3))
    assert actions == [CloseRound(1, tuple(sorted(tasks.values())))]
    assert state.phase is Phase.AGGREGATING


def test_a_failure_counts_as_an_answer() -> None:
    state, tasks = started()
    state, actions = play(state, UpdateRecorded(tasks["a"], 2), TaskFailed(tasks["b"], 3))
    assert actions == [CloseRound(1, (tasks["a"],))]


def test_at_the_deadline_the_quorum_closes_the_round_without_the_others() -> None:
    state, tasks = started()
    state, _ = play(state, UpdateRecorded(tasks["a"], 2))
    for now in range(5, 101, 5):
        state, actions = step(state, Progressed(tasks["b"], now))
        assert actions == ()
    state, actions = play(state, Tick(101))
    assert actions == [
        LoseTask(tasks["b"], "b", "the round closed without it"),
        CloseRound(1, (tasks["a"],)),
    ]
    assert not accepts(state, tasks["b"])


def test_at_the_deadline_under_quorum_updates_are_kept_and_others_drawn() -> None:
    state, tasks = started(replace(RULES, quorum=2))
    state, _ = play(state, UpdateRecorded(tasks["a"], 2), DeviceWaiting("c", 3), DeviceWaiting("a", 3))
    for now in range(5, 101, 5):
        state, _ = step(state, Progressed(tasks["b"], now))
    state, actions = play(state, Tick(101))
    assert [action.task_id for action in actions if isinstance(action, LoseTask)] == [tasks["b"]]
    given = [action for action in actions if isinstance(action, GiveTask)]
    assert [action.device_id for action in given] == ["c"]
    assert state.deadline == 201
    assert accepts(state, tasks["b"])  # its update is still welcome
    state, actions = play(state, UpdateRecorded(given[0].task_id, 110))
    assert actions == [CloseRound(1, tuple(sorted((tasks["a"], given[0].task_id))))]


def test_under_quorum_with_nobody_waiting_it_says_so_once_a_deadline() -> None:
    state, tasks = started()
    state, first = play(state, TaskFailed(tasks["a"], 2), TaskFailed(tasks["b"], 3))
    assert [type(action) for action in first] == [Log]
    assert play(state, Tick(4))[1] == []
    state, again = play(state, Tick(103))
    assert [type(action) for action in again] == [Log]
    state, actions = play(state, DeviceWaiting("c", 104))
    assert [action.device_id for action in actions if isinstance(action, GiveTask)] == ["c"]
    assert state.deadline == 204


def test_a_failed_device_is_drawn_again_only_after_others_and_a_pause() -> None:
    state, tasks = started()
    state, _ = play(
        state, DeviceWaiting("c", 1), TaskFailed(tasks["a"], 2), DeviceWaiting("a", 2), TaskFailed(tasks["b"], 3)
    )
    assert [task.device_id for task in state.tasks if task.standing is Standing.OPEN] == ["c"]
    third = next(task.task_id for task in state.tasks if task.device_id == "c")
    state, _ = play(state, TaskFailed(third, 4))
    assert not [task for task in state.tasks if task.standing is Standing.OPEN]
    assert [action for action in play(state, Tick(6.9))[1] if isinstance(action, GiveTask)] == []
    given = [action for action in play(state, Tick(7))[1] if isinstance(action, GiveTask)]
    assert given == [GiveTask(tasks["a"], "a", 2, 1)]


def test_a_silent_task_is_lost_and_progress_renews_its_lease() -> None:
    state, tasks = started()
    state, _ = play(state, Progressed(tasks["a"], 8))
    state, actions = play(state, Tick(11.5))
    assert actions == [LoseTask(tasks["b"], "b", "no sign of life within its lease")]
    state, actions = play(state, Tick(18.5))
    assert isinstance(actions[0], LoseTask)
    assert actions[0].task_id == tasks["a"]


def test_a_lost_update_that_arrives_in_its_round_is_taken() -> None:
    state, tasks = started()
    state, _ = play(state, Tick(12))
    assert accepts(state, tasks["a"])
    state, actions = play(state, UpdateRecorded(tasks["a"], 13))
    assert actions == [CloseRound(1, (tasks["a"],))]


def test_progress_revives_a_lost_task_if_there_is_room() -> None:
    state, tasks = started()
    state, _ = play(state, Tick(12), Progressed(tasks["a"], 13))
    assert [task.device_id for task in state.tasks if task.standing is Standing.OPEN] == ["a"]


def test_an_old_word_of_progress_does_not_revive_a_task_whose_device_waits() -> None:
    state, tasks = started()
    state, _ = play(state, Tick(12), Progressed(tasks["a"], 13), DeviceWaiting("b", 14), Progressed(tasks["b"], 15))
    assert [task.device_id for task in state.tasks if task.standing is Standing.OPEN] == ["a"]


def test_a_device_that_asks_again_gets_its_task_again() -> None:
    state, tasks = started()
    state, actions = play(state, DeviceWaiting("a", 4))
    assert actions == [GiveTask(tasks["a"], "a", 2, 1)]
    assert state.deadline == 101


def test_a_device_that_delivered_waits_for_the_next_round() -> None:
    state, tasks = started()
    state, actions = play(state, UpdateRecorded(tasks["a"], 2), DeviceWaiting("a", 3))
    assert actions == []
    assert state.waiting == {"a"}
    with pytest.raises(ValueError, match="cannot be accepted"):
        step(state, UpdateRecorded(tasks["a"], 4))


def test_rounds_follow_each_other_until_the_last() -> None:
    state, tasks = started()
    state, _ = play(state, UpdateRecorded(tasks["a"], 2), UpdateRecorded(tasks["b"], 3), RoundDone(1, 4))
    assert (state.phase, state.round, state.tasks) == (Phase.GATHERING, 2, ())
    state, _ = play(state, DeviceWaiting("a", 5), DeviceWaiting("b", 5))
    second = [task.task_id for task in state.tasks]
    assert not set(second) & set(tasks.values())
    assert not accepts(state, tasks["a"])
    state, actions = play(state, UpdateRecorded(second[0], 6), UpdateRecorded(second[1], 6), RoundDone(2, 7))
    assert actions == [Finish(2)]
    assert state.phase is Phase.FINISHED
    assert play(state, DeviceWaiting("a", 8), Tick(9))[1] == []


def test_a_round_cannot_be_done_twice() -> None:
    state, _ = started()
    with pytest.raises(ValueError, match="round 1 is done"):
        step(state, RoundDone(1, 2))


def test_a_restart_keeps_tasks_and_accepted_updates() -> None:
    rules = replace(RULES, quorum=2)
    kept = [
        Assignment("t-1", "a", 1, Standing.ACCEPTED),
        Assignment("t-2", "b", 2, Standing.OPEN),
        Assignment("t-3", "c", 1, Standing.EXPIRED),
        Assignment("t-4", "d", 1, Standing.FAILED),
    ]
    state = restore(rules, 0, kept, 50)
    assert (state.phase, state.round, state.deadline) == (Phase.TRAINING, 1, 150)
    assert [accepts(state, f"t-{number}") for number in (1, 2, 3, 4)] == [False, True, True, False]
    assert play(state, Tick(59))[1] == []
    state, actions = play(state, UpdateRecorded("t-2", 59.5))
    assert actions == [CloseRound(1, ("t-1", "t-2"))]


def test_a_restart_between_rounds_gathers_and_after_the_last_is_finished() -> None:
    assert restore(RULES, 1, (), 0).phase is Phase.GATHERING
    assert restore(RULES, 1, (), 0).round == 2
    assert restore(RULES, 2, (), 0).phase is Phase.FINISHED
    assert restore(replace(RULES, rounds=3), 2, (), 0).phase is Phase.GATHERING
