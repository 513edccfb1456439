"""The rounds, step by step: exact states and actions at exact times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

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
    Tick,
)
from fedepth.rounds.machine import Assignment, Facts, Phase, Rules, Standing, State, accepts, restore, step, taken_over
from fedepth.rounds.presence import Presence

RULES = Rules(
    rounds=2,
    devices_per_round=2,
    quorum=1,
    gather_s=5,
    deadline_s=100,
    lease_s=10,
    seed=3,
    task_prefix="t",
    remind_s=20,
)


class Play:
    """A job's state and facts, kept as the job keeps them. Every method returns the actions of its event."""

    def __init__(self, rules: Rules = RULES, tasks: Sequence[Assignment] = (), now: float = 0.0) -> None:
        self.recorded: set[str] = set()
        self.presence = Presence(rules.lease_s)
        self.facts = Facts(self.recorded, self.presence)
        self.state = restore(rules, 0, tasks, now)

    def feed(self, event: Event) -> list[Action]:
        self.state, actions = step(self.state, event, self.facts)
        for action in actions:
            if isinstance(action, GiveTask):
                self.presence.leave(action.device_id, event.now)
        return list(actions)

    def wait(self, device: str, now: float) -> list[Action]:
        self.presence.wait(device, now)
        return self.feed(Asked(device, now))

    def leave(self, device: str, now: float) -> list[Action]:
        self.presence.leave(device, now)
        return self.feed(Tick(now))

    def tick(self, now: float) -> list[Action]:
        return self.feed(Tick(now))

    def record(self, task: str, now: float) -> list[Action]:
        assert self.accepts(task)
        self.recorded.add(task)
        return self.feed(Tick(now))

    def fail(self, task: str, now: float, message: str = "broken", final: bool = False) -> list[Action]:
        return self.feed(TaskFailed(task, now, "failed", "error", message, final))

    def progress(self, task: str, now: float) -> list[Action]:
        self.presence.see(self.state.tasks[task].device_id, now)
        return self.feed(Progressed(task, now))

    def done(self, number: int, now: float, paused: str = "") -> list[Action]:
        actions = self.feed(RoundDone(number, now, paused))
        self.recorded.clear()
        return actions

    def accepts(self, task: str) -> bool:
        return accepts(self.state, self.facts, task)

    def open(self) -> list[str]:
        return [
            task.device_id
            for task in self.state.tasks.values()
            if task.standing is Standing.OPEN and task.task_id not in self.recorded
        ]


def started(rules: Rules = RULES) -> tuple[Play, dict[str, str]]:
    """Devices a and b have tasks since time 1. Returns the task of each device."""
    play = Play(rules)
    play.wait("a", 0)
    play.wait("b", 1)
    assert play.state.phase is Phase.TRAINING
    return play, {task.device_id: task.task_id for task in play.state.tasks.values()}


def given(actions: Sequence[Action]) -> list[str]:
    return [action.device_id for action in actions if isinstance(action, GiveTask)]


def lost(actions: Sequence[Action]) -> list[str]:
    return [action.task_id for action in actions if isinstance(action, EndTask)]


def test_all_known_devices_wait_so_the_round_starts_at_once() -> None:
    play = Play()
    play.wait("a", 0)
    actions = play.wait("b", 1)
    assert isinstance(actions[0], StartRound)
    assert set(actions[0].devices) == {"a", "b"}
    assert set(given(actions[1:])) == {"a", "b"}
    assert play.state.deadline == 101
    assert play.presence.waiting == set()


def test_it_waits_gather_s_for_a_live_device_that_does_not_wait() -> None:
    play = Play()
    play.wait("c", 0)
    play.leave("c", 0)
    play.wait("a", 1)
    assert play.wait("b", 2) == []
    play.tick(4.9)
    assert play.state.phase is Phase.GATHERING
    play.tick(5)
    assert play.state.phase is Phase.TRAINING


def test_a_quorum_starts_once_nobody_else_has_given_a_sign_of_life_for_a_lease() -> None:
    play = Play()
    play.wait("b", 0)
    play.leave("b", 1)
    play.wait("a", 1)
    play.tick(11)
    assert play.state.phase is Phase.GATHERING
    play.tick(11.1)
    assert play.state.phase is Phase.TRAINING


def test_too_few_devices_start_only_at_the_deadline_and_with_quorum() -> None:
    play = Play()
    play.wait("a", 0)
    for at in range(0, 100, 9):  # b lives and never waits
        play.leave("b", at)
    play.tick(99.9)
    assert play.state.phase is Phase.GATHERING
    play.tick(100)
    assert play.state.phase is Phase.TRAINING
    play = Play(replace(RULES, quorum=2))
    play.wait("a", 0)
    play.tick(100)
    assert play.state.phase is Phase.GATHERING


def test_that_devices_are_missing_is_said_soon_and_again_and_when_it_changes() -> None:
    play = Play(replace(RULES, quorum=3, devices_per_round=3))
    play.wait("a", 0)
    said = {at: actions for at in range(100) if (actions := play.tick(at))}
    assert list(said) == [10, 30, 50, 70, 90]
    assert said[10] == said[90] == [Log("round 1: waiting for 2 more of 3 devices")]
    play.wait("b", 99)
    assert play.tick(99.5) == []
    assert play.tick(100) == [Log("round 1: waiting for 1 more of 3 devices")]
    play.presence.reject("c", "board c: too small", 101)
    assert play.tick(111) == [
        Log("round 1: waiting for 1 more of 3 devices; 1 device was rejected: board c: too small"),
    ]


def test_the_draw_is_uniform_and_depends_on_seed_and_round_only() -> None:
    drawn = []
    for seed in range(300):
        state = restore(replace(RULES, seed=seed, devices_per_round=1), 0, (), 0)
        orders = []
        for order in ("cab", "abc"):
            presence = Presence(RULES.lease_s)
            for device in order:
                presence.wait(device, 0)
            orders.append(step(state, Tick(5), Facts(set(), presence))[1])
        assert orders[0] == orders[1]
        assert isinstance(orders[0][0], StartRound)
        drawn.append(orders[0][0].devices)
    assert all(75 < drawn.count((device,)) < 125 for device in "abc")


def test_the_round_closes_when_all_have_answered() -> None:
    play, tasks = started()
    assert play.record(tasks["a"], 2) == []
    assert play.state.phase is Phase.TRAINING
    play.record(tasks["b"], 3)
    assert play.state.phase is Phase.AGGREGATING


def test_what_is_recorded_counts_however_the_event_was_lost() -> None:
    """A coordinator that could not act on a recorded update closes the round at the next tick all the same."""
    play, tasks = started()
    play.recorded.update(tasks.values())
    assert not play.accepts(tasks["a"])
    assert play.tick(3) == []
    assert play.state.phase is Phase.AGGREGATING


def test_a_device_whose_update_is_recorded_is_not_given_its_task_again() -> None:
    play, tasks = started()
    play.recorded.add(tasks["a"])
    assert play.wait("a", 3) == []
    assert play.presence.waiting == {"a"}


def test_a_failure_counts_as_an_answer() -> None:
    play, tasks = started()
    play.record(tasks["a"], 2)
    assert play.fail(tasks["b"], 3) == [EndTask(tasks["b"], "b", "failed", "error", "broken")]
    assert play.state.phase is Phase.AGGREGATING


def test_at_the_deadline_the_quorum_closes_the_round_without_the_others() -> None:
    play, tasks = started()
    play.record(tasks["a"], 2)
    for now in range(5, 101, 5):
        assert play.progress(tasks["b"], now) == []
    assert play.tick(101) == [EndTask(tasks["b"], "b", "lost", "lost", "the round closed without it")]
    assert play.state.phase is Phase.AGGREGATING
    assert not play.accepts(tasks["b"])


def test_at_the_deadline_under_quorum_updates_are_kept_and_others_drawn() -> None:
    play, tasks = started(replace(RULES, quorum=2))
    play.record(tasks["a"], 2)
    play.wait("c", 3)
    play.wait("a", 3)
    for now in range(5, 101, 5):
        play.progress(tasks["b"], now)
    actions = play.tick(101)
    assert lost(actions) == [tasks["b"]]
    assert given(actions) == ["c"]
    assert play.state.deadline == 201
    assert play.accepts(tasks["b"])  # its update is still welcome
    third = next(action.task_id for action in actions if isinstance(action, GiveTask))
    play.record(third, 110)
    assert play.state.phase is Phase.AGGREGATING


def test_under_quorum_with_nobody_waiting_it_says_so_once_a_deadline() -> None:
    play, tasks = started()
    play.fail(tasks["a"], 2)
    assert [type(action) for action in play.fail(tasks["b"], 3)] == [EndTask, Log]
    assert play.tick(4) == []
    assert [type(action) for action in play.tick(23)] == [Log]
    assert given(play.wait("c", 104)) == ["c"]
    assert play.state.deadline == 204


def test_a_failed_device_is_drawn_again_only_after_others_and_a_pause() -> None:
    play, tasks = started()
    play.wait("c", 1)
    play.fail(tasks["a"], 2)
    play.wait("a", 2)
    play.fail(tasks["b"], 3)
    assert play.open() == ["c"]
    third = next(task.task_id for task in play.state.tasks.values() if task.device_id == "c")
    play.fail(third, 4)
    assert play.open() == []
    assert given(play.tick(6.9)) == []
    again = [action for action in play.tick(7) if isinstance(action, GiveTask)]
    assert again == [GiveTask(tasks["a"], "a", 2, 1)]


def test_a_device_that_would_fail_again_is_not_drawn_again_in_its_round() -> None:
    play, tasks = started()
    play.fail(tasks["a"], 2, "no such operator", final=True)
    play.fail(tasks["b"], 2)
    play.wait("a", 3)
    assert given(play.tick(50)) == []
    assert given(play.wait("b", 51)) == ["b"]


def test_a_job_whose_devices_all_fail_in_the_same_way_is_stuck() -> None:
    play, tasks = started()
    play.fail(tasks["a"], 2, "loss is not finite", final=True)
    play.wait("a", 2)
    assert play.state.phase is Phase.TRAINING  # b still trains
    play.fail(tasks["b"], 3, "loss is not finite", final=True)
    assert play.state.phase is Phase.STUCK
    assert play.state.why == "round 1: all 2 devices failed in the same way: loss is not finite"
    assert play.tick(1000) == []


def test_a_device_that_has_not_tried_yet_keeps_a_job_alive() -> None:
    play, tasks = started()
    play.wait("c", 1)
    play.fail(tasks["a"], 2, "loss is not finite", final=True)
    actions = play.fail(tasks["b"], 3, "loss is not finite", final=True)
    assert (play.state.phase, given(actions)) == (Phase.TRAINING, ["c"])
    third = next(task.task_id for task in play.state.tasks.values() if task.device_id == "c")
    play.record(third, 4)
    assert play.state.phase is Phase.AGGREGATING


def test_two_faults_of_two_devices_are_no_fault_of_the_job() -> None:
    play, tasks = started()
    play.fail(tasks["a"], 2, "loss is not finite", final=True)
    play.fail(tasks["b"], 3, "no such operator", final=True)
    assert play.state.phase is Phase.TRAINING


def test_a_silent_task_is_lost_and_progress_renews_its_lease() -> None:
    play, tasks = started()
    play.progress(tasks["a"], 8)
    assert play.tick(11.5) == [EndTask(tasks["b"], "b", "lost", "lost", "no sign of life within its lease")]
    assert lost(play.tick(18.5)) == [tasks["a"]]


def test_a_lost_update_that_arrives_in_its_round_is_taken() -> None:
    play, tasks = started()
    play.tick(12)
    play.record(tasks["a"], 13)
    assert play.state.phase is Phase.AGGREGATING


def test_progress_revives_a_lost_task_if_there_is_room() -> None:
    play, tasks = started()
    play.tick(12)
    play.progress(tasks["a"], 13)
    assert play.open() == ["a"]


def test_an_old_word_of_progress_does_not_revive_a_task_whose_device_waits() -> None:
    play, tasks = started()
    play.tick(12)
    play.progress(tasks["a"], 13)
    play.wait("b", 14)
    play.progress(tasks["b"], 15)
    assert play.open() == ["a"]


def test_a_device_that_asks_again_gets_its_task_again() -> None:
    play, tasks = started()
    assert play.wait("a", 4) == [GiveTask(tasks["a"], "a", 2, 1)]
    assert play.state.deadline == 101


def test_a_device_that_delivered_waits_for_the_next_round() -> None:
    play, tasks = started()
    play.record(tasks["a"], 2)
    assert play.wait("a", 3) == []
    assert play.presence.waiting == {"a"}
    assert not play.accepts(tasks["a"])


def test_rounds_follow_each_other_until_the_last() -> None:
    play, tasks = started()
    play.record(tasks["a"], 2)
    play.record(tasks["b"], 3)
    assert play.done(1, 4) == []
    assert (play.state.phase, play.state.round, play.state.tasks) == (Phase.GATHERING, 2, {})
    play.wait("a", 5)
    play.wait("b", 5)
    second = list(play.state.tasks)
    assert not set(second) & set(tasks.values())
    assert not play.accepts(tasks["a"])
    play.record(second[0], 6)
    play.record(second[1], 6)
    play.done(2, 7)
    assert play.state.phase is Phase.FINISHED
    assert play.wait("a", 8) == play.tick(9) == []


def test_a_paused_job_gives_no_task() -> None:
    play, tasks = started()
    play.record(tasks["a"], 2)
    play.record(tasks["b"], 3)
    play.done(1, 4, paused="three rounds in a row were not published")
    assert (play.state.phase, play.state.round) == (Phase.PAUSED, 2)
    assert play.wait("a", 5) == play.wait("b", 500) == []
    restored = restore(RULES, 1, (), 0, paused=play.state.why)
    assert (restored.phase, restored.why) == (Phase.PAUSED, "three rounds in a row were not published")


def test_a_round_cannot_be_done_twice() -> None:
    play, _ = started()
    with pytest.raises(ValueError, match="round 1 is done"):
        play.done(1, 2)


def test_a_restart_keeps_tasks_and_accepted_updates() -> None:
    rules = replace(RULES, quorum=2)
    kept = [
        Assignment("t-1", "a", 1, Standing.OPEN),
        Assignment("t-2", "b", 2, Standing.OPEN),
        Assignment("t-3", "c", 1, Standing.EXPIRED),
        Assignment("t-4", "d", 1, Standing.FAILED),
    ]
    play = Play(rules, kept, now=50)
    play.recorded.add("t-1")
    assert (play.state.phase, play.state.round, play.state.deadline) == (Phase.TRAINING, 1, 150)
    assert [play.accepts(f"t-{number}") for number in (1, 2, 3, 4)] == [False, True, True, False]
    assert play.tick(59) == []
    play.record("t-2", 59.5)
    assert play.state.phase is Phase.AGGREGATING


def test_a_restart_between_rounds_gathers_and_after_the_last_is_finished() -> None:
    assert restore(RULES, 1, (), 0).phase is Phase.GATHERING
    assert restore(RULES, 1, (), 0).round == 2
    assert restore(RULES, 2, (), 0).phase is Phase.FINISHED
    assert restore(replace(RULES, rounds=3), 2, (), 0).phase is Phase.GATHERING


def test_the_state_of_a_restart_is_the_state_of_before() -> None:
    before: State = Play().state
    assert before == restore(RULES, 0, (), 0)


def test_one_device_cannot_end_a_job_that_is_meant_for_two() -> None:
    play = Play()
    play.wait("a", 0)
    play.tick(100)  # the deadline passes, and the quorum is one
    (task,) = play.state.tasks
    ended, said = play.fail(task, 101, "end it", final=True)
    assert (type(ended), type(said), play.state.phase) == (EndTask, Log, Phase.TRAINING)
    alone = Play(replace(RULES, devices_per_round=1))
    alone.wait("a", 0)
    (task,) = alone.state.tasks
    alone.fail(task, 1, "loss is not finite", final=True)
    assert alone.state.phase is Phase.STUCK


def test_others_step_in_at_once_where_the_quorum_is_out_of_reach() -> None:
    play, tasks = started(replace(RULES, quorum=2))
    play.wait("c", 2)
    assert given(play.fail(tasks["a"], 3)) == ["c"]  # b still trains
    play, tasks = started()  # a quorum of one: b's update will do
    play.wait("c", 2)
    assert given(play.fail(tasks["a"], 3)) == []


def test_that_no_device_that_waits_can_train_is_said_with_the_reason() -> None:
    play, tasks = started(replace(RULES, quorum=2))
    play.record(tasks["b"], 2)
    play.fail(tasks["a"], 3, "loss is not finite", final=True)
    play.wait("a", 4)
    play.wait("b", 4)
    (said,) = play.tick(90)
    assert isinstance(said, Log) and said.message.endswith("no device that waits can train it: loss is not finite")


def test_the_round_is_taken_over_from_the_record() -> None:
    play, tasks = started()
    play.fail(tasks["a"], 2, "no such operator", final=True)
    rows = [
        Assignment(tasks["a"], "a", 1, Standing.FAILED),
        Assignment(tasks["b"], "c", 1, Standing.OPEN),  # what was recorded is not what we thought
    ]
    state = taken_over(play.state, rows, 7)
    assert state.tasks[tasks["a"]].standing is Standing.HOPELESS
    assert (state.tasks[tasks["b"]].device_id, state.tasks[tasks["b"]].given_at) == ("c", 7)
    fresh = restore(RULES, 0, (), 0)
    assert taken_over(fresh, rows, 7).phase is Phase.TRAINING
    assert taken_over(fresh, (), 7) == fresh
