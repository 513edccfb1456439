"""How much memory is free here, and what bounds it: pure readers of /proc and /sys below a root.

Sources: admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/memory.rst, filesystems/proc.rst, accounting/psi.rst
in the Linux kernel's Documentation; proc_pid_mountinfo(5).
psutil's `available` is MemAvailable and knows nothing of cgroups.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import psutil

from edge_client.config import MemoryConfig
from fedepth.budget import Budget, MemoryLimit
from fedepth.printable import printable, quoted

# cgroup v1 writes "no limit" as the largest multiple of a page in a signed 64-bit number.
_UNLIMITED = 1 << 60
_MOST_BYTES = 4 << 20  # of a file of the kernel's; machines with thousands of mounts have hundreds of kB
_DECIMAL = re.compile(r"[0-9]{1,20}")
_RLIMITS = {"Max data size": "RLIMIT_DATA", "Max address space": "RLIMIT_AS"}


@dataclass(frozen=True)
class Pressure:
    """Share of time in which some task waited for memory, in percent, over the last 10 and 60 s."""

    some_10_s: float
    some_60_s: float


@dataclass(frozen=True)
class Memory:
    """The memory of a device as it is now. Sizes are bytes.

    Attributes:
        limits: every bound that was found; the smallest counts.
        swap_bytes: reported, but never counted as available: training from swap does not end in useful time.
        board: the device tree's model, such as "Raspberry Pi 4 Model B Rev 1.4"; empty on most PCs.
        unified: CPU and GPU draw on the same memory.
        cuda: names of discrete NVIDIA GPUs.
        notes: what an operator should know.
    """

    total_bytes: int
    limits: tuple[MemoryLimit, ...]
    swap_bytes: int = 0
    swap_free_bytes: int = 0
    board: str = ""
    unified: bool = False
    cuda: tuple[str, ...] = ()
    pressure: Pressure | None = None
    notes: tuple[str, ...] = ()

    @property
    def available_bytes(self) -> int:
        return min(limit.available_bytes for limit in self.limits)


def measure(root: Path = Path("/")) -> Memory:
    """Reads everything anew; takes about a millisecond.

    It never fails. What cannot be read or believed is left out, and named in the notes; where nothing says how much is
    free, nothing is.
    """
    if not sys.platform.startswith("linux"):
        return _from_psutil()
    doubts: list[str] = []
    total, available = _free(root, doubts)
    limits = [
        MemoryLimit("MemAvailable", available, total),
        *_cgroup_limits(root, doubts),
        *_process_limits(root, doubts),
    ]
    info = _meminfo(root)
    board = printable((_read(root / "proc/device-tree/model") or "").strip("\0 \n"))
    jetson = "jetson" in board.lower() or _exists(root / "etc/nv_tegra_release")
    swap = info.get("SwapTotal", 0)
    return Memory(
        total_bytes=total,
        limits=tuple(limits),
        swap_bytes=swap,
        swap_free_bytes=min(swap, info.get("SwapFree", 0)),
        board=board or ("NVIDIA Jetson" if jetson else ""),
        unified=jetson,
        cuda=_cuda(root),
        pressure=_pressure(root),
        notes=(*_notes(root, board, limits), *dict.fromkeys(doubts)),
    )


def budget_from(memory: Memory, start_bytes: int, config: MemoryConfig, held_bytes: int = 0) -> Budget:
    """min(cap, available × fraction − reserve − start), never below 0.

    Args:
        start_bytes: what a trainer costs before it holds weights or data.
        held_bytes: what a running trainer holds in all, its start included. It is added back to what is
            available, though never beyond a bound; process limits count from nothing, so they stay.
    """
    limits = tuple(_without(limit, held_bytes) for limit in memory.limits)
    available = min(limit.available_bytes for limit in limits)
    budget = int(available * config.fraction) - config.reserve_bytes - start_bytes
    if config.cap_bytes:
        budget = min(budget, config.cap_bytes)
    return Budget(
        total_bytes=memory.total_bytes,
        available_bytes=available,
        limits=limits,
        start_bytes=start_bytes,
        reserve_bytes=config.reserve_bytes,
        fraction=config.fraction,
        cap_bytes=config.cap_bytes,
        budget_bytes=max(0, budget),
    )


def anonymous_bytes(pid: int, root: Path = Path("/")) -> int:
    """What a process holds that the kernel cannot simply drop; 0 if it is gone or the system hides it."""
    return _kib_fields(_read(root / f"proc/{pid}/status") or "").get("RssAnon", 0)


def _without(limit: MemoryLimit, held_bytes: int) -> MemoryLimit:
    if limit.origin.startswith("RLIMIT_"):
        return limit
    available = limit.available_bytes + held_bytes
    return replace(limit, available_bytes=min(available, limit.limit_bytes or available))


def _from_psutil() -> Memory:
    try:
        memory = psutil.virtual_memory()
    except (psutil.Error, OSError, RuntimeError, ValueError) as error:
        return Memory(0, (MemoryLimit("psutil", 0, 0),), notes=(f"the system does not say what is free: {error}",))
    limit = MemoryLimit("psutil", max(0, min(memory.available, memory.total)), memory.total)
    try:
        swap = psutil.swap_memory()
    except (psutil.Error, OSError, RuntimeError, ValueError):
        return Memory(memory.total, (limit,))
    return Memory(memory.total, (limit,), swap_bytes=swap.total, swap_free_bytes=swap.free)


def _meminfo(root: Path) -> dict[str, int]:
    return _kib_fields(_read(root / "proc/meminfo") or "")


def _kib_fields(text: str) -> dict[str, int]:
    """ "Name:  123 kB" lines, in bytes."""
    found = re.findall(r"^(\w+):[ \t]*([0-9]{1,18}) kB[ \t]*$", text, re.MULTILINE | re.ASCII)
    return {name: int(value) << 10 for name, value in found}


def _free(root: Path, doubts: list[str]) -> tuple[int, int]:
    """Total and available bytes: psutil's `available`, which is MemAvailable, unless a container's lxcfs gives more
    than there is. Kernels before 3.14, and some containers, say MemFree only, which is never more."""
    info = _meminfo(root)
    total, available, free = (info.get(name) for name in ("MemTotal", "MemAvailable", "MemFree"))
    if not total:
        known = [each for each in (available, free) if each is not None]
        doubts.append("/proc/meminfo does not say how much memory there is, so that what is free cannot be believed")
        return 0, 0 if not known else min(known)
    believable = [each for each in (available, free) if each is not None and each <= total]
    if available is None or available > total:
        doubts.append(
            "/proc/meminfo says nothing believable of MemAvailable; "
            + ("MemFree stands for it, which is less" if believable else "nothing is taken to be free")
        )
        return total, believable[-1] if believable else 0
    return total, available


def _process_limits(root: Path, doubts: list[str]) -> Iterator[MemoryLimit]:
    """Resource limits that a trainer inherits. It is a new process, so all of a limit is left to it."""
    for line in (_read(root / "proc/self/limits") or "").splitlines():
        for prefix, name in _RLIMITS.items():
            if not line.startswith(prefix):
                continue
            soft = line[len(prefix) :].split()[:1]
            if soft and (number := _decimal(soft[0])) is not None:
                yield MemoryLimit(name, number, number)
            elif soft != ["unlimited"]:
                doubts.append(f"/proc/self/limits says nothing believable of {name}, which is left out")


@dataclass(frozen=True)
class _Mount:
    """A cgroup hierarchy: `root` of it is what `point` shows."""

    point: PurePosixPath
    root: PurePosixPath
    version: int


def _cgroup_limits(root: Path, doubts: list[str]) -> Iterator[MemoryLimit]:
    """The bound of every memory cgroup that we are in, from our own up to the hierarchy's root."""
    mounts = _mounts(root)
    unmounted = True
    memory_cgroups = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not path.startswith("/"):
            doubts.append(f"/proc/self/cgroup has a line that cannot be read, {quoted(line, 80)}, which is left out")
            continue
        version = 2 if hierarchy == "0" and not controllers else 1
        if version == 2 or "memory" in controllers.split(","):
            memory_cgroups.append(path)
            mount = _mount_of([each for each in mounts if each.version == version], PurePosixPath(path))
            if mount is not None:
                unmounted = False
                yield from _ancestors(root, mount, PurePosixPath(path), doubts)
    if memory_cgroups and unmounted:
        names = quoted(", ".join(memory_cgroups), 80)
        doubts.append(f"no cgroup hierarchy with memory is mounted here: limits of {names} are not known")


def _mount_of(mounts: list[_Mount], path: PurePosixPath) -> _Mount | None:
    """The mount that shows a cgroup and most of those above it. A container's own may show it under another path."""
    showing = [mount for mount in mounts if path.is_relative_to(mount.root)]
    return min(showing or mounts, key=lambda mount: len(mount.root.parts), default=None)


def _ancestors(root: Path, mount: _Mount, path: PurePosixPath, doubts: list[str]) -> Iterator[MemoryLimit]:
    # A container sees its own cgroup as the mount's root; a path outside of it cannot be followed.
    inside = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath(".")
    if ".." in inside.parts:
        inside = PurePosixPath(".")
    read = _limit_v2 if mount.version == 2 else _limit_v1
    for number, folder in enumerate((inside, *inside.parents)):
        shown = mount.point / folder
        limit = read(root / shown.relative_to("/"), printable(str(shown)), number == 0, doubts)
        if limit:
            yield limit


def _limit_v2(folder: Path, origin: str, _own: bool, doubts: list[str]) -> MemoryLimit | None:
    # Above memory.high the kernel throttles until work comes to a halt, so it bounds us like memory.max.
    bounds = [_bound(folder / name, doubts) for name in ("memory.max", "memory.high")]
    return _headroom(folder, origin, bounds, "memory.current", "inactive_file", doubts)


def _limit_v1(folder: Path, origin: str, own: bool, doubts: list[str]) -> MemoryLimit | None:
    # Without use_hierarchy, an ancestor's limit does not count what its children use.
    if not own and _number(folder / "memory.use_hierarchy") == 0:
        return None
    bounds = [_bound(folder / "memory.limit_in_bytes", doubts)]
    return _headroom(folder, origin, bounds, "memory.usage_in_bytes", "total_inactive_file", doubts)


def _bound(path: Path, doubts: list[str]) -> int | None:
    """A cgroup's limit; None if it has none, or none that can be believed."""
    text = _read(path)
    if text is None:
        if _exists(path):
            doubts.append(f"{_shown(path)} cannot be read, and is left out")
        return None
    text = text.strip()
    number = _decimal(text)
    if number is None and text not in ("max", "-1"):
        doubts.append(f"{_shown(path)} says {quoted(text, 40)}, which is not a limit, and is left out")
    return number


def _headroom(
    folder: Path, origin: str, bounds: list[int | None], usage: str, cached: str, doubts: list[str]
) -> MemoryLimit | None:
    """limit − (current − inactive_file): the kernel drops inactive file pages before it refuses memory."""
    finite = [bound for bound in bounds if bound is not None and bound < _UNLIMITED]
    if not finite:
        return None
    limit = min(finite)
    stat = dict(re.findall(r"^(\w+) ([0-9]{1,19})$", _read(folder / "memory.stat") or "", re.MULTILINE | re.ASCII))
    current = _number(folder / usage)
    if current is None:
        # All of it may be in use, and a budget must not be larger than what is there.
        doubts.append(
            f"{_shown(folder / usage)} cannot be read: what is used under that limit is not known, and nothing there "
            "is taken to be free"
        )
        return MemoryLimit(origin, 0, limit)
    used = max(0, current - min(current, int(stat.get(cached, 0))))
    return MemoryLimit(origin, max(0, limit - used), limit)


def _mounts(root: Path) -> list[_Mount]:
    """Mounted cgroup hierarchies that may hold the memory controller."""
    mounts = []
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, *source) = left.split(" "), right.split(" ") or [""]
        options = source[-1].split(",") if source else []
        if len(fields) > 4 and (kind == "cgroup2" or (kind == "cgroup" and "memory" in options)):
            point, top = PurePosixPath(_unescape(fields[4])), PurePosixPath(_unescape(fields[3]))
            if point.is_absolute() and ".." not in point.parts:
                mounts.append(_Mount(point, top, 2 if kind == "cgroup2" else 1))
    return mounts


def _unescape(text: str) -> str:
    """proc_pid_mountinfo(5): blanks and backslashes are written as octal numbers, byte by byte."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), text)


def _cuda(root: Path) -> tuple[str, ...]:
    """Discrete GPUs as NVIDIA's driver lists them; asking torch would cost hundreds of MiB."""
    names = []
    try:
        files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    except OSError:
        files = []
    for file in files:
        match = re.search(r"^Model:\s*(.+?)\s*$", _read(file) or "", re.MULTILINE)
        names.append(printable(match[1]) if match else "NVIDIA GPU")
    return tuple(names)


def _pressure(root: Path) -> Pressure | None:
    match = re.search(
        r"^some avg10=([0-9]{1,3}(?:\.[0-9]{1,9})?) avg60=([0-9]{1,3}(?:\.[0-9]{1,9})?) ",
        _read(root / "proc/pressure/memory") or "",
        re.MULTILINE,
    )
    return Pressure(float(match[1]), float(match[2])) if match else None


def _notes(root: Path, board: str, limits: list[MemoryLimit]) -> Iterator[str]:
    if _memory_cgroup_off(root):
        advice = (
            "; add cgroup_enable=memory to /boot/firmware/cmdline.txt and reboot" if "Raspberry Pi" in board else ""
        )
        yield f"the memory cgroup is off: limits of systemd and containers have no effect{advice}"
    if any(limit.origin == "RLIMIT_AS" for limit in limits):
        yield "RLIMIT_AS counts address space, of which torch takes far more than memory; prefer MemoryMax"


def _memory_cgroup_off(root: Path) -> bool:
    """Firmware of the Raspberry Pi adds cgroup_disable=memory; limits are then dropped without a word."""
    listed = re.search(r"^memory\s+\d+\s+\d+\s+(\d)", _read(root / "proc/cgroups") or "", re.MULTILINE)
    if listed:
        return listed[1] == "0"
    # Newer kernels leave v2-only controllers out of /proc/cgroups, so absence there proves nothing by itself.
    for mount in _mounts(root):
        point = root / mount.point.relative_to("/")
        if mount.version == 1 or "memory" in (_read(point / "cgroup.controllers") or "").split():
            return False
    return _exists(root / "proc/cgroups") or "cgroup_disable=memory" in (_read(root / "proc/cmdline") or "").split()


def _number(path: Path) -> int | None:
    return _decimal((_read(path) or "").strip())


def _decimal(text: str) -> int | None:
    """A number as the kernel writes it: what is longer than 64 bits take is none."""
    return int(text) if _DECIMAL.fullmatch(text) else None


def _shown(path: Path) -> str:
    return printable("/".join(path.parts[-2:]))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _read(path: Path) -> str | None:
    """The file's text; None where it is absent, forbidden, or the kernel answers that it is switched off."""
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", errors="surrogateescape")
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return None
