"""How fast a model will write on this machine under a memory budget, from what limits it.

    computing   what it took in earlier runs on as many threads, or else
                (weights, state and keys and values of a token) / read bandwidth / COMPUTING
    disk        uses of experts a token x share not in the pool x bytes x (1 + WRONG)
                / the disk's bandwidth, see `disk_rate`
    a token     (computing^OVERLAP + disk^OVERLAP)^(1/OVERLAP): the two overlap, less so where
                neither has slack

The share that is not in the pool comes from what was noted of this model's earlier runs, or else
from published traces (ondevice/usage.py). The speed is that of decoding that goes on: first reads
of a network disk, and a pool that is still empty, are slower.
"""

from dataclasses import dataclass

from ondevice.budget import Plan
from ondevice.usage import Usage

COMPUTING = 0.88
"""Of the read bandwidth, what decoding reaches (docs/benchmarks.md)."""
WRONG = 0.1
"""Experts that are read on a wrong guess, of those that are not in the pool; 0.02 to 0.18 in five
cases (docs/log.md, as what is below)."""
OVERLAP = 1.75
"""1: one after the other; infinity: only the longer one. Fitted to seven cases, within 7 %."""
MATTERS = 0.2
"""Share of the time from which on waiting for the disk is what limits the speed."""


@dataclass(frozen=True)
class Forecast:
    """What a token takes."""

    computing: float
    """Seconds."""
    disk: float
    """Seconds that the disk needs."""
    hit_rate: float
    disk_bytes: float

    @property
    def seconds(self) -> float:
        """Of a token, all in all."""
        return float((self.computing**OVERLAP + self.disk**OVERLAP) ** (1 / OVERLAP))

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds


def forecast(
    plan: Plan,
    usage: Usage,
    uses_per_token: int,
    token_bytes: int,
    read_bandwidth: float,
    disk_bandwidth: float,
    noted: float | None = None,
) -> Forecast:
    """What a token of `token_bytes` takes; bandwidths in bytes per second.

    `noted`: seconds that computing took in earlier runs.
    """
    computing = noted or token_bytes / read_bandwidth / COMPUTING
    if not plan.cached:
        return Forecast(computing, 0.0, 1.0, 0.0)
    hits = usage.hit_rate(plan.pool // plan.needs.expert, uses_per_token)
    disk_bytes = uses_per_token * (1 - hits) * plan.needs.expert * (1 + WRONG)
    return Forecast(computing, disk_bytes / disk_bandwidth, hits, disk_bytes)


def disk_rate(probed: float, noted: float | None) -> float:
    """Bytes per second that readers will get: from a probe and from what earlier runs got.

    The probe knows how the disk is now, the runs what decoding gets; disks that others use as well
    differ by a fifth from minute to minute, so neither is enough.
    """
    return probed if noted is None else (probed * noted) ** 0.5


def what_limits(plan: Plan, hit_rate: float, waiting: float) -> str:
    """One sentence on what bounds the speed and what would help.

    `waiting` is the share of the time in which threads waited for the disk.
    """
    if not plan.cached:
        return "the memory's bandwidth limits the speed; the whole model is in memory"
    if waiting < MATTERS:
        return (
            f"the memory's bandwidth limits the speed; {hit_rate:.0%} of the experts were in memory"
        )
    return (
        f"the disk limits the speed, waiting for it takes {waiting:.0%} of the time; more than "
        f"{plan.budget / (1 << 30):.3g}G of --memory or a faster disk would help"
    )
