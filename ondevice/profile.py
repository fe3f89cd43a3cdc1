"""Where the time of a program goes, per kind of operation.

While a program runs, each thread notes for every operation the nanoseconds that it worked on it and
those that it waited before it got a task of it (kernels/team.py). Of several runs the one that took
the median time is told of: where others use the machine too, one thread waits for another now and
then, which says nothing about the program. With t threads, in seconds of a token:

    work      thread time in the operation's tasks / t
    wait      thread time without a task before one of this operation's / t
    step      work + wait of all operations, which is the time that passes
    serial    time that passes in operations of one task, while the other threads can only wait
    barrier   waiting that they do not explain: wait of all operations - (t - 1) / t * serial

so serial and barrier together are the part of a step in which more threads do not help. Times of
a chain are those of all its operations; its name lists them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ondevice.kernels import layout
from ondevice.program import Operations
from quant.format import Array

DENSE = ("linear", "shared")
EXPERTS = ("expert gate_up", "expert down")
"""How the names of products with dense matrices and with experts begin."""


@dataclass
class Kind:
    """All operations of one name; seconds are those of a run."""

    name: str
    serial: bool
    operations: int = 0
    work: float = 0.0
    wait: float = 0.0


@dataclass
class Profile:
    """Of runs of `operations` on `threads` threads, each `tokens`, `count` at a time."""

    operations: Operations
    threads: int
    count: int
    tokens: int
    runs: list[Array] = field(default_factory=list, init=False)
    """(threads, operations, 2) int64 nanoseconds of each run."""

    @contextmanager
    def run(self) -> Iterator[Array]:
        """What a run's times are to be added to."""
        times = self._nothing()
        yield times
        self.runs.append(times)

    @property
    def times(self) -> Array:
        """Of the run that took the median time, the shorter one of two."""
        ordered = sorted(self.runs, key=lambda times: int(times.sum()))
        return ordered[(len(ordered) - 1) // 2] if ordered else self._nothing()

    def _nothing(self) -> Array:
        return np.zeros((self.threads, len(self.operations.labels), 2), np.int64)

    def kinds(self) -> list[Kind]:
        """Every kind of operation, those that take longest first."""
        found: dict[tuple[str, bool], Kind] = {}
        times = self.times.sum(0) / (1e9 * self.threads)
        for chain, serial in self._chains():
            name = " + ".join(self.operations.labels[i] for i in chain)
            kind = found.setdefault((name, serial), Kind(name, serial))
            kind.operations += 1
            kind.work += times[chain[0], 0]
            kind.wait += times[chain[0], 1]
        return sorted(found.values(), key=lambda kind: -kind.work - kind.wait)

    def seconds(self, *names: str) -> float:
        """Work on the kinds whose names begin so; on all kinds if none is given."""
        return sum(kind.work for kind in self.kinds() if kind.name.startswith(names or ("",)))

    def summary(self) -> dict[str, object]:
        """Per token, ready for JSON: the step, its serial and barrier parts, and every kind."""
        kinds = self.kinds()
        each = 1 / self.tokens
        step = sum(kind.work + kind.wait for kind in kinds) or 1.0
        wait = sum(kind.wait for kind in kinds)
        others = self.threads - 1
        serial = self.threads * sum(kind.work for kind in kinds if kind.serial) if others else 0.0
        barrier = max(0.0, wait - others / self.threads * serial)
        return {
            "tokens": self.tokens,
            "seconds_per_token": step * each,
            "serial_fraction": serial / step,
            "barrier_fraction": barrier / step,
            "operations": [
                {
                    "name": kind.name,
                    "operations": kind.operations,
                    "serial": kind.serial,
                    "seconds": kind.work * each,
                    "wait_seconds": kind.wait * each,
                    "fraction": (kind.work + kind.wait) / step,
                }
                for kind in kinds
            ],
        }

    def _chains(self) -> list[tuple[list[int], bool]]:
        """Indices of each chain's operations, and whether it is one task alone in its group."""
        records = self.operations.records
        result: list[tuple[list[int], bool]] = []
        group: list[list[int]] = []
        index = 0
        while index < len(records):
            chain = [index]
            while records[index, layout.THEN] == layout.CHAIN:
                index += 1
                chain.append(index)
            group.append(chain)
            if records[index, layout.THEN] == layout.BARRIER:
                alone = len(group) == 1 and self._tasks(records[chain[0]]) == 1
                result += [(member, alone) for member in group]
                group = []
            index += 1
        return result

    def _tasks(self, record: Array) -> int:
        few = record[layout.FEW_TASKS] and self.count <= layout.FEW
        tasks = int(record[layout.FEW_TASKS if few else layout.TASKS])
        if record[layout.PER_TOKEN]:
            tasks *= self.count
        return tasks if not record[layout.TIMES] else max(2, tasks)  # several experts


def table(summary: dict[str, object], title: str) -> str:
    """A summary as lines to read, in microseconds per token."""
    operations = summary["operations"]
    assert isinstance(operations, list)
    width = max(len(title), *(len(entry["name"]) for entry in operations))
    lines = [f"{title:{width}}  {'times':>5} {'work us':>10} {'wait us':>9} {'share':>6}"]
    for entry in operations:
        mark = "  serial" if entry["serial"] else ""
        lines.append(
            f"{entry['name']:{width}}  {entry['operations']:5} {1e6 * entry['seconds']:10.1f} "
            f"{1e6 * entry['wait_seconds']:9.1f} {entry['fraction']:6.1%}{mark}"
        )
    work = sum(entry["seconds"] for entry in operations)
    wait = sum(entry["wait_seconds"] for entry in operations)
    count = sum(entry["operations"] for entry in operations)
    lines += [
        f"{'together':{width}}  {count:5} {1e6 * work:10.1f} {1e6 * wait:9.1f}",
        f"barriers {summary['barrier_fraction']:.1%} and serial operations "
        f"{summary['serial_fraction']:.1%} of the time",
    ]
    return "\n".join(lines)
