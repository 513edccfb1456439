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

# cgroup v1 writes "no limit" as the largest multiple of a page in a signed 64-bit number.
_UNLIMITED = 1 << 60
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
    """Reads everything anew; takes about a millisecond."""
    if not sys.platform.startswith("linux"):
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        limit = MemoryLimit("psutil", memory.available, memory.total)
        return Memory(memory.total, (limit,), swap_bytes=swap.total, swap_free_bytes=swap.free)
    info = _meminfo(root)
    limits = [
        MemoryLimit("MemAvailable", _available(info), info["MemTotal"]),
        *_cgroup_limits(root),
        *_process_limits(root),
    ]
    board = (_read(root / "proc/device-tree/model") or "").strip("\0 \n")
    jetson = "jetson" in board.lower() or (root / "etc/nv_tegra_release").exists()
    return Memory(
        total_bytes=info["MemTotal"],
        limits=tuple(limits),
        swap_bytes=info.get("SwapTotal", 0),
        swap_free_bytes=info.get("SwapFree", 0),
        board=board or ("NVIDIA Jetson" if jetson else ""),
        unified=jetson,
        cuda=_cuda(root),
        pressure=_pressure(root),
        notes=tuple(_notes(root, board, limits)),
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


def _meminfo(root: Path) -> dict[str, int]:
    return _kib_fields((root / "proc/meminfo").read_text())


def _kib_fields(text: str) -> dict[str, int]:
    """ "Name:  123 kB" lines, in bytes."""
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _available(info: dict[str, int]) -> int:
    """psutil's `available`: MemAvailable, unless a container's lxcfs gives more than there is."""
    available = info.get("MemAvailable", info["MemFree"])
    return available if available <= info["MemTotal"] else info["MemFree"]


def _process_limits(root: Path) -> Iterator[MemoryLimit]:
    """Resource limits that a trainer inherits. It is a new process, so all of a limit is left to it."""
    for line in (_read(root / "proc/self/limits") or "").splitlines():
        for prefix, name in _RLIMITS.items():
            if line.startswith(prefix):
                soft = line[len(prefix) :].split()[0]
                if soft != "unlimited":
                    yield MemoryLimit(name, int(soft), int(soft))


@dataclass(frozen=True)
class _Mount:
    """A cgroup hierarchy: `root` of it is what `point` shows."""

    point: PurePosixPath
    root: PurePosixPath
    version: int


def _cgroup_limits(root: Path) -> Iterator[MemoryLimit]:
    """The bound of every memory cgroup that we are in, from our own up to the hierarchy's root."""
    mounts = _mounts(root)
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        version = 2 if hierarchy == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.version == version:
                yield from _ancestors(root, mount, PurePosixPath(path))
                break


def _ancestors(root: Path, mount: _Mount, path: PurePosixPath) -> Iterator[MemoryLimit]:
    # A container sees its own cgroup as the mount's root; a path outside of it cannot be followed.
    inside = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath(".")
    if ".." in inside.parts:
        inside = PurePosixPath(".")
    read = _limit_v2 if mount.version == 2 else _limit_v1
    for number, folder in enumerate((inside, *inside.parents)):
        shown = mount.point / folder
        limit = read(root / shown.relative_to("/"), str(shown), number == 0)
        if limit:
            yield limit


def _limit_v2(folder: Path, origin: str, _own: bool) -> MemoryLimit | None:
    # Above memory.high the kernel throttles until work comes to a halt, so it bounds us like memory.max.
    bounds = [_number(folder / name) for name in ("memory.max", "memory.high")]
    return _headroom(folder, origin, bounds, "memory.current", "inactive_file")


def _limit_v1(folder: Path, origin: str, own: bool) -> MemoryLimit | None:
    # Without use_hierarchy, an ancestor's limit does not count what its children use.
    if not own and _number(folder / "memory.use_hierarchy") == 0:
        return None
    bounds = [_number(folder / "memory.limit_in_bytes")]
    return _headroom(folder, origin, bounds, "memory.usage_in_bytes", "total_inactive_file")


def _headroom(folder: Path, origin: str, bounds: list[int | None], usage: str, cached: str) -> MemoryLimit | None:
    """limit − (current − inactive_file): the kernel drops inactive file pages before it refuses memory."""
    finite = [bound for bound in bounds if bound is not None and bound < _UNLIMITED]
    if not finite:
        return None
    limit = min(finite)
    stat = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE))
    used = max(0, (_number(folder / usage) or 0) - int(stat.get(cached, 0)))
    return MemoryLimit(origin, max(0, limit - used), limit)


def _mounts(root: Path) -> list[_Mount]:
    """Mounted cgroup hierarchies that may hold the memory controller."""
    mounts = []
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            point, top = PurePosixPath(_unescape(fields[4])), PurePosixPath(_unescape(fields[3]))
            mounts.append(_Mount(point, top, 2 if kind == "cgroup2" else 1))
    return mounts


def _unescape(text: str) -> str:
    """proc_pid_mountinfo(5): blanks and backslashes are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _cuda(root: Path) -> tuple[str, ...]:
    """Discrete GPUs as NVIDIA's driver lists them; asking torch would cost hundreds of MiB."""
    names = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+?)\s*$", _read(file) or "", re.MULTILINE)
        names.append(match[1] if match else "NVIDIA GPU")
    return tuple(names)


def _pressure(root: Path) -> Pressure | None:
    match = re.search(r"^some avg10=([\d.]+) avg60=([\d.]+)", _read(root / "proc/pressure/memory") or "", re.MULTILINE)
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
    return (root / "proc/cgroups").exists() or "cgroup_disable=memory" in (_read(root / "proc/cmdline") or "").split()


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str | None:
    """The file's text; None where it is absent, forbidden, or the kernel answers that it is switched off."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
