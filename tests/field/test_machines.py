"""Machines as people have them: what /proc and cgroups may say, and where state may lie. A new case is a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedepth.cli
from coordinator.store.records import Store
from edge_client.config import Config, default_state_dir
from edge_client.measure import calibration
from edge_client.memory.probe import measure
from fedepth.errors import FedepthError, StateError
from fedepth.task import ModelSpec

MIB = 1 << 20
MEMINFO = "MemTotal: 4096000 kB\nMemFree: 1024000 kB\nMemAvailable: 2048000 kB\n"
FREE, AVAILABLE, TOTAL = 1024000 << 10, 2048000 << 10, 4096000 << 10
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def in_cgroup(maximum: str, current: str = "0", **more: str) -> dict[str, str | bytes]:
    folder = "sys/fs/cgroup/job"
    files: dict[str, str | bytes] = {
        "proc/meminfo": MEMINFO,
        "proc/self/mountinfo": V2,
        "proc/self/cgroup": "0::/job\n",
        f"{folder}/memory.max": maximum,
        f"{folder}/memory.current": current,
    }
    return files | {f"{folder}/{name.replace('_', '.', 1)}": text for name, text in more.items()}


# --- what the kernel, a container or lxcfs may say: files, what is available, and what a note says

KERNELS: dict[str, tuple[dict[str, str | bytes], int, str]] = {
    "nothing at all": ({}, 0, "does not say how much memory there is"),
    "an empty meminfo": ({"proc/meminfo": ""}, 0, "does not say how much memory there is"),
    "binary": ({"proc/meminfo": b"\xff\xfe\0\0" * 100}, 0, "does not say how much memory there is"),
    "no total": ({"proc/meminfo": "MemFree: 5 kB\nMemAvailable: 7 kB\n"}, 5 << 10, "does not say how much"),
    "no MemAvailable": ({"proc/meminfo": MEMINFO.replace("MemAvailable", "Other")}, FREE, "MemFree stands for it"),
    "negative": ({"proc/meminfo": MEMINFO.replace("2048000", "-2048000")}, FREE, "MemFree stands for it"),
    "more than there is": ({"proc/meminfo": MEMINFO.replace("2048000", "9048000")}, FREE, "MemFree stands for it"),
    "all more than there is": ({"proc/meminfo": MEMINFO.replace("4096000", "1")}, 0, "nothing is taken to be free"),
    "a number without end": ({"proc/meminfo": MEMINFO.replace("2048000", "9" * 5000)}, FREE, "MemFree stands for it"),
    "digits of another script": ({"proc/meminfo": MEMINFO.replace("2048000", "٢٠٤٨")}, FREE, "MemFree stands for it"),
    "no limit": (in_cgroup("max\n"), AVAILABLE, ""),
    "no limit, as v1 writes it": (in_cgroup("9223372036854771712\n"), AVAILABLE, ""),
    "a limit": (in_cgroup(f"{100 * MIB}\n", f"{40 * MIB}\n"), 60 * MIB, ""),
    "nothing allowed": (in_cgroup("0\n"), 0, ""),
    "used more than allowed": (in_cgroup("5\n", "7\n"), 0, ""),
    "an empty limit": (in_cgroup(""), AVAILABLE, "job/memory.max says '', which is not a limit"),
    "a negative limit": (in_cgroup("-5\n"), AVAILABLE, "job/memory.max says '-5', which is not a limit"),
    "v1's word for none": (in_cgroup("-1\n"), AVAILABLE, ""),
    "a word": (in_cgroup("plenty\x1b[2J\n"), AVAILABLE, r"says 'plenty\x1b[2J', which is not a limit"),
    "a huge limit": (in_cgroup("9" * 400), AVAILABLE, "which is not a limit"),
    "an odd limit beside a good one": (in_cgroup("x\n", memory_high=f"{MIB}\n"), MIB, "job/memory.max says 'x'"),
    "use that is not known": (in_cgroup(f"{MIB}\n", "?\n"), 0, "what is used under that limit is not known"),
    "more cache than use": (in_cgroup(f"{MIB}\n", "5\n", memory_stat=f"inactive_file {9 * MIB}\n"), MIB, ""),
    "an odd stat": (in_cgroup(f"{MIB}\n", "5\n", memory_stat="inactive_file -3\n\n inactive_file\n"), MIB - 5, ""),
    "a folder where a file should be": (
        in_cgroup(f"{MIB}\n") | {"sys/fs/cgroup/job/memory.high/x": ""},
        MIB,
        "job/memory.high cannot be read",
    ),
    "a blank in the mount point": (
        in_cgroup("max")
        | {
            "proc/self/mountinfo": V2.replace("fs/cgroup", "my\\040fs"),
            "sys/my fs/job/memory.max": "9",
            "sys/my fs/job/memory.current": "1",
        },
        8,
        "",
    ),
    "a mount point that is no text": (
        in_cgroup("max")
        | {
            "proc/self/mountinfo": V2.encode().replace(b"fs/cgroup", b"\xff"),
            os.fsdecode(b"sys/\xff/job/memory.max"): "9",
            os.fsdecode(b"sys/\xff/job/memory.current"): "1",
        },
        8,
        "",
    ),
    "another container's hierarchy mounted first": (
        in_cgroup(f"{MIB}\n")
        | {"proc/self/mountinfo": V2.replace(" / /sys/fs", " /other /mnt") + V2, "mnt/cgroup/memory.max": "7"},
        MIB,
        "",
    ),
    "a cgroup that is gone": (in_cgroup("9\n") | {"proc/self/cgroup": "0::/gone (deleted)\n"}, AVAILABLE, ""),
    "no hierarchy mounted": (
        in_cgroup("9\n") | {"proc/self/mountinfo": ""},
        AVAILABLE,
        "limits of '/job' are not known",
    ),
    "half a mountinfo": (in_cgroup("9\n") | {"proc/self/mountinfo": "1 2 - \n - cgroup2\n - \n\n" + V2}, 9, ""),
    "odd lines of cgroups": (
        in_cgroup("9\n") | {"proc/self/cgroup": "\n:\n0:\n0::relative\n0::/job\n"},
        9,
        "a line that cannot be read",
    ),
    "v1 and v2 together": (
        in_cgroup("9\n")
        | {
            "proc/self/mountinfo": V1 + V2,
            "proc/self/cgroup": "3:cpu,memory:/a\n0::/job\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "7\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "1\n",
        },
        6,
        "",
    ),
    "limits of a process": (
        {"proc/meminfo": MEMINFO, "proc/self/limits": "Max data size             5000                 max bytes\n"},
        5000,
        "",
    ),
    "odd limits of a process": (
        {"proc/meminfo": MEMINFO, "proc/self/limits": "Max data size\nMax address space -7 1 bytes\n"},
        AVAILABLE,
        "nothing believable of RLIMIT_DATA",
    ),
    "odd pressure": ({"proc/meminfo": MEMINFO, "proc/pressure/memory": "some avg10=. avg60=1.2.3\n"}, AVAILABLE, ""),
}


@linux
@pytest.mark.parametrize("case", KERNELS)
def test_the_probe_never_says_more_than_there_is_and_names_what_it_left_out(case: str, tmp_path: Path) -> None:
    files, available, note = KERNELS[case]
    memory = measure(tree(tmp_path, files))
    assert memory.available_bytes == available
    assert note in "\n".join(memory.notes)
    assert note or not memory.notes
    assert all(text.isprintable() for text in (*memory.notes, *(limit.origin for limit in memory.limits)))


NUMBERS = st.integers(0, 1 << 43).map(str)
ODD = st.sampled_from(["", "max", "-1", "-7", "1e9", "0x10", "9" * 60, "\0", "12 34", "٣", "NaN", "\ud7ff", " 5"])
VALUE = NUMBERS | ODD
NAME = st.sampled_from(["a", "b c", "ü", "..", "x (deleted)", "\\", "n:m"])


@linux
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    total=VALUE,
    free=VALUE,
    available=VALUE,
    chain=st.lists(st.tuples(NAME, VALUE, VALUE, VALUE), max_size=3),
    version=st.sampled_from([1, 2]),
    process=VALUE,
)
def test_whatever_the_trees_say(
    total: str,
    free: str,
    available: str,
    chain: list[tuple[str, str, str, str]],
    version: int,
    process: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("root")
    files: dict[str, str | bytes] = {
        "proc/meminfo": f"MemTotal: {total} kB\nMemFree: {free} kB\nMemAvailable:   {available} kB\n",
        "proc/self/limits": f"Max data size             {process}     unlimited    bytes\n",
        "proc/self/mountinfo": V2 if version == 2 else V1,
        "proc/self/cgroup": f"{'0:' if version == 2 else '3:memory'}:/{'/'.join(link[0] for link in chain)}\n",
    }
    bounds = [int(process)] if plain(process) else []
    if plain(total) and plain(available) and 0 < int(available) <= int(total):
        bounds.append(int(available) << 10)
    if plain(total) and int(total):  # a machine of 0 bytes does not say how much memory there is
        bounds.append(int(total) << 10)
    folder = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    climbs = any(link[0] == ".." for link in chain)
    for name, most, current, cached in chain if not climbs else []:
        folder += f"/{name}"
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        files |= {f"{folder}/{names[0]}": most, f"{folder}/{names[1]}": current}
        files[f"{folder}/memory.stat"] = f"inactive_file {cached}\ntotal_inactive_file {cached}\n"
        if plain(most):
            bounds.append(int(most))
    memory = measure(tree(root, files))
    assert 0 <= memory.available_bytes <= min(bounds, default=1 << 63)
    for limit in memory.limits:
        assert limit.available_bytes >= 0
        assert not limit.limit_bytes or limit.available_bytes <= limit.limit_bytes


def plain(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def test_a_system_that_psutil_cannot_read_has_nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("no")

    monkeypatch.setattr("sys.platform", "freebsd14")
    monkeypatch.setattr("psutil.virtual_memory", refuse)
    memory = measure()
    assert memory.available_bytes == 0
    assert "does not say what is free" in memory.notes[0]


def test_a_device_that_hides_its_processor_and_its_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from edge_client.measure.capability import busy_share

    def refuse() -> None:
        raise OSError("hidden")

    monkeypatch.setattr("os.cpu_count", lambda: None)
    monkeypatch.setattr("os.getloadavg", refuse)
    monkeypatch.setattr(calibration, "_CPUINFO", tmp_path / "absent")
    assert busy_share() == 0.0
    assert len(calibration._processor()) == 12


# --- users without a home


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `docker run --user 1234`: no HOME, no account."""

    def unknown(_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 1234")

    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_state_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"HOME is not set, and user id \d+ has no account here; give --state DIR"):
        default_state_dir()
    with pytest.raises(StateError, match=r"has no account here; set HOME or XDG_CACHE_HOME"):
        calibration.cache_dir()
    assert calibration.cache_dir(str(tmp_path)) == tmp_path / "cache"
    assert Config(state=str(tmp_path)).state_dir == tmp_path


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_none_is_told(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    with pytest.raises(StateError, match=f"there is no home directory: HOME is '{home}'; give --state DIR"):
        default_state_dir()


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("home", "says"),
    [
        (None, r"HOME is not set, and user id \d+ has no account here; set HOME to install the completion"),
        ("", "HOME is ''; set HOME"),
        ("/dev/null", "the completion cannot be installed: /dev/null"),
        ("/proc/1/fd", "the completion cannot be installed: /proc/1/fd"),
    ],
)
def test_completion_needs_a_home(home: str | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("sys.argv", ["fedepth", "--install-completion", "bash"])
    with pytest.raises(FedepthError, match=says):
        fedepth.cli.app()


@pytest.mark.parametrize(
    ("variable", "kept"), [("/dev/null/x", "state"), ("relative", "state"), ("", "state"), ("/proc/1/x", "state")]
)
@pytest.mark.usefixtures("nobody")
def test_an_odd_folder_for_caches_leads_to_the_state(
    variable: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert calibration.cache_dir(str(tmp_path / kept)) == tmp_path / kept / "cache"


# --- where state may lie

MODEL = ModelSpec("m", ("a", "b"), (1, 8, 8), (0.5,), (0.5,))
NAMES = ["a?mode=ro", "a#b", "100%25", "%2e%2e", "a b", "a\nb", "a;b&c=d", "ü…→", "file:x", ":memory:", "'\"`$x", "-x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_any_name_lies_where_it_says(name: str, tmp_path: Path) -> None:
    Store.open(tmp_path / name, "job", MODEL).close()
    assert (tmp_path / name / "job.sqlite").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = Store.read(tmp_path / name)
    assert found.job_name == "job"
    found.close()


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def not_text(folder: Path) -> Path:
    return folder / os.fsdecode(b"\xff\xfe")


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (a_file, "is not a folder"),
    "below a file": (lambda folder: a_file(folder) / "sub", "Not a directory|holds no job"),
    "links in a circle": (a_loop, "is not a folder's path"),
    "bytes that are no text": (not_text, r"'.*\\udcff\\udcfe' holds bytes that are no text"),
    "a name that is too long": (lambda folder: folder / ("x" * 300), "File name too long"),
    "a device": (lambda _: Path("/dev/null"), "is not a folder"),
    "where nobody can write": (lambda _: Path("/proc/fedepth"), "cannot be written|holds no job"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_cannot_be_is_a_sentence(place: str, tmp_path: Path) -> None:
    make, says = PLACES[place]
    state = make(tmp_path)
    for attempt in (lambda: Store.open(state, "job", MODEL), lambda: Store.read(state)):
        with pytest.raises(FedepthError, match=says) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_record_on_a_read_only_disk_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(tmp_path / "state?", "job", MODEL).close()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as root, permissions would be no obstacle
    found = Store.read(tmp_path / "state?")
    assert found.job_name == "job"
    found.close()
    assert not list((tmp_path / "state?").glob("*-wal"))  # it was opened as what does not change


def test_a_folder_that_is_gone_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(StateError, match="is not a folder's path: No such file"):
        Store.read(Path("state"))
