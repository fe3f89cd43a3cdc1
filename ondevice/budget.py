"""What a model's memory goes to, planned before anything of it is taken.

    mapped   the file is in the page cache, the rest is ours
    cached   matrices that every token reads are in private memory, experts in a pool that takes
             what is left of the budget

The larger of two is not always better: where the file fits into the budget it is mapped.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from ondevice.disk import SUPPORTED
from quant.cores import memory_in_use, memory_limit
from quant.errors import ResourceError, UsageError

PROGRAM = 330 << 20
"""The interpreter, its libraries and the machine code, once a model is open."""
SNAPSHOTS = 2
"""Copies of the delta memory at the same time: before a batch, and at the start of an answer."""
SHARE = 0.85
"""Of the memory that is free, what a model takes without being told."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes, whatever the budget."""

    file: int
    dense: int
    """Matrices outside expert stacks."""
    keys_and_values: int
    delta_memory: int
    buffers: int
    least_pool: int
    most_pool: int
    expert: int
    """An expert's place in the pool."""
    slice: int
    """What of it is read at once."""

    @property
    def working(self) -> int:
        """What is needed beside weights."""
        states = (1 + SNAPSHOTS) * self.delta_memory
        return PROGRAM + self.keys_and_values + states + self.buffers

    @property
    def mapped(self) -> int:
        """With the whole file in memory."""
        return self.file + self.working

    @property
    def least(self) -> int:
        """With the smallest pool that works."""
        return min(self.mapped, self.dense + self.working + self.least_pool)


@dataclass(frozen=True)
class Plan:
    """Where the bytes go; `pool` is 0 where the file is mapped."""

    needs: Needs
    budget: int
    pool: int

    @property
    def cached(self) -> bool:
        """Whether experts come from a pool."""
        return self.pool > 0

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.needs.dense + self.needs.working + self.pool if self.pool else self.needs.mapped

    def parts(self) -> dict[str, int]:
        """Name and bytes of every part."""
        needs = self.needs
        weights = {"dense": needs.dense, "pool": self.pool} if self.pool else {"file": needs.file}
        return {
            **weights,
            "keys_and_values": needs.keys_and_values,
            "delta_memory": needs.delta_memory,
            "snapshots": SNAPSHOTS * needs.delta_memory,
            "buffers": needs.buffers,
            "program": PROGRAM,
        }


def plan(needs: Needs, memory: int | None, path: Path) -> Plan:
    """Within `memory` bytes, or else what the machine has free; ResourceError if too little."""
    if memory is None:
        free = available()
        if free is None or needs.mapped <= free or not SUPPORTED:
            return Plan(needs, needs.mapped, 0)
        # rather slowly from disk than not at all
        budget = max(int(SHARE * free), needs.least)
    elif not isinstance(memory, int) or isinstance(memory, bool):
        raise UsageError(f"memory is {memory!r}; it must be a whole number of bytes")
    else:
        budget = memory
    least = needs.least if SUPPORTED else needs.mapped
    if budget < least:
        raise ResourceError(
            f"{path}: a memory budget of {budget:,} bytes is below the {least:,} that this "
            "model needs; a smaller context needs less"
        )
    if needs.mapped <= budget:
        return Plan(needs, budget, 0)
    pool = budget - needs.dense - needs.working
    return Plan(needs, budget, min(pool, needs.most_pool))


def available() -> int | None:
    """Bytes that this process may still take; None where nobody says."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = memory_limit(), memory_in_use()
    if limit is not None:
        found.append(limit - (used or 0))
    return min(found, default=None)
