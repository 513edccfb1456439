"""Who is there, at exact times."""

from __future__ import annotations

from fedepth.rounds.presence import Presence


def test_a_device_is_forgotten_after_a_lease_of_silence() -> None:
    presence = Presence(10)
    presence.see("a", 0)
    presence.see("b", 5)
    assert presence.live(10) == {"a", "b"}
    assert presence.live(10.1) == {"b"}
    assert presence.seen_at("a") == float("-inf")
    assert presence.seen_at("b") == 5


def test_a_device_that_waits_is_live_however_long_it_says_nothing() -> None:
    presence = Presence(10)
    presence.wait("a", 0)
    assert presence.live(1000) == {"a"}
    presence.leave("a", 1001)
    assert presence.live(1011.1) == set()


def test_everyone_waits_when_all_that_live_do() -> None:
    presence = Presence(10)
    assert presence.everyone_waits(0)
    presence.wait("a", 0)
    presence.see("b", 0)
    assert not presence.everyone_waits(10)
    assert presence.everyone_waits(10.1)


def test_a_hundred_thousand_strangers_leave_nothing_behind() -> None:
    presence = Presence(10)
    for now in range(100_000):
        presence.see(f"stranger-{now}", now)
        presence.everyone_waits(now)
    assert len(presence.live(100_000)) == 10


def test_devices_that_were_rejected_are_counted_until_they_wait_or_stay_away() -> None:
    presence = Presence(10)
    assert presence.rejections(0) == ""
    assert presence.reject("a", "board a: too small", 0)
    assert not presence.reject("a", "board a: too small", 30)  # the same again
    assert presence.rejections(60) == "1 device was rejected: board a: too small"
    assert presence.reject("b", "board b: no samples", 60)
    assert presence.rejections(60) == "2 devices were rejected, the last: board b: no samples"
    presence.wait("b", 61)
    assert presence.rejections(61) == "1 device was rejected: board a: too small"
    assert presence.rejections(121) == ""


def test_what_was_rejected_does_not_grow_without_end() -> None:
    presence = Presence(10)
    for number in range(1500):
        presence.reject(f"device {number}", "no", 0)
    assert presence.rejections(0).startswith("1000 devices were rejected")
