"""Trees below are reconstructed from documentation and were NEVER RUN ON HARDWARE, unless a test says so.

Sources: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst (file names and formats),
filesystems/proc.rst (meminfo, limits, cgroups), accounting/psi.rst, proc_pid_mountinfo(5); NVIDIA Jetson
Linux Developer Guide (device tree model, /etc/nv_tegra_release); Raspberry Pi documentation, "Kernel command
line" (cgroup_disable=memory, set by the firmware); NVIDIA driver README (gpus/*/information).
"""

import sys
from pathlib import Path

import pytest

from edge_client.config import MemoryConfig
from edge_client.memory.probe import Memory, anonymous_bytes, budget_from, measure
from fedepth.budget import MemoryLimit

MIB = 1 << 20
MEMINFO = (
    "MemTotal: 4096000 kB\nMemFree: 1024000 kB\nMemAvailable: 2048000 kB\nSwapTotal: 512000 kB\nSwapFree: 256000 kB\n"
)
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def found(root: Path) -> dict[str, tuple[int, int]]:
    return {limit.origin: (limit.available_bytes, limit.limit_bytes) for limit in measure(root).limits}


def test_plain_memory_without_swap(tmp_path: Path) -> None:
    memory = measure(tree(tmp_path, {"proc/pressure/memory": "some avg10=1.50 avg60=0.25 avg300=0.00 total=7\n"}))
    assert memory.available_bytes == 2048000 << 10
    assert memory.total_bytes == 4096000 << 10
    assert (memory.swap_bytes, memory.swap_free_bytes) == (512000 << 10, 256000 << 10)
    assert memory.pressure is not None
    assert (memory.pressure.some_10_s, memory.pressure.some_60_s) == (1.5, 0.25)


def test_more_available_than_there_is_falls_back_to_free(tmp_path: Path) -> None:
    lying = MEMINFO.replace("MemAvailable: 2048000", "MemAvailable: 9048000")
    assert measure(tree(tmp_path, {"proc/meminfo": lying})).available_bytes == 1024000 << 10


def test_every_v2_ancestor_counts_and_inactive_file_is_free(tmp_path: Path) -> None:
    slices = "sys/fs/cgroup/system.slice"
    files = {
        "proc/self/cgroup": "0::/system.slice/fedepth.service\n",
        "proc/self/mountinfo": V2_MOUNT,
        f"{slices}/fedepth.service/memory.max": "max\n",
        f"{slices}/fedepth.service/memory.high": f"{600 * MIB}\n",
        f"{slices}/fedepth.service/memory.current": f"{100 * MIB}\n",
        f"{slices}/fedepth.service/memory.stat": f"inactive_file {40 * MIB}\nactive_file 9\n",
        f"{slices}/memory.max": f"{500 * MIB}\n",
        f"{slices}/memory.current": f"{200 * MIB}\n",
        f"{slices}/memory.stat": f"inactive_file {50 * MIB}\n",
    }
    root = tree(tmp_path, files)
    assert found(root) == {
        "MemAvailable": (2048000 << 10, 4096000 << 10),
        "/sys/fs/cgroup/system.slice/fedepth.service": (540 * MIB, 600 * MIB),
        "/sys/fs/cgroup/system.slice": (350 * MIB, 500 * MIB),
    }
    assert measure(root).available_bytes == 350 * MIB


@pytest.mark.parametrize(("hierarchy", "expected"), [("1", {"/a/b": 60, "/a": 30}), ("0", {"/a/b": 60})])
def test_v1_limits_and_ancestors_only_with_use_hierarchy(
    tmp_path: Path, hierarchy: str, expected: dict[str, int]
) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "4:memory:/a/b\n1:cpu:/elsewhere\n0::/\n",
        "proc/self/mountinfo": V1_MOUNT,
        f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
        f"{base}/a/memory.limit_in_bytes": f"{90 * MIB}\n",
        f"{base}/a/memory.usage_in_bytes": f"{70 * MIB}\n",
        f"{base}/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {10 * MIB}\n",
        f"{base}/a/memory.use_hierarchy": f"{hierarchy}\n",
        f"{base}/a/b/memory.limit_in_bytes": f"{100 * MIB}\n",
        f"{base}/a/b/memory.usage_in_bytes": f"{40 * MIB}\n",
    }
    limits = found(tree(tmp_path, files))
    del limits["MemAvailable"]
    assert {name.removeprefix("/sys/fs/cgroup/memory"): left // MIB for name, (left, _) in limits.items()} == expected


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../../other"])
def test_a_container_sees_its_own_cgroup_as_the_mounts_root(tmp_path: Path, path: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNT.replace(" / /sys", " /docker/abc /sys") if "docker" in path else V2_MOUNT,
        "sys/fs/cgroup/memory.max": f"{256 * MIB}\n",
        "sys/fs/cgroup/memory.current": f"{56 * MIB}\n",
    }
    assert found(tree(tmp_path, files))["/sys/fs/cgroup"] == (200 * MIB, 256 * MIB)


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/my\\040cgroups"),
        "my cgroups/memory.max": "4096\n",
        "my cgroups/memory.current": "96\n",
    }
    assert found(tree(tmp_path, files))["/my cgroups"] == (4000, 4096)


def test_use_over_the_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/memory.max": "4096\n",
        "sys/fs/cgroup/memory.current": "8192\n",
    }
    assert measure(tree(tmp_path, files)).available_bytes == 0


def test_process_limits_count_whole(tmp_path: Path) -> None:
    text = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max data size             {700 * MIB}            unlimited            bytes     \n"
        "Max address space         unlimited            unlimited            bytes     \n"
    )
    assert found(tree(tmp_path, {"proc/self/limits": text}))["RLIMIT_DATA"] == (700 * MIB, 700 * MIB)


def test_an_address_space_limit_comes_with_a_note(tmp_path: Path) -> None:
    memory = measure(tree(tmp_path, {"proc/self/limits": "Max address space  1073741824  unlimited  bytes\n"}))
    assert memory.available_bytes == 1 << 30
    assert any("RLIMIT_AS" in note for note in memory.notes)


def test_a_jetson_shares_its_memory_with_the_gpu(tmp_path: Path) -> None:
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
    memory = measure(tree(tmp_path, {"proc/device-tree/model": model}))
    assert memory.unified
    assert memory.board == model[:-1]
    assert memory.cuda == ()


def test_a_jetson_is_known_by_its_release_file(tmp_path: Path) -> None:
    assert measure(tree(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.0\n"})).unified


PI = {"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"}
CGROUPS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t70\t1\n"


@pytest.mark.parametrize(
    ("files", "off"),
    [
        ({"proc/cgroups": CGROUPS + "memory\t0\t70\t0\n"}, True),
        ({"proc/cgroups": CGROUPS}, True),
        ({"proc/cmdline": "console=tty1 cgroup_disable=memory rootwait\n"}, True),
        # The operator's enable comes after the firmware's disable and wins; the kernel's table says so.
        (
            {
                "proc/cmdline": "cgroup_disable=memory cgroup_enable=memory\n",
                "proc/cgroups": CGROUPS + "memory\t0\t70\t1\n",
            },
            False,
        ),
        # A kernel that lists only v1 controllers there, with memory on under v2.
        (
            {
                "proc/cgroups": CGROUPS,
                "proc/self/mountinfo": V2_MOUNT,
                "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
            },
            False,
        ),
    ],
)
def test_a_pi_without_its_memory_cgroup_is_told(tmp_path: Path, files: dict[str, str], off: bool) -> None:
    memory = measure(tree(tmp_path, PI | files))
    assert any("the memory cgroup is off" in note and "cgroup_enable=memory" in note for note in memory.notes) is off


def test_a_discrete_gpu_is_seen_without_torch(tmp_path: Path) -> None:
    files = {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 3060\nIRQ: 1\n"}
    memory = measure(tree(tmp_path, files))
    assert memory.cuda == ("NVIDIA GeForce RTX 3060",)
    assert not memory.unified


def test_this_machine_can_be_measured() -> None:
    memory = measure()
    assert 0 < memory.available_bytes <= memory.total_bytes


def test_anonymous_memory_of_a_process(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/7/status": "Name:\tpython\nVmRSS:\t  900 kB\nRssAnon:\t  300 kB\n"})
    assert anonymous_bytes(7, tmp_path) == 300 << 10
    assert anonymous_bytes(8, tmp_path) == 0


MEMORY = Memory(
    1000 * MIB,
    (
        MemoryLimit("MemAvailable", 800 * MIB, 1000 * MIB),
        MemoryLimit("/sys/fs/cgroup/x", 500 * MIB, 600 * MIB),
    ),
)


def test_the_budget_is_the_formula() -> None:
    budget = budget_from(MEMORY, 200 * MIB, MemoryConfig(reserve="64MiB", fraction=0.9))
    assert budget.available_bytes == 500 * MIB
    assert budget.budget_bytes == 186 * MIB  # 500 · 0.9 − 64 − 200


def test_the_cap_bounds_the_budget() -> None:
    assert budget_from(MEMORY, 200 * MIB, MemoryConfig(cap="100MiB")).budget_bytes == 100 * MIB
    assert budget_from(MEMORY, 200 * MIB, MemoryConfig(cap="300MiB")).budget_bytes == 186 * MIB


def test_the_budget_is_never_negative() -> None:
    assert budget_from(MEMORY, 900 * MIB, MemoryConfig()).budget_bytes == 0


def test_what_the_trainer_holds_counts_as_free_up_to_the_limit() -> None:
    config = MemoryConfig(reserve=0, fraction=1.0)
    assert budget_from(MEMORY, 200 * MIB, config, held_bytes=50 * MIB).budget_bytes == 350 * MIB
    assert budget_from(MEMORY, 200 * MIB, config, held_bytes=400 * MIB).available_bytes == 600 * MIB


def test_a_process_limit_does_not_grow_with_what_is_held() -> None:
    memory = Memory(1000 * MIB, (MemoryLimit("RLIMIT_DATA", 300 * MIB, 700 * MIB),))
    assert budget_from(memory, 0, MemoryConfig(), held_bytes=100 * MIB).available_bytes == 300 * MIB
