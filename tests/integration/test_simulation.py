"""A job that is simulated and the same job on devices: one program in two places, so one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import simulate
from fedepth.files import file_digest


def test_also_where_updates_go_up_as_int8(tmp_path: Path) -> None:
    """What every round leaves out has to be the same, or the next round's weights are not."""
    job = simulate.job_file(tmp_path, "equal")
    job.write_text(f'{job.read_text()}\n[transfer]\nencoding = "int8"\n')
    weights, plans = simulate.on_devices(tmp_path, job)
    options = [*simulate.as_devices(tmp_path, plans), "--workers", "2"]
    assert simulate.simulated(job, tmp_path / "simulated", options) == file_digest(weights)


def test_a_simulation_gives_the_weights_that_devices_give_bit_for_bit(tmp_path: Path) -> None:
    job = simulate.job_file(tmp_path, "equal", augmentation="crop-flip")
    weights, plans = simulate.on_devices(tmp_path, job)
    assert len({json.dumps(plan["stages"]) for plan in plans.values()}) == 3  # two of them split it, in their own ways
    options = [*simulate.as_devices(tmp_path, plans), "--workers", "2"]
    assert simulate.simulated(job, tmp_path / "simulated", options) == file_digest(weights)
    pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    assert simulate.simulated(job, tmp_path / "ray", [*options, "--engine", "ray"]) == file_digest(weights)
