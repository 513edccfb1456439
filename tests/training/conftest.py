from contextlib import nullcontext

import pytest

from fedepth.training import stages


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves this process without RLIMIT_DATA, which all tests would share: what a stage takes is still held against
    its budget. The real limit is for real trainers (tests/integration/test_trainer.py), which end when they have met
    it: a thread that was refused memory for one kernel cannot compile another (fedepth.training.limits)."""
    monkeypatch.setattr(stages, "DataLimit", lambda *_: nullcontext())
