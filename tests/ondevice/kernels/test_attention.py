"""Gated attention against float64: what goes into the cache, and what comes out of it."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ondevice.kernels import attention, cache, cache_i12, cache_i16, cache_q8_0, cache_words, rows
from quant.format import Array
from tests.ondevice.kernels.harness import (
    MACHINES,
    Rows,
    bits,
    compiled_for,
    run,
    run_python,
)

EPSILON = 1e-6
TILE = 128
CONTEXT = 3 * TILE
LAYER = 1  # of two: the other one's cache must stay as it is
HALF_ROUNDING = 2.0**-11  # of a float16
KEY_LENGTH, KEY_MOST = 92000, 24568
QUERY_LENGTH, QUERY_MOST = 23000, 8191
WORD_VALUES, WORD_SHARE, WORD_SHARES = 24568, 8191, 87000
UNITS = {"i12": 8.05, "i16": 0.505}  # of a word, that rounding may be off
ROUNDING = 5e-6


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parts(tiles: Array, *lengths: int) -> list[Array]:
    """tiles (kv heads, tiles, bytes), cut after each of these numbers of bytes."""
    assert sum(lengths) == tiles.shape[2]
    pieces = np.split(tiles, np.cumsum(lengths)[:-1], axis=2)
    return [np.ascontiguousarray(piece) for piece in pieces]


def words(tiles: Array, width: int) -> tuple[Array, Array]:
    """Keys and values (kv heads, context, width) of tiles of 16-bit numbers."""
    heads, count, _ = tiles.shape
    keys, key_scales, values, value_scales = parts(tiles, *[2 * TILE * width, 4 * TILE] * 2)
    keys = keys.view(np.int16).reshape(heads, count, TILE // 16, width // 2, 16, 2)
    keys = keys.transpose(0, 1, 2, 4, 3, 5).reshape(heads, -1, width)
    values = values.view(np.int16).reshape(heads, count, width // 16, TILE // 2, 16, 2)
    values = values.transpose(0, 1, 3, 5, 2, 4).reshape(heads, -1, width)
    scales = (x.view(np.float32).reshape(heads, -1, 1) for x in (key_scales, value_scales))
    return tuple(x * scale.astype(float) for x, scale in zip((keys, values), scales, strict=True))


def with_fourths(words: Array) -> Array:
    """Four vectors each of three (..., 3, 16, 2) i16: the fourth is their lowest four bits."""
    lowest = words.astype(np.int32) & 15
    fourth = lowest[..., 2, :, :] << 12 | lowest[..., 1, :, :] << 8 | lowest[..., 0, :, :] << 4
    return np.concatenate([words, fourth.astype(np.int16)[..., None, :, :]], axis=-3)


def packed_words(tiles: Array, width: int) -> tuple[Array, Array]:
    """Keys and values (kv heads, context, width) of tiles of 12-bit numbers."""
    heads, count, _ = tiles.shape
    keys, key_scales, values, value_scales = parts(tiles, *[TILE * width // 2 * 3, 4 * TILE] * 2)
    keys = keys.view(np.int16).reshape(heads, count, TILE // 16, width // 8, 3, 16, 2)
    values = values.view(np.int16).reshape(heads, count, width // 64, 3, TILE // 2, 16, 2)
    values = with_fourths(values.swapaxes(3, 4)).swapaxes(3, 4)
    pieces = (with_fourths(keys), key_scales, values, value_scales)
    whole = [np.ascontiguousarray(x).reshape(heads, count, -1).view(np.uint8) for x in pieces]
    return words(np.concatenate(whole, axis=2), width)


def codes(tiles: Array, width: int) -> tuple[Array, Array]:
    """Keys and values (kv heads, context, width) of tiles of bytes."""
    heads, count, _ = tiles.shape
    lengths = (TILE * width, TILE // 16 * width, TILE * width, 2 * TILE)
    keys, key_scales, values, value_scales = parts(tiles, *lengths)
    keys = keys.view(np.int8).reshape(heads, count, TILE // 16, width // 4, 16, 4)
    keys = keys.transpose(0, 1, 2, 4, 3, 5).reshape(heads, -1, width // 32, 32)
    key_scales = key_scales.view(np.float16).reshape(heads, count, TILE // 16, width // 32, 16)
    key_scales = key_scales.transpose(0, 1, 2, 4, 3).reshape(heads, -1, width // 32, 1)
    values = values.view(np.int8).reshape(heads, count, width // 16, TILE // 4, 16, 4)
    values = values.transpose(0, 1, 3, 5, 2, 4).reshape(heads, -1, width)
    value_scales = value_scales.view(np.float16).reshape(heads, -1, 1)
    keys = (keys * key_scales.astype(float)).reshape(heads, -1, width)
    return keys, values * value_scales.astype(float)


READERS = {"i12": packed_words, "i16": words, "q8_0": codes}


@dataclass
class Case:
    """One layer's weights, a sequence of q (query and gate per head), k and v, and its cache."""

    heads: int
    kv_heads: int
    size: int
    pairs: int
    tokens: int
    context: int = CONTEXT
    kind: str = "i12"

    def __post_init__(self) -> None:
        heads, kv_heads, size = self.heads, self.kv_heads, self.size
        self.cache_kind = attention.CACHES[self.kind]
        self.q = normal(self.tokens, heads * 2 * size)
        self.k, self.v = normal(2, self.tokens, kv_heads * size, seed=2)
        self.q_norm, self.k_norm = 1 + normal(2, size, seed=3) / 4
        exponents = -np.arange(self.pairs) / np.float32(max(self.pairs, 1))
        self.frequencies = (10000.0**exponents).astype(np.float32)
        self.layer_bytes = self.cache_kind.bytes(kv_heads, size, self.context)
        self.cache = np.full(2 * self.layer_bytes, 0xFF, np.uint8)

    def run(self, start: int, end: int, threads: int = 2) -> Array:
        """Outputs (tokens, heads * size) of tokens start .. end, which go into the cache."""
        count = end - start
        table = np.full((count + 1, 2 * self.pairs), np.nan, np.float32)
        where = {
            "count": count,
            "position": start,
            "cache": self.cache,
            "context": self.context,
        }
        tasks = np.zeros(1, np.int64)
        angles = (self.frequencies, self.pairs, table, self.kv_heads, tasks)
        run(attention.rotations, *angles, per_token=True, **where)
        assert np.isnan(table[-1]).all()
        q, k, v = (Rows.of(x[start:end]) for x in (self.q, self.k, self.v))
        shape = (self.heads, self.kv_heads, self.size)
        run(
            self.cache_kind.inputs,
            *(q, k, v, *shape, self.pairs, table, self.q_norm, self.k_norm, EPSILON, LAYER),
            tasks=self.heads + self.kv_heads,
            per_token=True,
            **where,
        )
        out = Rows(count, self.heads * self.size)
        parts = Rows(1, attention.partial_bytes(self.heads, self.size), np.uint8)
        run(
            self.cache_kind.attend,
            *(q, *shape, out, LAYER, parts.address),
            scratch=attention.scratch_bytes(*shape),
            times=tasks,
            threads=threads,
            **where,
        )
        parts.check()
        run(
            attention.attention_output,
            *(q, self.heads, self.size, out, parts.address, 0, 0, 0, 0, self.heads_of_task),
            per_token=True,
            few=self.heads // self.heads_of_task,
            **where,
        )
        return out.values

    def cached(self) -> tuple[Array, Array]:
        """Keys and values (kv heads, context, width) float64, as documented."""
        own = self.cache[LAYER * self.layer_bytes :][: self.layer_bytes]
        own = own.reshape(self.kv_heads, self.context // TILE, -1)
        with np.errstate(invalid="ignore"):
            return READERS[self.kind](own, self.width)

    @property
    def heads_of_task(self) -> int:
        return 2 if self.heads % 2 == 0 else 1

    @property
    def width(self) -> int:
        return cache.head_width(self.size)

    def turned(self, x: Array, weight: Array) -> Array:
        """rope(norm(x)) of x (tokens, heads, size) in float64."""
        x = x.astype(np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON)) * weight
        angle = np.arange(len(x), dtype=np.float32)[:, None] * self.frequencies
        cosine, sine = (f(angle.astype(np.float64))[:, None] for f in (np.cos, np.sin))
        a, b, rest = np.split(x, [self.pairs, 2 * self.pairs], axis=-1)
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=-1)

    def exact(self) -> tuple[Array, Array]:
        """Outputs from the keys and values that are in the cache, and how far off they may be."""
        query, gate = np.split(self.q.reshape(self.tokens, self.heads, -1), 2, axis=-1)
        query = self.turned(query, self.q_norm)
        query = rounded(query) if self.kind == "q8_0" else rounded_to_words(query)
        keys, values = (x[:, : self.tokens, : self.size] for x in self.cached())
        out, error = np.empty((2, self.tokens, self.heads, self.size))
        later = np.triu(np.full((self.tokens, self.tokens), -np.inf), 1)
        for head in range(self.heads):
            own = head // (self.heads // self.kv_heads)
            scores = query[:, head] @ keys[own].T / np.sqrt(self.size) + later
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            total = share.sum(axis=1, keepdims=True)
            out[:, head] = share @ values[own] / total
            error[:, head] = self.share_error(share, values[own]) / total
        openness = 1 / (1 + np.exp(-gate.astype(np.float64)))
        # a query's code may be the next one where float32 rounds to the other side of half
        another_code = 2e-3 if self.kind == "q8_0" else 2e-5
        rounding = ROUNDING * (1 + abs(out)) + another_code
        shape = (self.tokens, -1)
        return (out * openness).reshape(shape), ((error + rounding) * openness).reshape(shape)

    def share_error(self, share: Array, values: Array) -> Array:
        """What rounding shares (tokens, positions) to whole numbers may change in a sum."""
        error = np.zeros((self.tokens, self.size))
        for start in range(0, self.tokens, cache.TILE):
            tile = slice(start, start + cache.TILE)
            most = 127 if self.kind == "q8_0" else WORD_VALUES
            scales = abs(values[tile]).max(axis=1) / most
            weight = share[:, tile] * scales
            step = weight.max(axis=1, keepdims=True)
            if self.kind == "q8_0":
                step = step / rows.SHARES
            else:
                total = weight.sum(axis=1, keepdims=True)
                step = np.maximum(step / WORD_SHARE, total / WORD_SHARES)
            with np.errstate(invalid="ignore"):
                units = np.nan_to_num(abs(values[tile]) / scales[:, None])
            error += step / 2 * units.sum(axis=0)
        return error


def rounded(query: Array) -> Array:
    """A query (tokens, heads, size) as blocks of 32 bytes keep it."""
    width = cache.head_width(query.shape[2])
    padded = np.pad(query, [(0, 0), (0, 0), (0, width - query.shape[2])])
    blocks = padded.reshape(*query.shape[:2], -1, 32)
    scales = abs(blocks).max(axis=-1, keepdims=True) / 127
    kept = np.rint(blocks / np.where(scales, scales, 1)) * scales
    return kept.reshape(padded.shape)[:, :, : query.shape[2]]


def word_scale(vectors: Array, longest: int, most: int) -> Array:
    """(..., 1): what one of a query's or key's words stands for."""
    length = np.sqrt((vectors * vectors).sum(axis=-1, keepdims=True))
    greatest = abs(vectors).max(axis=-1, keepdims=True)
    return np.maximum(length / longest, greatest / most)


def rounded_to_words(query: Array) -> Array:
    """A query (tokens, heads, size) as words keep it."""
    scale = word_scale(query, QUERY_LENGTH, QUERY_MOST)
    return np.rint(query / scale) * scale


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "pairs"),
    [
        (4, 2, 32, 4),
        (3, 1, 24, 3),
        (2, 2, 16, 8),
        (5, 5, 7, 1),
        (8, 1, 40, 0),
        (18, 2, 64, 32),
        (2, 1, 136, 8),
    ],
)
KINDS = pytest.mark.parametrize("kind", attention.CACHES)


@KINDS
@SHAPES
@pytest.mark.parametrize("tokens", [1, 2, TILE - 1, TILE + 1, 2 * TILE + 3, 3 * TILE])
def test_attention(
    heads: int, kv_heads: int, size: int, pairs: int, tokens: int, kind: str
) -> None:
    case = Case(heads, kv_heads, size, pairs, tokens, kind=kind)
    out = case.run(0, tokens)
    keys, values = case.cached()
    beyond = values[:, :tokens, size:]
    if kind == "i12":  # the fourth words' ends, zeros where that word is beyond the size as well
        step = abs(case.v).reshape(tokens, kv_heads, size).max(axis=-1).T[..., None] / WORD_VALUES
        assert (beyond >= 0).all()
        assert (beyond <= 15.01 * step).all()
        assert not values[:, :tokens, size:][..., -16:].any() or size % 64 > 48
    else:
        assert not beyond.any()
    wanted = case.turned(case.k.reshape(tokens, kv_heads, size), case.k_norm)
    lengths = (32, case.width)  # that share a scale
    for cached, vectors, length in zip(
        (keys, values), (wanted, case.v.reshape(tokens, kv_heads, size)), lengths, strict=True
    ):
        vectors = vectors.transpose(1, 0, 2)
        greatest = abs(vectors).max(axis=-1, keepdims=True)
        step = greatest / WORD_VALUES
        if cached is keys:
            step = word_scale(vectors, KEY_LENGTH, KEY_MOST)
        allowed = UNITS.get(kind, 0) * step + 1e-6 * greatest
        if kind == "q8_0":
            padded = np.pad(abs(vectors), [(0, 0), (0, 0), (0, case.width - size)])
            greatest = padded.reshape(kv_heads, tokens, -1, length).max(axis=-1)
            allowed = np.repeat(greatest, length, axis=2)[:, :, :size] * (0.5 / 127 + HALF_ROUNDING)
        assert (abs(cached[:, :tokens, :size] - vectors) <= allowed).all()
    assert (case.cache[: case.layer_bytes] == 0xFF).all(), "another layer's cache was written"
    exact, error = case.exact()
    assert (abs(out - exact) <= error).all(), (abs(out - exact) / error).max()


@KINDS
@SHAPES
def test_batches_change_no_bit(heads: int, kv_heads: int, size: int, pairs: int, kind: str) -> None:
    tokens = 2 * TILE + 3
    case = Case(heads, kv_heads, size, pairs, tokens, kind=kind)
    whole, memory = case.run(0, tokens), case.cache.tolist()
    some = [0, 1, TILE - 1, TILE, TILE + 2, 2 * TILE, 2 * TILE + 1, tokens]
    for ends in (range(tokens + 1), some):
        other = Case(heads, kv_heads, size, pairs, tokens, kind=kind)
        outputs = [other.run(a, b, threads=1 + b % 3) for a, b in itertools.pairwise(ends)]
        assert bits(np.concatenate(outputs)) == bits(whole)
        assert other.cache.tolist() == memory


@KINDS
def test_chunks(kind: str) -> None:
    """Several chunks, whose length changes at 4096 positions in the middle of a batch."""
    tokens = cache.SHORTEST * cache.PARTS + 40
    case = Case(3, 1, 24, 2, tokens, context=tokens // TILE * TILE + TILE, kind=kind)
    whole = case.run(0, tokens)
    some = [0, 255, 256, 257, 1000, 2047, 2048, 4094, 4095, 4096, 4097, tokens - 1]
    exact, error = case.exact()
    assert (abs(whole - exact) <= error).all()
    for token in some:
        assert bits(case.run(token, token + 1)) == bits(whole[token : token + 1]), token
    for count in (cache.BLOCK, cache.BLOCK + 3):
        start = 4096 - count // 2
        out = case.run(start, start + count, threads=3)
        assert bits(out) == bits(whole[start : start + count]), count


@KINDS
def test_what_a_later_position_left_behind_does_not_matter(kind: str) -> None:
    """Going back to a snapshot leaves keys and values beyond it in the cache."""
    case = Case(4, 2, 32, 4, 100, kind=kind)
    case.run(0, 100)
    again = case.run(70, 75)
    fresh = Case(4, 2, 32, 4, 100, kind=kind)
    assert bits(again) == bits(fresh.run(0, 75)[70:])


def test_scores_far_apart() -> None:
    """Large queries choose one position each; nothing overflows."""
    case = Case(2, 1, 16, 0, 2 * TILE + 2)
    case.q_norm *= np.float32(1e4)
    out = case.run(0, case.tokens)
    assert np.isfinite(out).all()
    # differences of scores near 1e4 are known to about 1e-3 only
    close = np.isclose(out, case.exact()[0], rtol=1e-2, atol=1e-2)
    assert close.mean() > 0.99


def test_sizes() -> None:
    assert cache.TILE == TILE
    assert [cache.head_width(size) for size in (1, 32, 33, 256)] == [64, 64, 64, 256]
    assert cache_i12.tile_bytes(None, 256) == TILE * 2 * (256 * 3 // 2 + 4)
    assert cache_i16.tile_bytes(None, 256) == TILE * 2 * (256 * 2 + 4)
    assert cache_q8_0.tile_bytes(None, 256) == TILE * (256 + 8 * 2 + 256 + 2)
    assert attention.CACHES["i12"].bytes(2, 256, TILE) == 2 * 2 * TILE * (256 * 3 // 2 + 4)
    assert attention.CACHES["i16"].bytes(2, 256, TILE) == 2 * 2 * TILE * (256 * 2 + 4)
    assert attention.CACHES["q8_0"].bytes(2, 256, TILE) == 2 * TILE * (256 + 8 * 2 + 256 + 2)


def test_rotations_of_late_positions() -> None:
    frequencies = np.array([1.0, 0.1, 1e-3, 1e-7], np.float32)
    table = np.zeros((3, 2, 4), np.float32)
    tasks = np.zeros(1, np.int64)
    run(attention.rotations, frequencies, 4, table, 2, tasks, tasks=3, position=262_142)
    angle = np.arange(262_142, 262_145, dtype=np.float32)[:, None] * frequencies
    for row, function in enumerate((np.cos, np.sin)):
        exact = function(angle.astype(np.float64))
        np.testing.assert_allclose(table[:, row], exact, rtol=1e-7)


def extreme(kind: str) -> Case:
    """Codes of nothing but +-127, in runs: what a narrow sum would not hold."""
    case = Case(16, 2, 64, 0, TILE + 6, kind=kind)
    case.q_norm[:] = case.k_norm[:] = 1
    case.q = np.sign(case.q).repeat(4, axis=1)[:, : case.q.shape[1]]
    case.k = np.sign(case.k).repeat(4, axis=1)[:, : case.k.shape[1]]
    case.k[0], case.q[5] = -1, 1
    case.v = np.sign(case.v)
    return case


def test_extreme_codes() -> None:
    for kind in attention.CACHES:
        case = extreme(kind)
        out = case.run(0, case.tokens)
        exact, error = case.exact()
        assert (abs(out - exact) <= error).all(), kind


@pytest.mark.parametrize("kind", ["i12", "i16"])
def test_greatest_codes(kind: str) -> None:
    """Words two dimensions or positions apart are as great as can be, with either sign."""
    size, tokens = 64, 2 * TILE
    case = Case(8, 1, size, 0, tokens, kind=kind)
    case.q_norm[:] = case.k_norm[:] = 1
    case.q.reshape(tokens, 8, 2, size)[:, :, 0] = 0
    case.k[:] = 0
    for t in range(tokens):
        for head in range(8):
            place = 2 * size * head + (t + head) % size
            case.q[t, [place, place ^ 2]] = (-1) ** (t + head // 4)
        case.k[t, [5 * t % size ^ other for other in (0, 2, 4, 6)]] = (-1) ** (t // 3)
    # the shares of keys in the query's dimensions are by far the greatest
    case.q_norm *= np.float32(4)
    case.v = np.where(np.arange(tokens)[:, None] // 2 % 2, 1, -1).repeat(size, 1)
    case.v = case.v.astype(np.float32)
    out = case.run(0, tokens)
    exact, error = case.exact()
    assert (abs(out - exact) <= error).all()
    assert bits(case.run(tokens - 1, tokens)) == bits(out[-1:])


def test_words_leave_room() -> None:
    """For sums of two, and for sums of products of the widest heads; rounding adds up to 8."""
    key = cache_words.KEY_LENGTH + 8 * 1024**0.5
    query = cache_words.QUERY_LENGTH + 1024**0.5 / 2
    assert key * query < 2**31
    assert cache_words.MOST + 8 + cache_words.QUERY_MOST < 2**15
    assert (cache_words.MOST + 8) * (cache_words.SHARES + TILE / 2) < 2**31


def check_here() -> None:
    """All kinds of cache on the machine that this process compiles for."""
    test_extreme_codes()
    test_greatest_codes("i12")
    for kind in attention.CACHES:
        for heads, kv_heads, size, tokens in ((16, 2, 64, TILE + 20), (3, 1, 40, 71)):
            case = Case(heads, kv_heads, size, 4, tokens, kind=kind)
            whole = case.run(0, tokens)
            exact, error = case.exact()
            assert (abs(whole - exact) <= error).all(), kind
            other = Case(heads, kv_heads, size, 4, tokens, kind=kind)
            ends = [0, 1, 9, 30, 69, tokens - 1, tokens]
            outputs = [other.run(a, b, threads=1 + b % 3) for a, b in itertools.pairwise(ends)]
            assert bits(np.concatenate(outputs)) == bits(whole), kind


@pytest.mark.parametrize("cpu", MACHINES)
def test_other_machines(cpu: str, tmp_path: Path) -> None:
    code = f"from {__name__} import check_here; check_here(); print('checked')"
    assert run_python(["-c", code], compiled_for(cpu, tmp_path)).strip() == "checked"
