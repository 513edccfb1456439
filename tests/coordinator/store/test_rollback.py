"""Going back to an earlier round."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from fedepth.errors import StateError
from fedepth.job_sections import RetentionSection


def job_of_some_rounds(place: Any, last: int = 4) -> None:
    """Paused after round `last`, with an update and a task of the next."""
    store = place.open()
    place.add_round(store, 0)
    for number in range(1, last + 1):
        place.add_update(store, place.task(number))
        place.add_round(store, number)
        export = store.files.export("demo", number)
        export.write_bytes(b"onnx")
        store.set_export(number, str(export), 0.0)
        store.drop_spools_before(number + 1)
    place.add_update(store, place.task(last + 1))
    place.part(store, place.task(last + 1, "b"))
    store.record_task(place.task(last + 1, "b"))
    store.close()


def test_an_earlier_round_is_the_last_one_again(place: Any) -> None:
    job_of_some_rounds(place)
    store = place.repair()
    run_id = store.run_id
    assert store.rollback(2).round == 2
    store.close()

    store = place.open()
    latest = store.latest_round()
    assert latest.round == 2
    assert store.weights_of(latest).read_bytes() == b"weights 2"
    assert store.run_id != run_id
    assert [each.round for each in store.rounds()] == [0, 1, 2]
    assert [each.round for each in store.superseded_rounds()] == [3, 4]
    assert [each.round for each in store.updates()] == [1, 2]
    assert store.tasks_of(3) == store.tasks_of(5) == []
    assert list((place.folder / "spool").iterdir()) == []
    assert store.files.storage.names("spool") == set()
    assert [path.name for path in sorted((place.folder / "exports").iterdir())] == [
        "demo-round-0001.onnx",
        "demo-round-0002.onnx",
    ]
    assert store.find_weights(place.kit.sha256(b"weights 3")) is None

    place.add_round(store, 3, b"better")
    place.add_round(store, 4, b"weights 4")  # the same as before the rollback
    assert [each.round for each in store.rounds()] == [0, 1, 2, 3, 4]
    store.prune(RetentionSection(keep_last=1))
    assert store.weights_of(store.latest_round()).read_bytes() == b"weights 4"
    with pytest.raises(StateError, match="weights of round 3 are no longer kept"):
        store.kept_round(3)
    store.close()
    place.open().close()


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (9, "there is no round 9"),
        (1, "weights of round 1 are no longer kept"),
        (3, r"round 3 was not published \(it is worse\)"),
    ],
)
def test_rounds_that_cannot_be_gone_back_to_are_refused(plain: Any, number: int, why: str) -> None:
    store = plain.open()
    for each in range(3):
        plain.add_round(store, each, accuracy=1.0 if each == 0 else 0.5)
    store.prune(RetentionSection(keep_last=1))
    plain.refuse_round(store, 3, b"worse")
    with pytest.raises(StateError, match=rf"{why}.*has the weights of rounds 0 and 2"):
        store.rollback(number)
    store.rollback(0)
    with pytest.raises(StateError, match="round 2 was taken back by a rollback"):
        store.rollback(2)
    store.close()


def test_damaged_weights_are_not_gone_back_to(plain: Any) -> None:
    job_of_some_rounds(plain)
    store = plain.repair()
    store.files.weights(2, plain.kit.sha256(b"weights 2")).write_bytes(b"weights X")
    with pytest.raises(StateError, match="is damaged"):
        store.rollback(2)
    assert store.latest_round().round == 4
    store.close()


def test_it_recovers_from_damaged_weights_in_force(plain: Any) -> None:
    job_of_some_rounds(plain)
    weights = plain.folder / "weights" / f"round-0004-{plain.kit.sha256(b'weights 4')[:12]}.safetensors"
    weights.write_bytes(b"damaged")
    with pytest.raises(StateError, match="rollback --round N"):
        plain.open()
    store = plain.repair()
    store.rollback(3)
    store.close()
    store = plain.open()
    assert store.latest_round().round == 3
    store.close()


def test_the_same_average_again_leaves_no_second_file_of_it(place: Any) -> None:
    """Whether it was published or kept aside before the rollback, and is after it."""
    store = place.open()
    place.add_round(store, 0)
    digest = place.kit.sha256(b"again")[:12]
    for refused in (True, True, False, True, True):
        if refused:
            place.refuse_round(store, 1, b"again")
        else:
            place.add_round(store, 1, b"again")
        present = {name for name in store.files.storage.names("weights") if "round-0001" in name}
        assert f"weights/round-0001-{digest}{'.aside' if refused else ''}.safetensors" in present
        assert len(present) == 1 or not refused
        store.rollback(0)
        store.close()
        store = place.open()
    for number in range(1, 3):
        place.refuse_round(store, number, b"other %d" % number)
    store.prune(RetentionSection(keep_last=1))
    store.close()
    store = place.open()
    kept = [name for name in store.files.storage.names("weights") if digest in name]
    assert len(kept) == 1  # of the last round that was taken back
    store.close()


def test_a_running_coordinator_is_in_the_way(place: Any) -> None:
    store = place.open()
    with pytest.raises(StateError, match="is in use by another coordinator"):
        place.repair()
    store.close()


def test_a_crash_between_any_two_steps_is_made_up(plain: Any, steps: Any) -> None:
    last, done = 0, False
    while not done:
        shutil.rmtree(plain.folder, ignore_errors=True)
        job_of_some_rounds(plain, 2)
        store = plain.repair()
        done = steps.until(last, lambda store=store: store.rollback(1))
        store.close()
        store = plain.open()
        whole = store.latest_round().round == 1
        assert whole or store.latest_round().round == 2
        assert store.accepted_ids(3) == (frozenset() if whole else {"t-0003-a"})
        assert len(list((plain.folder / "spool").iterdir())) == (0 if whole else 2)
        store.close()
        last += 1
    assert last > 5, steps.taken
