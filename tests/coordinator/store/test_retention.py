"""Which rounds keep their weights, and that a crash leaves neither too much nor too little."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from coordinator.store.entries import round_row
from coordinator.store.records import RoundRecord
from coordinator.store.retention import staying
from coordinator.store.tables import dropping, rounds, tasks
from fedepth.errors import StateError, UnavailableError
from fedepth.job_sections import RetentionSection


def record(number: int, accuracy: float | None = None, **changes: Any) -> RoundRecord:
    return RoundRecord(number, f"{number:064d}", 10, float(number), 2, 40, accuracy, **changes)


def kept(records: list[RoundRecord], **retention: Any) -> list[int]:
    return [each.round for each in staying(records, RetentionSection(**retention))]


def test_the_last_the_best_and_every_nth_stay() -> None:
    accuracies = [0.1, 0.2, 0.9, 0.4, 0.9, None, 0.5, 0.6, 0.7, 0.8]
    records = [record(number, accuracy) for number, accuracy in enumerate(accuracies)]
    assert kept(records) == [2, 7, 8, 9]  # of two that are best, the first
    assert kept(records, keep_best=False) == [7, 8, 9]
    assert kept(records, keep_last=1, keep_best=False, keep_every=4) == [4, 8, 9]
    assert kept(records[:1], keep_last=1) == [0]
    assert kept([]) == []


def test_averages_aside_and_superseded_rounds_do_not_push_others_out() -> None:
    records = [
        record(0),
        *(record(number, 0.99, superseded=True) for number in (1, 2, 3)),
        *(record(number) for number in (1, 2)),
        *(record(number, published=False, aside_digest="ff") for number in (3, 4, 5)),
    ]
    stay = staying(records, RetentionSection(keep_last=2))
    assert [(each.round, each.superseded) for each in stay] == [
        (1, False),
        (2, True),
        (2, False),
        (3, True),
        (4, False),
        (5, False),
    ]


rounds_drawn = st.lists(
    st.tuples(st.one_of(st.none(), st.floats(0, 1)), st.booleans(), st.booleans()), min_size=1, max_size=30
)
retentions = st.builds(
    RetentionSection, keep_last=st.integers(1, 6), keep_best=st.booleans(), keep_every=st.integers(0, 5)
)


@given(rounds_drawn, retentions)
def test_what_stays_is_bounded_and_holds_what_is_needed(drawn: list[Any], retention: RetentionSection) -> None:
    records = [
        record(number, accuracy, published=published, superseded=superseded)
        for number, (accuracy, published, superseded) in enumerate(drawn)
    ]
    stay = staying(records, retention)
    assert staying(stay, retention) == stay  # again changes nothing
    in_force = [each for each in records if each.published and not each.superseded]
    stays = [each for each in stay if each.published and not each.superseded]
    assert stays[-retention.keep_last :] == in_force[-retention.keep_last :]
    best = max((each.accuracy for each in in_force if each.accuracy is not None), default=None)
    if retention.keep_best and best is not None:
        assert best in [each.accuracy for each in stays]
    nth = [each for each in stays if retention.keep_every and each.round % retention.keep_every == 0]
    assert len(stay) - len(nth) <= 3 * retention.keep_last + retention.keep_best


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=30), retentions)
def test_pruning_after_every_round_or_once_keeps_the_same(
    accuracies: list[float | None], retention: RetentionSection
) -> None:
    records = [record(number, accuracy) for number, accuracy in enumerate(accuracies)]
    held: list[RoundRecord] = []
    for each in records:
        held = staying([*held, each], retention)
    assert held == staying(records, retention)


def files(place: Any, folder: str = "weights") -> list[str]:
    return sorted(path.name[:10] for path in (place.folder / folder).iterdir())


def test_pruning_lets_weights_exports_tasks_and_updates_go(place: Any, kit: Any) -> None:
    store = place.open()
    for number in range(7):
        place.add_round(store, number, accuracy=0.9 if number == 1 else 0.1 * number)
        export = store.files.export("demo", number)
        export.write_bytes(b"onnx %d" % number)
        store.set_export(number, str(export), 0.0)
        place.add_update(store, place.task(number + 1))
        store.drop_spools_before(number + 1)
        store.prune(RetentionSection(keep_last=2, history=3))
    assert files(place) == ["round-0001", "round-0005", "round-0006"]
    assert sorted(path.name for path in (place.folder / "exports").iterdir()) == [
        f"demo-round-000{number}.onnx" for number in (1, 5, 6)
    ]
    assert files(place, "spool") == ["t-0007-a-1"]
    assert [each.round for each in store.rounds()] == list(range(7))  # one row of every round
    assert [each.round for each in store.kept_rounds()] == [1, 5, 6]
    assert [each.round for each in store.updates()] == [4, 5, 6, 7]
    assert len(store._database.rows(tasks.select())) == 4
    assert store.find_weights(kit.sha256(b"weights 3")) is None
    assert store.find_weights(kit.sha256(b"weights 1")).round == 1
    with pytest.raises(StateError, match=r"weights of round 3 are no longer kept; .* of rounds 1, 5 and 6"):
        store.weights_of(store.rounds()[3])
    store.close()
    place.open().close()
    if place.files:
        assert sorted(name[8:18] for name in store.files.storage.names("weights")) == files(place)


def test_rounds_with_the_same_weights_share_none(plain: Any) -> None:
    """Nothing was trained: the bytes are equal, the files are not the same one."""
    store = plain.open()
    for number in range(4):
        plain.add_round(store, number, b"same")
    store.prune(RetentionSection(keep_last=1))
    assert files(plain) == ["round-0003"]
    assert store.weights_of(store.latest_round()).read_bytes() == b"same"
    store.close()


def test_a_crash_between_any_two_steps_of_pruning_is_made_up(plain: Any, steps: Any) -> None:
    retention = RetentionSection(keep_last=1, keep_best=False, history=1)
    last, done = 0, False
    while not done:
        shutil.rmtree(plain.folder, ignore_errors=True)
        store = plain.open()
        for number in range(4):
            plain.add_round(store, number)
            plain.add_update(store, plain.task(number + 1))
        done = steps.until(last, lambda store=store: store.prune(retention))
        store.close()
        store = plain.open()
        assert store.weights_of(store.latest_round()).read_bytes() == b"weights 3"
        assert {each.round for each in store.kept_rounds()} == {int(name[6:]) for name in files(plain)}
        store.prune(retention)
        assert files(plain) == ["round-0003"]
        assert [each.round for each in store.updates()] == [3, 4]
        assert store._database.rows(dropping.select()) == []
        store.close()
        last += 1
    assert steps.taken.count("remove") == 6  # three spools, three files of weights


def test_weights_that_were_about_to_go_can_come_back(plain: Any, steps: Any) -> None:
    """A crash leaves the name among those that go; then the same weights are sealed again."""
    store = plain.open()
    plain.add_round(store, 0)
    store.seal_weights(plain.partial(b"one"), 1)
    store.seal_weights(plain.partial(b"other"), 1)
    with store._database.begin() as connection:
        name = f"weights/round-0001-{plain.kit.sha256(b'one')[:12]}.safetensors"
        connection.execute(dropping.insert().values(name=name))
    plain.add_round(store, 1, b"one")
    store.close()
    store = plain.open()
    assert store.weights_of(store.latest_round()).read_bytes() == b"one"
    store.close()


def test_the_section_has_defaults_and_bounds() -> None:
    assert RetentionSection() == RetentionSection(keep_last=3, keep_best=True, keep_every=0, history=50)
    for wrong in ({"keep_last": 0}, {"keep_every": -1}, {"history": 0}, {"keep": 1}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, RetentionSection)


def test_a_file_that_cannot_be_deleted_keeps_none_of_the_others(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = plain.open()
    for number in range(6):
        plain.add_round(store, number)
    real = type(store.files.storage).remove

    def remove(storage: Any, name: str) -> None:
        if "round-0001" in name:
            raise UnavailableError("it is forbidden")
        real(storage, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(store.files.storage), "remove", remove)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="it is forbidden"):
                store.prune(RetentionSection(keep_last=1, keep_best=False))
            assert [name.split("-")[1] for name in files(plain)] == ["0001", "0005"]
        plain.add_round(store, 6)  # nor is a round held up
    store.prune(RetentionSection(keep_last=1, keep_best=False))
    assert [name.split("-")[1] for name in files(plain)] == ["0006"]
    store.close()


def test_letting_many_rounds_go_takes_few_statements(plain: Any) -> None:
    """A transaction while devices wait has seconds, and every statement may cross a network."""
    store = plain.open()
    first = plain.add_round(store, 0)
    count = 3000
    with store._database.begin() as connection:
        rows = [round_row(replace(first, round=number, digest=f"{number:064x}")) for number in range(1, count)]
        connection.execute(rounds.insert(), [*rows, round_row(replace(first, round=count))])
    statements: list[str] = []
    sa.event.listen(store._database._engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    store.prune(RetentionSection(keep_last=3))
    assert len(store.kept_rounds()) == 3
    assert len(statements) < 100
    store.close()
