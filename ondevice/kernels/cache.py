"""Keys and values of an attention layer, and what a product with them works on.

The cache of a layer holds, per KV head, tiles of TILE positions, which begin at multiples of TILE.
What a tile looks like is its kind's business (cache_f16, cache_q8_0); both have a position in each
lane for scores and a dimension for outputs, so that nothing is folded. `width` is the size of a
head rounded up to a multiple of 32.

Products are made for a *set*: ROWS heads of one token that read the same KV head. It is, in f32,

    queries (ROWS, width) | outputs (ROWS, width) | merged outputs (ROWS, width) |
    shares (ROWS, TILE) | maxima | sums | factors | greatest | merged maxima | merged sums: 16 each
"""

import numpy as np

from ondevice.kernels.dot.tile import ByLayout
from ondevice.kernels.rows import ROWS
from ondevice.kernels.simd import f32x16, splat, store, zero
from quant.jit import inner

TILE = 64
GROUP = 16  # positions whose keys lie side by side
BLOCK = 8  # most tokens that go over a tile together
PARTS = 16  # most chunks of a token
SHORTEST = 256  # positions of a chunk
LOWEST = np.float32(-1e30)


def head_width(size: int) -> int:
    """Dimensions of a cached head of `size`."""
    return -(-size // 32) * 32


def set_bytes(size: int) -> int:
    """Bytes of a set."""
    return 4 * (ROWS * (3 * head_width(size) + TILE) + 6 * 16)


def panel_bytes(size: int) -> int:
    """Room for the keys of two groups, or the values of 32 dimensions, as floats."""
    return 4 * max(2 * GROUP * head_width(size), 32 * TILE)


@inner
def bytes_of_set(width):
    return 4 * (ROWS * (3 * width + TILE) + 96)


@inner
def numbers_of(rows, width):
    """Address of a set's numbers, from the maxima on."""
    return rows + 4 * ROWS * (3 * width + TILE)


@inner
def begin_chunk(rows, width):
    """No outputs yet."""
    for i in range(0, ROWS * width, 16):
        store(rows + 4 * (ROWS * width + i), zero(f32x16))
    numbers = numbers_of(rows, width)
    store(numbers, splat(f32x16, LOWEST))
    store(numbers + 64, zero(f32x16))


@inner
def chunk_length(positions):
    """Positions of a chunk of a token that looks at so many."""
    length = SHORTEST
    while length * PARTS < positions:
        length *= 2
    return length


@inner
def tile_positions(position, chunk, start):
    """How many positions from `start` on, a tile's, the token at `position` has in a chunk."""
    length = chunk_length(position + 1)
    if start // length != chunk:
        return 0
    return max(0, min(TILE, position + 1 - start))


# ---- what each kind of cache defines ----


def tile_bytes(kind, width):
    """Bytes of a tile, from the width of a head."""
    raise NotImplementedError("only inside compiled kernels")


def keep_token(kind, tile, place, width, size, key, value):
    """Put a key and a value (f32) at a place of a tile."""
    raise NotImplementedError("only inside compiled kernels")


def take_queries(kind, rows, width, x, size, used):
    """The queries of a set's first `used` heads, 8 * size bytes apart; zeros for the others."""
    raise NotImplementedError("only inside compiled kernels")


def attend_tile(kind, panel, sets, per_token, first, count, start, chunk, size, tile, scale):
    """Go over one tile with the sets of `count` tokens, from position `first` on.

    The tile begins at `start`; tokens for which it lies in another chunk do nothing.
    """
    raise NotImplementedError("only inside compiled kernels")


TILE_BYTES, KEEP_TOKEN = ByLayout(tile_bytes), ByLayout(keep_token)
TAKE_QUERIES, ATTEND_TILE = ByLayout(take_queries), ByLayout(attend_tile)
