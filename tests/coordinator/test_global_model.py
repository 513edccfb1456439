"""A round's updates become the global weights: real files, the job's rule, and disks that change what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.global_model import GlobalModel, prepare
from coordinator.observe.events import Events
from coordinator.store.entries import RoundRecord
from coordinator.store.records import Store
from coordinator.uploads import Uploads
from fedepth.aggregation.privacy import spent_epsilon
from fedepth.aggregation.rules import Norms
from fedepth.errors import ExportError, UpdateError
from fedepth.job import model_spec, training_spec
from fedepth.task import Result
from fedepth.weights import load_numpy, save

Tensors = dict[str, Any]


class Rig:
    """A job with real weights, all zero, and updates that set every value to one number."""

    def __init__(self, folder: Path, kit: Any, **sections: Any) -> None:
        self.kit = kit
        self.config = kit.config(rounds=9, **sections)
        self.store = Store.open(folder, "demo", model_spec(self.config))
        partial = folder / "weights" / "new.partial"
        save(partial, self.tensors(0.0))
        sealed = self.store.seal_weights(partial, 0)
        self.store.record_round(RoundRecord(0, sealed.digest, sealed.size_bytes, 0.0, 0, 0))
        self.sent: list[dict[str, Any]] = []
        self.models = kit.models()
        self._begin()

    def _begin(self) -> None:
        layout = self.kit.layout
        self.model = GlobalModel(self.config, self.store, self.models, _Recorder(self.sent), layout.parameters)
        training = partial(training_spec, self.config)

        async def record(result: Result, norms: Norms) -> None:
            await self.store.short(self.store.record_update, result, norms)

        self.uploads = Uploads(
            self.store, layout, lambda task: True, lambda size: None, record, self.model.path, training
        )

    def tensors(self, value: float, fill: float | None = None) -> Tensors:
        made = {each.name: np.full(each.shape, value, np.float32) for each in self.kit.layout.tensors}
        if fill is not None:
            made["head.weight"][0, 0] = fill
        return made

    def update(
        self, device: str, value: float, number: int = 1, fill: float | None = None, weights_digest: str = ""
    ) -> Result:
        """Committed as a device's update is."""
        made = self.kit.task(task_id=f"t-{number:04d}-{device}", device_id=device)
        task = replace(made, round=number)
        self.store.record_task(task)
        folder = self.store.files.spool(task.task_id, 1)
        folder.mkdir()
        part = folder / "part-0000.safetensors"
        save(part, self.tensors(value, fill))
        result: Result = self.kit.result(task, {0: part.read_bytes()}, device_id=device, weights_digest=weights_digest)
        assert asyncio.run(self.uploads.commit(result))
        return result

    def close(self) -> RoundRecord:
        asyncio.run(self.model.close(1, self.store.updates_of(1), self.uploads.paths))
        return self.model.record

    def restart(self, **sections: Any) -> None:
        """The job goes on, with a changed file."""
        self.config = self.kit.config(rounds=9, **sections)
        self._begin()

    def rounds(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            self.update("a", 1.0, number)
            asyncio.run(self.model.close(number, self.store.updates_of(number), self.uploads.paths))

    def weights(self) -> Tensors:
        return load_numpy(self.model.path())


class _Recorder(Events):
    def __init__(self, sent: list[dict[str, Any]]) -> None:
        super().__init__()
        self._sent = sent

    def send(self, event: str, **fields: Any) -> None:
        self._sent.append({"event": event, **fields})


@pytest.fixture
def rigs(tmp_path: Path, kit: Any) -> Iterator[Any]:
    made: list[Rig] = []

    def build(**sections: Any) -> Rig:
        made.append(Rig(tmp_path / str(len(made)), kit, **sections))
        return made[-1]

    yield build
    for rig in made:
        rig.store.close()


def test_the_mean_of_the_updates_is_in_force_and_evaluated(rigs: Any) -> None:
    rig = rigs()
    for device, value in (("a", 1.0), ("b", 2.0)):
        rig.update(device, value)
    record = rig.close()
    assert (record.published, record.devices, record.samples, record.accuracy, record.loss) == (True, 2, 40, 0.75, 0.5)
    assert all((tensor == 1.5).all() for tensor in rig.weights().values())
    assert rig.models.asked == ["evaluate"]


def test_without_test_data_a_round_is_published_and_its_accuracy_stays_unknown(rigs: Any) -> None:
    rig = rigs(test=None)
    rig.update("a", 1.0)
    record = rig.close()
    assert (record.published, record.accuracy, record.loss) == (True, None, None)
    asyncio.run(rig.model.make_up())
    assert rig.models.asked == []
    assert [each["event"] for each in rig.sent] == ["round_closed"]
    last = rig.kit.config(rounds=1, test=None)
    model = GlobalModel(last, rig.store, rig.models, _Recorder(rig.sent), rig.kit.layout.parameters)
    asyncio.run(model.make_up())
    assert rig.models.asked == ["export"]
    assert rig.sent[-1]["compared_on"] == "100 samples of the test data"


def test_the_job_chooses_the_rule(rigs: Any) -> None:
    rig = rigs(devices_per_round=3, aggregation={"rule": "median"})
    for device, value in (("a", 1.0), ("b", 2.0), ("c", 1000.0)):
        rig.update(device, value)
    rig.close()
    assert all((tensor == 2.0).all() for tensor in rig.weights().values())


def test_a_part_that_changed_on_the_disk_is_left_out_and_told(rigs: Any) -> None:
    rig = rigs()
    rig.update("a", 1.0)
    damaged = rig.update("b", 2.0)
    (path,) = rig.uploads.paths(damaged)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)
    record = rig.close()
    assert (record.published, record.devices) == (True, 1)
    assert all((tensor == 1.0).all() for tensor in rig.weights().values())
    (told,) = [each for each in rig.sent if each["event"] == "update_damaged"]
    assert (told["device"], told["task_id"]) == ("b", damaged.task_id)


def test_a_round_whose_updates_are_all_damaged_leaves_the_weights(rigs: Any) -> None:
    rig = rigs()
    for device in "ab":
        for path in rig.uploads.paths(rig.update(device, 1.0)):
            path.unlink()
    record = rig.close()
    assert (record.published, record.devices) == (False, 0)
    assert "damaged on the coordinator's disk" in record.note
    assert all((tensor == 0.0).all() for tensor in rig.weights().values())


def test_an_update_that_goes_much_further_than_five_others_is_refused(rigs: Any) -> None:
    rig = rigs(devices_per_round=8)
    for index, device in enumerate("abcde"):
        rig.update(device, 1.0 + index)  # the median goes as far as 3
    with pytest.raises(UpdateError, match=r"its parameters change by .* times what the 5 other updates") as caught:
        rig.update("f", 46.0)
    assert caught.value.reason == "norm"
    rig.update("g", 44.0)
    assert len(rig.store.updates_of(1)) == 6


def test_what_was_spent_of_privacy_is_in_the_record(rigs: Any) -> None:
    rig = rigs(privacy={"clip_norm": 1.0, "noise_multiplier": 2.0, "delta": 1e-5})
    rig.update("a", 1.0)
    rig.update("b", 1.0)
    record = rig.close()
    assert record.epsilon == pytest.approx(spent_epsilon([2.0], 1e-5))
    assert rig.store.summary().epsilon == record.epsilon


def test_a_model_that_collapses_is_kept_aside_with_those_who_took_part(rigs: Any) -> None:
    rig = rigs(guard={"largest_drop": 0.2})
    rig.update("a", 1.0)
    rig.update("b", 1.0)
    rig.store.set_evaluation(0, 0.96, 0.1)
    rig.model.record = rig.store.latest_round()
    record = rig.close()
    assert not record.published
    assert "75.0%, 21.0% less than the 96.0% of the model in force" in record.note
    assert all((tensor == 0.0).all() for tensor in rig.weights().values())
    (told,) = [each for each in rig.sent if each["event"] == "not_published"]
    assert told["devices"] == ["a", "b"]


def test_a_collapse_is_measured_against_the_model_in_force(rigs: Any) -> None:
    """Not against the one that was kept aside the round before."""
    rig = rigs(guard={"largest_drop": 0.2})
    rig.store.set_evaluation(0, 0.9, 0.1)
    rig.models.accuracies = [0.1, 0.12]
    for number in (1, 2):
        rig.update("a", 1.0, number)
        asyncio.run(rig.model.close(number, rig.store.updates_of(number), rig.uploads.paths))
        assert not rig.model.record.published, number
    assert "0.12" not in rig.model.record.note and "12.0%, 78.0% less than the 90.0%" in rig.model.record.note


def test_a_model_that_cannot_be_evaluated_is_not_published_where_the_operator_set_a_drop(rigs: Any) -> None:
    rig = rigs(guard={"largest_drop": 0.2})
    rig.models.dead = True
    rig.update("a", 1.0)
    assert "could not be evaluated" in rig.close().note
    assert rig.models.asked == ["evaluate"] * 3
    free = rigs()
    free.models.dead = True
    free.update("a", 1.0)
    assert free.close().published


def test_a_past_round_whose_weights_are_damaged_stops_nothing(rigs: Any) -> None:
    rig = rigs()
    rig.update("a", 1.0)
    rig.close()
    rig.store.set_evaluation(1, None, None)
    path = rig.model.path()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    asyncio.run(rig.model.make_up())
    assert any("cannot be evaluated" in each.get("message", "") for each in rig.sent)


def test_the_privacy_of_rounds_that_were_taken_back_is_spent(rigs: Any) -> None:
    rig = rigs(privacy={"clip_norm": 1.0, "noise_multiplier": 2.0, "delta": 1e-5})
    for number in (1, 2):
        rig.update("a", 1.0, number)
        asyncio.run(rig.model.close(number, rig.store.updates_of(number), rig.uploads.paths))
    rig.store.rollback(1)
    rig.model.record = rig.store.latest_round()  # as after a start
    rig.update("b", 1.0, 2)
    asyncio.run(rig.model.close(2, rig.store.updates_of(2), rig.uploads.paths))
    assert rig.model.record.epsilon == pytest.approx(spent_epsilon([2.0] * 3, 1e-5))


def noise(multiplier: float, delta: float = 1e-5) -> dict[str, Any]:
    return {"privacy": {"clip_norm": 1.0, "noise_multiplier": multiplier, "delta": delta}}


def test_a_round_spends_by_the_noise_that_it_was_closed_with(rigs: Any) -> None:
    rig = rigs(**noise(2.0))
    rig.rounds(1, 2)
    before = rig.model.record.epsilon
    rig.store.rollback(1)
    rig.restart(**noise(30.0))
    rig.rounds(2, 3)
    record = rig.model.record
    assert record.epsilon == pytest.approx(spent_epsilon([2.0, 2.0, 30.0, 30.0], 1e-5))
    assert record.epsilon > before
    assert (record.noise_multiplier, record.clip_norm, record.delta) == (30.0, 1.0, 1e-5)
    assert rig.store.summary().not_private == ""


def test_another_delta_is_told_with_what_it_changes(rigs: Any) -> None:
    rig = rigs(**noise(2.0))
    rig.rounds(1, 1)
    rig.restart(**noise(2.0, 1e-7))
    rig.rounds(2, 2)
    summary = rig.store.summary()
    assert (summary.epsilon, summary.delta) == (pytest.approx(spent_epsilon([2.0, 2.0], 1e-7)), 1e-7)
    assert any("with delta 1e-07; it was" in each.get("message", "") for each in rig.sent)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (noise(2.0), {}, "not private: rounds 3 to 4 were closed without noise"),
        ({}, noise(2.0), "not private: rounds 1 to 2 were closed without noise"),
        ({}, {}, ""),
    ],
)
def test_rounds_without_noise_leave_no_epsilon(
    rigs: Any, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    rig = rigs(**first)
    rig.rounds(1, 2)
    rig.restart(**second)
    rig.rounds(3, 4)
    summary = rig.store.summary()
    assert (summary.epsilon, summary.not_private) == (None, said)
    assert rig.model.record.epsilon is None
    told = " ".join(each.get("message", "") for each in rig.sent)
    assert ("not private: round" in told) == bool(said)


def test_an_update_that_was_trained_from_other_weights_is_refused(rigs: Any) -> None:
    """As after the record came back from a copy, which hands out the task ids of its abandoned life again."""
    rig = rigs()
    with pytest.raises(
        UpdateError, match=r"trained from weights ffffffffffff…, task t-0001-a has [0-9a-f]{12}…"
    ) as caught:
        rig.update("a", 1.0, weights_digest="f" * 64)
    assert caught.value.reason == "weights"
    rig.update("b", 1.0, weights_digest=rig.model.record.digest)
    rig.update("c", 1.0)  # of an agent that does not say it
    assert [each.device_id for each in rig.store.updates_of(1)] == ["b", "c"]


def test_an_operator_set_that_is_too_low_is_told_at_the_start(tmp_path: Path, kit: Any) -> None:
    """Of a new job, before anything is recorded, and of one that goes on with another setting."""
    refuse = True

    class Models(type(kit.models())):  # type: ignore[misc]
        async def request(self, do: str, **fields: Any) -> dict[str, Any]:
            if do == "check_export":
                self.asked.append(do)
                assert fields["choices"].opset == 13 and Path(fields["weights"]).is_file()
                if refuse:
                    raise ExportError("its operator Trilu needs 14")
                return {}
            return dict(await super().request(do, **fields))

    models = Models()
    config = kit.config(export={"opset": 13})
    store = Store.open(tmp_path, "demo", model_spec(config))
    with pytest.raises(ExportError, match="Trilu needs 14"):
        asyncio.run(prepare(config, store, models))
    assert store.latest_round() is None
    refuse = False
    asyncio.run(prepare(config, store, models))
    refuse = True
    with pytest.raises(ExportError, match="Trilu needs 14"):
        asyncio.run(prepare(config, store, models))
    asyncio.run(prepare(kit.config(), store, models))  # without the setting nothing is asked
    store.close()
    assert models.asked == ["prepare", "check_export"] * 2 + ["check_export"]
