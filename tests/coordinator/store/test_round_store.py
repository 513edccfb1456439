"""Rounds and weights: the intent, what is in force, what is unknown, and a crash between every two steps."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from typing import Any

import pytest

from coordinator.store.round_store import in_spans, named
from coordinator.store.tables import rounds, sealing
from fedepth.errors import StateError


def names(place: Any) -> list[str]:
    return sorted(path.name for path in (place.folder / "weights").iterdir())


def short(place: Any, content: bytes) -> str:
    return str(place.kit.sha256(content)[:12])


def test_weights_are_named_with_round_and_digest(place: Any) -> None:
    store = place.open()
    sealed = store.seal_weights(place.partial(b"zero"), 0)
    assert (sealed.round, sealed.digest, sealed.size_bytes) == (0, place.kit.sha256(b"zero"), 4)
    assert sealed.path.name == f"round-0000-{short(place, b'zero')}.safetensors"
    assert store.latest_round() is None  # sealed is not recorded
    store.record_round(place.record_of(0, b"zero"))
    assert store.find_weights(sealed.digest) == place.record_of(0, b"zero")
    assert store.find_weights(place.kit.sha256(b"other")) is None
    store.close()


def test_sealing_and_recording_again_change_nothing(place: Any) -> None:
    store = place.open()
    for _ in range(2):
        assert store.seal_weights(place.partial(b"zero"), 0).path.read_bytes() == b"zero"
    record = place.record_of(0, b"zero")
    store.record_round(record)
    store.record_round(replace(record, closed_at=5000.0))
    store.seal_weights(place.partial(b"zero"), 0)
    assert store.rounds() == [record]
    assert names(place) == [f"round-0000-{short(place, b'zero')}.safetensors"]
    store.close()


def test_other_weights_take_the_place_of_an_intent_that_was_not_recorded(place: Any) -> None:
    store = place.open()
    place.add_round(store, 0)
    store.seal_weights(place.partial(b"first try"), 1)
    store.close()
    store = place.open()  # the file is the one of the intent
    place.add_round(store, 1, b"second try")
    assert [path for path in names(place) if "0001" in path] == [
        f"round-0001-{short(place, b'second try')}.safetensors"
    ]
    store.close()
    place.open().close()


def test_a_recorded_round_takes_no_other_weights(plain: Any) -> None:
    store = plain.open()
    plain.add_round(store, 0, b"zero")
    with pytest.raises(StateError, match="round 0 is recorded with weights"):
        store.seal_weights(plain.partial(b"other"), 0)
    with pytest.raises(StateError, match="round 0 is recorded with weights"):
        store.record_round(plain.record_of(0, b"other"))
    with pytest.raises(StateError, match="of round 1 are not sealed"):
        store.record_round(plain.record_of(1, b"never sealed"))
    store.close()


def test_a_file_with_other_bytes_is_not_overwritten(plain: Any) -> None:
    store = plain.open()
    path = store.files.weights(0, plain.kit.sha256(b"zero"))
    path.write_bytes(b"somebody's")
    with pytest.raises(StateError, match=f"{path.name} holds other bytes"):
        store.seal_weights(plain.partial(b"zero"), 0)
    assert path.read_bytes() == b"somebody's"
    store.close()


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_unknown(place: Any, unknown: float | None) -> None:
    store = place.open()
    place.add_round(store, 0, accuracy=unknown, loss=unknown, parity_max_abs=unknown, epsilon=unknown)
    record = store.latest_round()
    assert (record.accuracy, record.loss, record.parity_max_abs, record.epsilon) == (None, None, None, None)
    store.set_evaluation(0, 0.5, unknown)
    store.set_export(0, "model.onnx", unknown)
    record = store.latest_round()
    assert (record.accuracy, record.loss, record.parity_max_abs) == (0.5, None, None)
    store.close()


def test_a_round_that_is_not_published_leaves_the_weights_in_force(place: Any) -> None:
    store = place.open()
    place.add_round(store, 0, b"zero", accuracy=0.25)
    refused = place.refuse_round(store, 1, b"worse", note="accuracy fell to 1 %")
    assert store.latest_round() == refused
    assert (refused.digest, refused.note) == (place.kit.sha256(b"zero"), "accuracy fell to 1 %")
    assert store.weights_of(refused).read_bytes() == b"zero"
    assert store.find_weights(refused.digest).round == 0
    assert store.find_weights(refused.aside_digest) is None
    assert names(place) == [
        f"round-0000-{short(place, b'zero')}.safetensors",
        f"round-0001-{short(place, b'worse')}.aside.safetensors",
    ]
    with pytest.raises(StateError, match=r"round 1 was not published \(accuracy fell to 1 %\); .* of round 0"):
        store.kept_round(1)
    place.add_round(store, 2, b"two")
    assert [(each.round, each.published) for each in store.rounds()] == [(0, True), (1, False), (2, True)]
    store.close()
    place.open().close()


def test_an_average_that_is_not_kept_aside_goes(plain: Any) -> None:
    store = plain.open()
    zero = plain.add_round(store, 0, b"zero")
    store.seal_weights(plain.partial(b"worse"), 1)
    store.record_round(replace(zero, round=1, published=False))
    assert names(plain) == [f"round-0000-{short(plain, b'zero')}.safetensors"]
    store.close()


def test_an_unpublished_round_must_name_the_weights_in_force(plain: Any) -> None:
    store = plain.open()
    plain.add_round(store, 0, b"zero")
    store.seal_weights(plain.partial(b"worse"), 1)
    with pytest.raises(StateError, match="are not the weights in force"):
        store.record_round(replace(plain.record_of(1, b"worse"), published=False))
    with pytest.raises(StateError, match="is not sealed"):
        aside = plain.kit.sha256(b"never sealed")
        store.record_round(replace(plain.record_of(1, b"zero"), published=False, aside_digest=aside))
    store.close()


def test_a_summary_holds_the_latest_that_is_known(place: Any) -> None:
    store = place.open()
    empty = store.summary()
    assert (empty.accuracy, empty.export_path, empty.epsilon, empty.unpublished) == (None, "", None, 0)
    place.add_round(store, 0, accuracy=0.125, epsilon=0.5)
    store.set_export(0, "zero.onnx", 0.0)
    place.add_round(store, 1)
    place.refuse_round(store, 2, b"worse")
    place.refuse_round(store, 3, b"even worse")
    summary = store.summary()
    assert (summary.accuracy, summary.export_path, summary.unpublished) == (0.125, "zero.onnx", 2)
    assert summary.epsilon is None  # what was spent by round 0 says nothing of the rounds after it
    assert [each.round for each in store.rounds(2)] == [2, 3]
    store.close()


def test_the_file_of_the_record_alone_is_complete_after_a_round(plain: Any, tmp_path: Any) -> None:
    """A copy without the log holds everything up to the last round, also while the coordinator runs."""
    store = plain.open()
    plain.add_round(store, 0)
    plain.add_update(store, plain.task(1))
    plain.add_round(store, 1)
    log = plain.folder / "job.sqlite-wal"
    assert log.stat().st_size == 0
    alone = tmp_path / "alone"
    shutil.copytree(plain.folder, alone, ignore=shutil.ignore_patterns("*-wal", "*-shm", "lock"))
    store.close()
    copied = replace(plain, folder=alone).open()
    assert [each.round for each in copied.rounds()] == [0, 1]
    assert copied.accepted_ids(1) == {"t-0001-a"}
    copied.close()


@pytest.mark.parametrize("kind", ["published", "refused"])
@pytest.mark.parametrize("again", [b"new weights", b"others"])
def test_a_crash_between_any_two_steps_of_a_round_is_made_up(plain: Any, steps: Any, kind: str, again: bytes) -> None:
    """`again` is what the average comes to after the restart."""

    def close_round(store: Any, content: bytes) -> None:
        if kind == "published":
            plain.add_round(store, 1, content)
        else:
            plain.refuse_round(store, 1, content)

    last = 0
    done = False
    while not done:
        shutil.rmtree(plain.folder, ignore_errors=True)
        store = plain.open()
        plain.add_round(store, 0, b"zero")
        done = steps.until(last, lambda store=store: close_round(store, b"new weights"))
        store.close()  # what a dead process leaves to others: nothing is finished here
        store = plain.open()
        recorded = store.latest_round().round == 1
        content = b"new weights" if recorded else again
        if not recorded:
            assert store.weights_of(store.latest_round()).read_bytes() == b"zero"
            close_round(store, content)
        in_force = content if kind == "published" else b"zero"
        assert store.weights_of(store.latest_round()).read_bytes() == in_force
        new = f"round-0001-{short(plain, content)}.{'' if kind == 'published' else 'aside.'}safetensors"
        assert names(plain) == [f"round-0000-{short(plain, b'zero')}.safetensors", new]
        assert store._database.rows(sealing.select()) == []
        store.close()
        last += 1
    assert last > 5, steps.taken
    assert {"begin", "keep", "replace", "checkpoint"} <= set(steps.taken)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_weights_are_refused_with_what_to_do(plain: Any, damage: str) -> None:
    store = plain.open()
    plain.add_round(store, 0, b"zero")
    plain.add_round(store, 1, b"one!")
    store.close()
    path = store.files.weights(1, plain.kit.sha256(b"one!"))
    if damage == "changed":
        path.write_bytes(b"0ne!")
    else:
        path.unlink()
    with pytest.raises(StateError) as refused:
        plain.open()
    message = str(refused.value)
    assert f"{path} is {damage.replace('changed', 'damaged')}" in message
    assert "in force after round 1" in message
    assert "rollback --round N to round 0" in message


def test_a_record_newer_than_its_files_offers_only_what_is_there(plain: Any) -> None:
    store = plain.open()
    for number in range(6):
        plain.add_round(store, number)
    store.record_task(plain.task(6, "a"))
    store.close()
    path = [store.files.weights(number, plain.kit.sha256(b"weights %d" % number)) for number in range(6)]
    for number in (0, 2, 5):
        path[number].unlink()
    path[3].write_bytes(b"weights X")  # of the right size
    with pytest.raises(StateError, match=r"go back with fedepth-coordinator rollback --round N to rounds 1 and 4$"):
        plain.open()
    store = plain.repair()
    for number, why in ((5, "is missing"), (3, "is damaged"), (9, "there is no round 9")):
        with pytest.raises(StateError, match=rf"{why}.*has the weights of rounds 1 and 4$"):
            store.rollback(number)
    assert store.rollback(4).round == 4
    store.close()
    plain.open().close()


def test_weights_of_past_rounds_that_are_missing_are_recorded_as_gone(plain: Any) -> None:
    store = plain.open()
    for number in range(3):
        plain.add_round(store, number)
    store.close()
    store.files.weights(1, plain.kit.sha256(b"weights 1")).unlink()
    store = plain.open()
    assert [each.round for each in store.kept_rounds()] == [0, 2]
    with pytest.raises(StateError, match=r"weights of round 1 are no longer kept; .* of rounds 0 and 2"):
        store.kept_round(1)
    with pytest.raises(StateError, match="there is no round 7"):
        store.kept_round(7)
    store.close()


def test_a_round_of_which_somebody_deleted_the_row_is_not_guessed(plain: Any) -> None:
    store = plain.open()
    plain.add_round(store, 0)
    plain.add_round(store, 1)
    store._database.write(rounds.delete().where(rounds.c.round == 1))
    store.close()
    with pytest.raises(StateError, match=r"weights of round 1 that .* does not know"):
        plain.open()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], "no round"),
        ([3], "round 3"),
        ([1, 2, 5], "rounds 1, 2 and 5"),
        (range(20), "rounds 0, 1, 2, 3, 4, 5, …, 14, 15, 16, 17, 18 and 19"),
    ],
)
def test_rounds_are_named(numbers: Any, text: str) -> None:
    assert named(numbers) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "round 3"), ([1, 2, 3], "rounds 1 to 3"), ([1, 2, 7, 9, 10], "rounds 1 to 2, 7 and 9 to 10")],
)
def test_neighbouring_rounds_are_named_as_one(numbers: list[int], text: str) -> None:
    assert in_spans(numbers) == text
