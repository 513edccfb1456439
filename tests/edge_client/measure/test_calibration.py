"""When a device measures itself again, which allocator it takes, and that agents wait for one another."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from edge_client.config import TrainerConfig
from edge_client.measure import calibration
from edge_client.measure.calibration import (
    PROBES,
    ROOM,
    TRACER_BYTES,
    AllocatorTrial,
    Calibrated,
    calibrated,
    choose,
    fitting,
)
from edge_client.measure.trial import TrialModel
from edge_client.trainer.protocol import Done
from fedepth.costs import Calibration, ModelCosts
from fedepth.errors import ChildError, PlanError, StateError
from fedepth.estimate.peak import needed_bytes
from fedepth.models.catalog import named_spec
from fedepth.plan import CachePlace, PeakComponents, Plan, Policy, Stage
from fedepth.task import Result, StageResult, TrainingSpec

MIB = 1 << 20
GLIBC = AllocatorTrial("glibc", "glibc 2.36", 100 * MIB, 0.5)


def quiet(_: str) -> None: ...


class Measured:
    """Stands for the measurement, which takes seconds, and counts how often it was asked for."""

    def __init__(self) -> None:
        self.times = 0
        self.inside = 0

    async def __call__(
        self, config: TrainerConfig, memory: object, fingerprint: str, folder: Path, on_progress: object
    ) -> Calibrated:
        self.times += 1
        self.inside += 1
        assert self.inside == 1  # one at a time
        await asyncio.sleep(0)
        self.inside -= 1
        return Calibrated(fingerprint, Calibration("glibc", fixed_bytes=self.times), (GLIBC,), 1, 0.01)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    found = Measured()
    monkeypatch.setattr(calibration, "_measure", found)
    return found


def test_the_fastest_of_those_that_follow_the_tensors_is_taken() -> None:
    fast = AllocatorTrial("tcmalloc", "libtcmalloc", 110 * MIB, 0.2)
    assert choose((GLIBC, fast)) == fast
    assert choose((GLIBC, replace(fast, peak_bytes=126 * MIB))) == GLIBC


def test_it_is_measured_once_and_again_when_asked_or_when_something_changed(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainerConfig()
    first = asyncio.run(calibrated(config, quiet, folder=tmp_path))
    assert asyncio.run(calibrated(config, quiet, folder=tmp_path)) == first
    assert measured.times == 1
    assert asyncio.run(calibrated(config, quiet, again=True, folder=tmp_path)).calibration.fixed_bytes == 2
    monkeypatch.setattr(calibration, "torch_version", lambda: "99.0")
    assert asyncio.run(calibrated(config, quiet, folder=tmp_path)).calibration.fixed_bytes == 3
    assert asyncio.run(calibrated(TrainerConfig(threads=3), quiet, folder=tmp_path)).calibration.fixed_bytes == 4
    assert asyncio.run(calibrated(config, quiet, folder=tmp_path)).calibration.fixed_bytes == 3  # each has its record


def test_threads_of_the_user_and_of_the_settings_are_the_same_record(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for threads, times in ((3, 1), (0, 1), (2, 2)):
        asyncio.run(calibrated(TrainerConfig(threads=threads), quiet, folder=tmp_path))
        assert measured.times == times
    for odd in ("", "2,1", "x"):  # torch chooses, or OpenMP knows what is meant
        monkeypatch.setenv("OMP_NUM_THREADS", odd)
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
        assert measured.times == 3


def test_agents_that_start_together_measure_once(tmp_path: Path, measured: Measured) -> None:
    async def both() -> list[Calibrated]:
        return await asyncio.gather(*(calibrated(TrainerConfig(), quiet, folder=tmp_path) for _ in range(2)))

    one, other = asyncio.run(both())
    assert one == other
    assert measured.times == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="set XDG_CACHE_HOME to a folder that is"):
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path / "file" / "below"))


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> Calibrated:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(calibration, "_measure", full)
    with pytest.raises(
        StateError, match=r"cannot write its temporary files .* \(No space left on device\).*XDG_CACHE_HOME"
    ):
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
    assert not list(tmp_path.glob("calibration-*.json"))


def test_nothing_is_traced_where_the_tracer_itself_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def free(*_: object) -> int:
        return TRACER_BYTES - MIB

    monkeypatch.setattr(calibration, "_free_bytes", free)
    monkeypatch.setattr(calibration, "tracer", None)
    with pytest.raises(
        PlanError, match=r"256\.0 MiB of free memory in addition to the trainer, but only 255\.0 MiB is"
    ):
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))


def test_another_processor_is_measured_anew(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(calibration, "_CPUINFO", cpuinfo)
    for text in (
        "processor\t: 0\nmodel name\t: A\nflags\t\t: avx2\ncpu MHz\t: 2000\n",
        "processor\t: 0\nmodel name\t: A\nflags\t\t: avx2\ncpu MHz\t: 3000\n",  # the same, warmer
        "processor\t: 0\nmodel name\t: A\nflags\t\t: avx2 avx512f\n",
        "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n",
    ):
        cpuinfo.write_text(text)
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
    assert measured.times == 3


def test_what_was_kept_of_another_allowance_is_measured_anew(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for allowed in (1 << 20, 1 << 20, 2 << 20):
        monkeypatch.setattr(calibration, "KEPT_BYTES", allowed)
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
    assert measured.times == 2


def done(*peaks: tuple[int, int]) -> Done:
    """What a trainer tells of one stage for each (rehearsed, measured) peak."""
    nothing = PeakComponents(0, 0, 0, 0, 0, 0, 0)
    stages = tuple(Stage(number, number, 1, CachePlace.DISK, 1, nothing) for number in range(len(peaks)))
    results = tuple(
        StageResult(number, number, 1, 0, rehearsed, measured, 0, 0, 0.0, 0.0, 3, 3, 1.5)
        for number, (rehearsed, measured) in enumerate(peaks)
    )
    plan = Plan(stages, (), Policy.AUTO, 0)
    return Done(Result("t", 1, "d", 1, 3, plan, (), results, (), 1.0, "a", 0))


def test_a_probe_gives_its_stages_its_worst_peaks_and_its_time() -> None:
    costs = ModelCosts("m", (), 1, 1, 1)
    model = TrialModel(
        named_spec("digits-cnn", None, 10), TrainingSpec(1, 1, "sgd", 0, 0, 0, 0, "none", 1), costs, Path(), Path()
    )
    told = done((50, 60), (0, 10), (70, 65))
    # The stage whose peak lay below the baseline says nothing about what it needs.
    assert [each.measured_bytes for each in calibration._stages(model, PROBES[0], told)] == [50, 70]
    assert calibration._peaks(told) == (70, 65)
    assert calibration._trial("a", "version", told) == AllocatorTrial("a", "version", 65, 0.5)


def test_a_calibration_in_which_no_peak_rose_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = ModelCosts("m", (), 1, 1, 1)
    model = TrialModel(
        named_spec("digits-cnn", None, 10), TrainingSpec(1, 1, "sgd", 0, 0, 0, 0, "none", 1), costs, Path(), Path()
    )

    async def traced(*_: object) -> TrialModel:
        return model

    async def free(*_: object) -> int:
        return 1 << 40

    async def trained(*_: object) -> tuple[str, Done]:
        return "version", done((0, 0), (0, 0))

    monkeypatch.setattr(calibration, "_prepare", traced)
    monkeypatch.setattr(calibration, "_free_bytes", free)
    monkeypatch.setattr(calibration, "_run", trained)
    monkeypatch.setattr(calibration, "_plan", lambda model, probe: Plan((), (), Policy.AUTO, 0))
    monkeypatch.setattr(calibration, "fitting", lambda plans, free_bytes: list(plans))
    with pytest.raises(ChildError, match=r"no probe's peak rose .* run: fedepth-client calibrate"):
        asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))


def test_a_damaged_record_is_measured_again(tmp_path: Path, measured: Measured) -> None:
    asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
    (record,) = tmp_path.glob("calibration-*.json")
    record.write_text("{")
    asyncio.run(calibrated(TrainerConfig(), quiet, folder=tmp_path))
    assert measured.times == 2


def test_a_small_device_runs_only_the_probes_that_it_can_bear() -> None:
    def plan(mebibytes: int) -> Plan:
        peak = PeakComponents(0, 0, 0, mebibytes * MIB, 0, 0, 0)
        return Plan((Stage(0, 0, 1, CachePlace.DISK, 1, peak),), (), Policy.AUTO, 0)

    plans = {probe: plan(10 * number) for number, probe in enumerate(PROBES, 1)}
    second = int(ROOM * needed_bytes(20 * MIB))
    assert fitting(plans, second) == list(PROBES[:2])
    assert fitting(plans, second - 1) == list(PROBES[:1])
    with pytest.raises(PlanError, match=r"measuring what training takes here needs 20\.7 MiB of free memory"):
        fitting(plans, MIB)
