"""The coordinator's event loop never waits for a disk, a database or a bucket: every test here looks (conftest)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.store.records import Store
from fedepth.job import model_spec
from tests.coordinator.loop_guard import ROOT, watching

CALLS: dict[str, Callable[[Store, Path], object]] = {
    "open": lambda _, folder: open(folder / "x", "w", encoding="ascii").close(),
    "os.mkdir": lambda _, folder: (folder / "y").mkdir(),
    "os.remove": lambda _, folder: (folder / "job.sqlite").rename(folder / "z"),
    "shutil.rmtree": lambda _, folder: shutil.rmtree(folder / "weights"),
    "stat": lambda _, folder: (folder / "job.sqlite").exists(),
    "disk_usage": lambda store, _: store.files.free_bytes(),
    "database": lambda store, _: store.latest_round(),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_coroutine_of_ours_calls_in_the_loop_is_found(
    name: str, tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path, "demo", model_spec(kit.config()))
    call = CALLS[name]
    namespace: dict[str, Any] = {"asyncio": asyncio}
    text = "async def inside(call): call()\nasync def aside(call): await asyncio.to_thread(call)\n"
    exec(compile(text, str(ROOT / "coordinator" / "invented.py"), "exec"), namespace)
    with watching(monkeypatch) as found:
        asyncio.run(namespace["aside"](lambda: None))
        assert found == []
        asyncio.run(namespace["inside"](lambda: call(store, tmp_path)))
    store.close()
    assert found and found[0].startswith(name.partition(".")[0]), found
    assert "in coroutine inside" in found[0]


def test_the_same_in_a_thread_is_none_of_it(tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, "demo", model_spec(kit.config()))
    with watching(monkeypatch) as found:
        for call in CALLS.values():
            asyncio.run(asyncio.to_thread(call, store, tmp_path))
    store.close()
    assert found == []
