"""What all tests share: what devices measure of themselves goes to a folder of this run, not to the user's."""

import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.lab import program
from tests.once import made_once

# Three processes test at once on two cores, since many tests wait for processes of theirs; threads of torch beside them
# would only be in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Exported models leave millions of objects, which a collection looks through again and again.
gc.set_threshold(100_000, 50, 100)
# A shell that runs the tests in the background has them ignore Ctrl-C, and so would all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, one for all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache_home(shared: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(shared / "cache"))
        yield shared / "cache"


@pytest.fixture(scope="session")
def calibration_told(cache_home: Path) -> Path:
    """What `fedepth-client calibrate --json` says of this machine.

    Whoever asks first lets it measure. Real agents then find the record, and need not measure for a minute each.
    """
    told = cache_home / "calibration.json"
    with made_once(told) as making:
        if making:
            argv = [program("fedepth-client"), "calibrate", "--json"]
            ended = subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False)
            assert (ended.returncode, ended.stderr) == (0, "")
            making.write_text(ended.stdout, encoding="utf-8")
    return told
