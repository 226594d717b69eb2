"""Clocks and memory of other processes, as Linux tells them."""

import os
import resource
import time
from functools import cache
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process with its threads and living children, to the nanosecond.

    The clock's id is what clock_getcpuclockid(3) computes.
    """
    return sum(time.clock_gettime(~process << 3 | 2) for process in family(pid))


def waited_s(pid: int) -> float:
    """Seconds in which a process could have run, but its core ran others.

    Source: https://docs.kernel.org/scheduler/sched-stats.html#proc-pid-schedstat
    """
    files = [file for process in family(pid) for file in Path(f"/proc/{process}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[1]) for file in files) / 1e9


def rss_kib(pid: int) -> int:
    """Resident memory. VmRSS of /proc/PID/status would lag behind by some pages a thread."""
    lines = [line for process in family(pid) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def raise_file_limit() -> int:
    """Lets this process and its children open as many files as the hard limit allows; how many that is."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


@cache
def cores() -> tuple[set[int], set[int]]:
    """The core of the gateway, and those of everything else; the same one where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return {usable[-1]}, set(usable[:-1] or usable)
