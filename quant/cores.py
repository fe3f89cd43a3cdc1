"""How many processors this process may use: its affinity, and what a container grants it."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""Version 1 spells "no limit" as the largest number of whole pages."""


def cores() -> int:
    """Threads that can really run at once; at least 1."""
    quota = cpu_quota()
    return min(affinity(), math.ceil(quota)) if quota else affinity()


def affinity() -> int:
    """Processors that the operating system may run this process on."""
    ask = getattr(os, "sched_getaffinity", None)
    return len(ask(0)) if ask else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Processors' worth of time that a container grants; None: as much as there is."""
    quotas = []
    for text in group_files("cpu.max"):
        quota, period = text.split()
        if quota != "max":
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes of memory that a container grants; None: as much as there is."""
    limits = [int(text) for text in group_files("memory.max") if text.strip() != "max"]
    limits += [int(text) for text in group_files("memory.limit_in_bytes", "memory")]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def memory_in_use() -> int | None:
    """Bytes that the container has taken, without files that it would give up; None: unknown."""
    for text in group_files("memory.stat"):
        fields = dict(line.split() for line in text.splitlines())
        return int(fields["anon"]) + int(fields.get("kernel", 0)) + int(fields.get("shmem", 0))
    for text in group_files("memory.stat", "memory"):
        fields = dict(line.split() for line in text.splitlines())
        return int(fields["total_rss"]) + int(fields.get("total_shmem", 0))
    return None


def group_files(name: str, controller: str = "") -> Iterator[str]:
    """A file of this process's control group and of every group around it.

    Version 2 has one tree of groups; version 1 has one for each `controller`.
    """
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
        owns = [
            own
            for number, controllers, own in lines
            if (controller in controllers.split(",") if controller else number == "0")
        ]
        top = CGROUPS / controller
        group = top / (owns[0] if owns else "/").lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError):
                    yield (folder / name).read_text()
