"""How a model's experts are used: what is warmed at the next start, and what a pool would hold.

Four things are noted: while tokens are decoded one by one, what computing took (model.py) and what
the disk gave; of every token, which experts it used, and after how many tokens each was used again
(kernels/store.py), in buckets: BUCKETS counts of the intervals that ended in a use, and as many of
those that had not ended before the first use was seen, of which only a lower bound is known.

    S(t)  share of uses whose expert was last used more than t tokens ago: Kaplan and Meier's
          estimate from both counts (J. Am. Stat. Assoc. 53, 1958)
    F(w)  experts that w tokens use:  F(w + 1) = F(w) + u S(w), u uses a token
    a least-recently-used pool of C experts misses S(w), where F(w) = C
          (Denning and Schwartz, "Properties of the working-set model", CACM 15, 1972)

The file is one NumPy archive without pickles, read with suspicion: one that is damaged, foreign or
of another model counts as none, and one that cannot be written is not.
"""

import contextlib
import hashlib
import secrets
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ondevice.config import Config
from ondevice.gguf_file import GGUFFile
from ondevice.kernels.team import MOST_THREADS
from quant.folders import cache_root, private_folder
from quant.format import Array

BUCKETS = 64
ENOUGH = 2000
"""Uses in each layer from which on what was noted is better than what was published."""
PUBLISHED = (
    (0.0, 0.0),
    (0.03125, 0.406),
    (0.0625, 0.538),
    (0.125, 0.67),
    (0.25, 0.81),
    (1.0, 1.0),
)
"""Share of the experts that a pool holds, share of uses that find theirs: traces of a model of 512
experts and 10 used, as llama.cpp's pull request 27861 and colibri's notes report them. That
of 1/32 is not theirs: it goes on as they do, who lose 0.13 when the share is halved."""
BY_TRACES = "by published traces"
FADING = 0.5
"""What earlier runs' uses count for, beside those of the last one."""
ENOUGH_BYTES = 2 << 30
"""From which on it says something how fast the disk was."""
ENOUGH_TOKENS = 40
LARGEST = 64 << 20
_FIELDS = ("uses", "ended", "open", "disk", "computing")


@dataclass
class Usage:
    """Counts of one model; all arrays are written to by the readers' store."""

    uses: Array
    """(layers, experts) int64; layers that guess ahead are the last ones, whether used or not."""
    ended: Array
    """(BUCKETS,) int64: intervals between two uses."""
    open: Array
    """(BUCKETS,) int64: intervals that are at least so long."""
    disk: Array = field(default_factory=lambda: np.zeros(2, np.int64))
    """Bytes that came from disk, and the nanoseconds that readers, one by one, took for them."""
    computing: Array = field(default_factory=lambda: np.zeros((MOST_THREADS + 1, 2), np.int64))
    """For each number of threads: tokens, and the nanoseconds that passed without waiting."""

    @classmethod
    def none(cls, config: Config) -> "Usage":
        """Nothing noted yet."""
        shape = (config.layers + config.mtp_layers, config.experts)
        return cls(*(np.zeros(size, np.int64) for size in (shape, BUCKETS, BUCKETS)))

    def by_use(self) -> list[tuple[int, int]]:
        """(layer, expert) of those that were used, the most used first."""
        flat = self.uses.reshape(-1)
        order = np.argsort(flat, kind="stable")[::-1][: np.count_nonzero(flat)]
        layers, experts = np.divmod(order, self.uses.shape[1])
        return list(zip(layers.tolist(), experts.tolist(), strict=True))

    @property
    def source(self) -> str:
        """Where `hit_rate` comes from."""
        return "by this model's last runs" if self.known else BY_TRACES

    @property
    def known(self) -> bool:
        """Whether enough was noted to tell how often experts come back."""
        return bool(self.ended.sum() + self.open.sum() >= ENOUGH * len(self.uses))

    @property
    def bytes_per_reading_second(self) -> float | None:
        """What one of the readers got from the disk; None while little was read."""
        nbytes, nanoseconds = map(int, self.disk)
        return 1e9 * nbytes / nanoseconds if nbytes >= ENOUGH_BYTES and nanoseconds else None

    def note_computing(self, threads: int, tokens: int, seconds: float) -> None:
        """Count what tokens took, but for waiting."""
        if tokens > 0 and seconds > 0:
            self.computing[threads] += tokens, int(1e9 * seconds)

    def computing_seconds(self, threads: int) -> float | None:
        """Of a token, on so many threads; None while there were few."""
        tokens, nanoseconds = map(int, self.computing[threads])
        return 1e-9 * nanoseconds / tokens if tokens >= ENOUGH_TOKENS else None

    def hit_rate(self, experts: int, uses_per_token: int) -> float:
        """Of the uses, those that find their expert in a pool of so many."""
        total = int(self.uses.size)
        if experts >= total:
            return 1.0
        if not self.known:
            shares, rates = zip(*PUBLISHED, strict=True)
            return float(np.interp(experts / total, shares, rates))
        ended, unknown = self.ended.astype(float), self.open.astype(float)
        at_risk = np.cumsum((ended + unknown)[::-1])[::-1]
        survive = np.cumprod(1 - ended / np.maximum(at_risk, 1))
        mean = np.concatenate([[1.0], (survive[:-1] + survive[1:]) / 2])
        lengths = np.diff(bucket_starts())
        held = np.cumsum(uses_per_token * mean * lengths)
        # of a bucket's intervals half are shorter than its middle one
        middle = held - uses_per_token * mean * np.maximum(lengths - 1, 0) / 2
        # what one token uses pushes out everything of the token before it
        sizes = [0.9 * held[0], held[0], *middle[2:]]
        missed = np.interp(experts, sizes, [1.0, survive[0], *mean[2:]])
        return 1 - float(missed)


def bucket_starts() -> Array:
    """(BUCKETS + 1,) tokens from which on an interval is in a bucket: 1, 2, 2, 3, 4, 6, 8, 12."""
    half = np.arange(2, BUCKETS + 1)
    return np.concatenate([[1.0, 2.0], (2 + half % 2) * 2.0 ** (half // 2 - 1)])


def identity(file: GGUFFile, config: Config) -> str:
    """Tells models apart by their sizes and by the first layer's router."""
    router = file.tensors["blk.0.ffn_gate_inp.weight"]
    text = f"{config} {file.nbytes} {sorted(file.tensors)}"
    return hashlib.sha256(text.encode() + router.data.tobytes()).hexdigest()[:24]


def profile_path(name: str) -> Path:
    """Where the counts of a model of that identity are kept."""
    return cache_root() / "usage" / f"{name}.npz"


def load(name: str, config: Config) -> Usage:
    """What was kept of earlier runs; nothing if there is nothing sound."""
    usage = Usage.none(config)
    with contextlib.suppress(
        OSError, RuntimeError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    ):
        path = profile_path(name)
        if path.stat().st_size > LARGEST:
            return usage
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = [archive[name] for name in _FIELDS]
        for array, name in zip(found, _FIELDS, strict=True):
            like = getattr(usage, name)
            if array.dtype != like.dtype or array.shape != like.shape or (array < 0).any():
                return usage
        return Usage(*found)
    return usage


def save(name: str, before: Usage, during: Usage) -> None:
    """Keep the counts of a run beside those of earlier ones; silently not where nothing can be."""
    if not during.ended.any():
        return
    with contextlib.suppress(OSError, RuntimeError):
        path = profile_path(name)
        if not private_folder(path.parent):
            return
        counts = {
            name: (getattr(before, name) * FADING).astype(np.int64) + getattr(during, name)
            for name in _FIELDS
        }
        if during.bytes_per_reading_second is not None:
            counts["disk"] = during.disk  # what a disk gives for the first time it gives once
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with temporary.open("xb") as file:
                np.savez(file, **counts)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
