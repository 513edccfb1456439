"""One fault, one seed: what a scenario is, and what all of them do alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.faults.federation import Federation
from benchmarks.faults.injection import Action, Rule
from benchmarks.faults.outside import Outside

LIMIT_S = 45.0  # for what has to come by itself after a fault
MEET_S = 12.0  # for a program to make the call that a rule waits for
ROUNDS_AFTER = 2
_OBSERVED, _RULE = 0, 1  # numbers of rules


@dataclass
class Scene:
    """A scenario as it is played.

    Attributes:
        fired: how many faults really happened; a condition that lasts counts once.
        said: what was done, for people.
        failures: what should have been otherwise.
        excused: tasks whose loss is the fault itself.
        unexpected: what the scenario itself brings about in the logs, parts of lines.
    """

    seed: int
    kind: str
    federation: Federation
    chance: random.Random
    fired: int = 0
    said: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    excused: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)

    def say(self, what: str) -> None:
        self.said.append(what)

    def fail(self, what: str) -> None:
        self.failures.append(what)

    def device(self) -> str:
        """One of the devices."""
        return self.chance.choice(self.federation.devices)

    def devices(self) -> list[str]:
        """One of the devices, or all of them."""
        return self.chance.choice([[self.device()], self.federation.devices])


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        play: brings the fault about and waits until it is over.
        shared: the federation can be used for other scenarios afterwards; else it gets its own, made with `job`.
        ends: after it, the job has to end by itself; False where it may end as it likes.
        times: seeds of it in a full run.
        outside: makes what the federation keeps its state on.
    """

    name: str
    play: Callable[[Scene], None]
    shared: bool = True
    times: int = 2
    ends: bool = True
    rounds: int = 6
    real_trainers: bool = False
    job: Mapping[str, Any] = field(default_factory=dict)
    outside: Callable[[], Outside] = Outside


def recover(scene: Scene, rounds: int = ROUNDS_AFTER) -> None:
    """Waits until more rounds are over than had begun.

    Raises:
        ChildError: they are not in time.
    """
    federation = scene.federation
    federation.wait_until(
        lambda: federation.finished or federation.round() >= 0, LIMIT_S, "the coordinator is not back"
    )
    begun = federation.round()
    if begun >= 0 and not federation.finished:
        federation.wait_rounds(begun + rounds - 1, LIMIT_S)


def inject(
    scene: Scene, name: str, rule: Rule, after: Rule | None = None, lasting_s: float = 0.0, meet_s: float = MEET_S
) -> None:
    """Arms a rule in a program, waits until it has fired, and lifts it; a program that it killed is started again."""
    control = scene.federation.managed[name].control
    exits = len(scene.federation.managed[name].exits)
    if after is not None:
        control.arm(_OBSERVED, after)
        rule = Rule(**{**vars(rule), "after": _OBSERVED})
    control.arm(_RULE, rule)
    end = time.monotonic() + meet_s
    while not control.fired(_RULE) and time.monotonic() < end and not scene.federation.finished:
        time.sleep(0.02)
    if lasting_s and control.fired(_RULE):
        time.sleep(lasting_s)
    elif rule.count > 1:
        end = time.monotonic() + MEET_S / 2
        while control.fired(_RULE) < rule.count and time.monotonic() < end:
            time.sleep(0.02)
    control.lift(_RULE)
    control.lift(_OBSERVED)
    if control.fired(_RULE):
        scene.fired += 1
        scene.say(f"{name}: {rule.describe()}, {control.fired(_RULE)} times")
    else:
        scene.say(f"{name}: {rule.describe()}, but it never came to that")
    if control.fired(_RULE) and rule.action in (Action.KILL_BEFORE, Action.KILL_AFTER) and not rule.program_is_child:
        scene.federation.wait_until(
            lambda: len(scene.federation.managed[name].exits) > exits, MEET_S, f"{name} outlived its kill"
        )
