"""What all tests share: what devices measure of themselves goes to a folder of this run, not to the user's."""

import os
from collections.abc import Iterator

import pytest

# Two processes test at once on two cores; threads of torch beside them would only be in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        # One for all of pytest-xdist's processes, so that the machine is measured once.
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(shared / "cache"))
        yield
