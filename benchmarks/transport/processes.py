"""What processes and their children take: processor time and memory, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def tree(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and all that they have started, as far as they are alive."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                found[each.pid] = each
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def processor_seconds(pids: Iterable[int]) -> float:
    """Of these processes and what they have started; children that have ended count where their parents have waited
    for them."""
    total = 0.0
    for process in tree(pids):
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def resident_bytes(processes: Iterable[psutil.Process]) -> int:
    """Resident memory of these processes, added up."""
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
