"""Rounds in simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from fedepth.errors import JobError
from fedepth.plan import Plan, Policy
from fedepth.rounds.machine import Rules
from fedepth.simulation.course import Given, Played, Round
from fedepth.simulation.trace import Conditions, Trace
from fedepth.task import Failure, Outcome, Result

RULES = Rules(rounds=5, devices_per_round=3, quorum=2, gather_s=5, deadline_s=100, lease_s=10, seed=1)


def result(given: Given) -> Result:
    plan = Plan((), (), Policy.AUTO, 1)
    return Result(given.task_id, given.attempt, given.client, given.round, 1, plan, (), (), (), 0.0, "", 0)


def play(
    seconds: Mapping[str, float],
    conditions: Mapping[str, Conditions] | None = None,
    fails: Mapping[str, str] | None = None,
    refuses: str = "",
    chosen: Mapping[int, frozenset[str]] | None = None,
    rules: Rules = RULES,
    now: float = 0.0,
) -> tuple[Played, list[str]]:
    """A round, and who was really trained."""
    trained: list[str] = []

    async def train(given: Given) -> Result | Failure:
        trained.append(given.client)
        await asyncio.sleep(0)
        if given.client in (fails or {}):
            return Failure(given.task_id, given.attempt, given.client, Outcome.DIVERGED, (fails or {})[given.client])
        return result(given)

    def judge(update: Result) -> str:
        return "too far" if update.device_id == refuses else ""

    trace = Trace(dict(conditions or {}), dict(chosen or {}))
    return asyncio.run(Round(rules, 1, now, seconds, trace, train, judge).play()), trained


def devices(played: Played) -> list[str]:
    return [update.device_id for update in played.updates]


def test_without_a_trace_time_stands_still_and_everybody_who_is_drawn_delivers() -> None:
    played, trained = play(dict.fromkeys("abcdef", 0.0), now=7.0)
    assert len(devices(played)) == 3 and sorted(devices(played)) == sorted(trained)
    assert played.ended_at == 7.0 and played.ends == {}
    assert [given.task_id for given in played.given] == [f"task-0001-000{number}" for number in range(3)]
    assert play(dict.fromkeys("fedcba", 0.0))[0].given == play(dict.fromkeys("abcdef", 0.0))[0].given


def test_updates_count_in_the_order_in_which_they_come() -> None:
    played, _ = play({"a": 30.0, "b": 10.0, "c": 20.0})
    assert devices(played) == ["b", "c", "a"] and played.ended_at == 30.0


def test_who_is_late_is_never_trained() -> None:
    played, trained = play({"a": 30.0, "b": 10.0, "c": 101.0})
    assert devices(played) == ["b", "a"] and played.ended_at == 100.0
    assert sorted(trained) == ["a", "b"]
    assert list(played.ends.values()) == ["lost: the round closed without it"]


def test_below_the_quorum_a_round_goes_on_until_enough_of_what_is_late_has_come() -> None:
    played, _ = play({"a": 10.0, "b": 150.0, "c": 160.0})
    assert devices(played) == ["a", "b"]
    assert played.ended_at == 150.0


def test_a_client_that_drops_out_is_lost_when_its_lease_runs_out() -> None:
    conditions = {"c": Conditions("c", dropout=1.0)}
    played, trained = play({"a": 50.0, "b": 10.0, "c": 10.0}, conditions)
    assert devices(played) == ["b", "a"] and played.ended_at == 50.0 and "c" not in trained
    assert list(played.ends.values()) == ["lost: no sign of life within its lease"]


def test_another_steps_in_where_the_quorum_would_not_be_reached() -> None:
    conditions = {client: Conditions(client, dropout=1.0) for client in "ab"}
    played, _ = play({"a": 5.0, "b": 5.0, "c": 5.0, "d": 5.0}, conditions, rules=RULES)
    assert sorted(devices(played)) == ["c", "d"]


def test_what_fails_is_not_given_again_and_what_is_refused_neither() -> None:
    played, trained = play({"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0}, fails={"a": "nan"}, refuses="b")
    assert sorted(devices(played)) == ["c", "d"] and trained.count("a") <= 1 and trained.count("b") <= 1


def test_clients_come_and_go() -> None:
    there = {client: Conditions(client, available=((20.0, 90.0),)) for client in "abc"}
    played, _ = play({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, there)
    assert played.given[0].client in "abcd" and len(devices(played)) == 3
    assert played.ended_at == 21.0


def test_a_round_may_name_who_is_drawn() -> None:
    played, _ = play(dict.fromkeys("abcdef", 0.0), chosen={1: frozenset("bdf")})
    assert sorted(devices(played)) == ["b", "d", "f"]


def test_who_comes_seldom_is_waited_for_however_often_others_come() -> None:
    often = tuple((float(at), at + 0.5) for at in range(60))
    conditions = {
        "a": Conditions("a", available=often, every_s=60.0),
        "b": Conditions("b", available=((5_000.0, 6_000.0),), every_s=10_000.0),
        "c": Conditions("c", available=((15_345.0, 15_400.0),)),
    }
    rules = replace(RULES, devices_per_round=3, quorum=3, gather_s=1e6)
    played, _ = play(dict.fromkeys("abc", 0.0), conditions, rules=rules, now=7_000.0)
    assert sorted(devices(played)) == ["a", "b", "c"]
    with pytest.raises(JobError, match="cannot reach its quorum of 3: 0 updates of 2 clients"):
        play(dict.fromkeys("ab", 0.0), conditions, rules=rules)


def test_a_round_that_can_never_close_says_why() -> None:
    with pytest.raises(JobError, match="all 3 devices failed in the same way: nan; fix the job file"):
        play({"a": 1.0, "b": 1.0, "c": 1.0}, fails=dict.fromkeys("abc", "nan"))
    with pytest.raises(JobError, match=r"round 1 cannot reach its quorum of 2: 1 updates of 3 clients .*: [ab] broke"):
        play({"a": 1.0, "b": 1.0, "c": 1.0}, fails={"a": "a broke", "b": "b broke"})
    with pytest.raises(JobError, match="cannot reach its quorum of 2: 0 updates of 1 clients"):
        play({"a": 1.0})
