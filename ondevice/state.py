"""What a model remembers between tokens: the only thing that changes while it runs.

    memory    per DeltaNet layer, the convolution's window and the delta memory, all f32
    cache     per attention layer, keys and values (layout: kernels/cache.py)
    position  tokens taken in so far

The cache is reserved for the whole context and costs real memory only as positions fill it. The
delta memory cannot be cut back to an earlier position: going back means restoring a `Snapshot`,
while keys and values beyond a restored position are simply overwritten.

Tokens that were only guessed are another matter: the last few taken in may be *pending*. The memory
stays before them, the journal keeps what they brought, and the next step runs them first
(kernels/delta.py). `take_back` forgets them at no cost; `settle` makes them part of the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ondevice.config import Config
from ondevice.kernels.attention import CACHES
from ondevice.kernels.cache import TILE, head_width
from ondevice.layers import deltanet
from ondevice.program import zeros
from quant.errors import ResourceError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.speculate import Prediction


@dataclass(frozen=True)
class Snapshot:
    """The memory at a position."""

    memory: Array
    position: int


class State:
    """A sequence's memory, with room for `context` tokens; kv: how keys and values are kept."""

    def __init__(self, config: Config, context: int, kv: str = "i12") -> None:
        self.capacity = -(-context // TILE) * TILE
        try:
            self.memory = zeros(memory_bytes(config))
            self.cache = zeros(cache_bytes(config, self.capacity, kv))
        except MemoryError:
            needed = memory_bytes(config) + cache_bytes(config, self.capacity, kv)
            raise ResourceError(
                f"no memory for a context of {context} tokens, which takes {needed:,} bytes; "
                "choose a smaller one"
            ) from None
        self.position = 0
        count, tile = self.capacity // TILE, tile_bytes(config, kv)
        rows = cache_bytes(config, self.capacity, kv) // (count * tile)
        self.tiles = self.cache[: rows * count * tile].reshape(rows, count, tile)
        """(layers and heads, tiles, bytes): keys and values by position, TILE of them each."""
        self.pending = 0
        """Tokens before `position` that the memory has not taken in yet."""
        self.journal: Array | None = None
        self.prediction: Prediction | None = None
        """What the multi-token-prediction block remembers."""
        self.settler: Callable[[State], None] | None = None

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens, which must be pending."""
        assert 0 <= tokens <= self.pending
        self._cut(self.position - tokens, self.pending - tokens)

    def settle(self) -> None:
        """Make pending tokens a part of the memory."""
        if self.pending:
            assert self.settler is not None
            self.settler(self)

    def arrive(self, position: int) -> None:
        """The memory was filled from elsewhere with what it is at a position."""
        self.position, self.pending = position, 0
        if self.prediction is not None:
            self.prediction.cut(0)

    def _cut(self, position: int, pending: int = 0) -> None:
        self.position, self.pending = position, pending
        if self.prediction is not None:
            self.prediction.cut(position)

    def snapshot(self) -> Snapshot:
        """A copy of the memory, to come back to."""
        self.settle()
        return Snapshot(self.memory.copy(), self.position)

    def restore(self, snapshot: Snapshot) -> None:
        """Be again as when the snapshot was taken."""
        self.memory[:] = snapshot.memory
        self._cut(snapshot.position)

    def tiles_to(self, position: int) -> int:
        """How many tiles hold the keys and values of so many positions."""
        return -(-position // TILE)

    def reset(self) -> None:
        """Forget everything."""
        self.memory[:] = 0
        self._cut(0)


def memory_bytes(config: Config) -> int:
    """Bytes of all DeltaNet layers' windows and memories."""
    return sum(config.recurrent) * deltanet.memory_bytes(config)


def cache_bytes(config: Config, context: int, kv: str = "i12") -> int:
    """Bytes of all attention layers' keys and values."""
    layers = config.layers - sum(config.recurrent)
    return layers * CACHES[kv].bytes(config.kv_heads, config.head_dim, context)


def tile_bytes(config: Config, kv: str = "i12") -> int:
    """Bytes of a tile of one layer and head."""
    return CACHES[kv].tile_bytes(None, head_width(config.head_dim))


def journal_bytes(config: Config) -> int:
    """Bytes of the journal: 1.2 MB for each token that may be taken back, at 48 layers."""
    return sum(config.recurrent) * deltanet.journal_bytes(config)
