"""Gated attention against float64: what goes into the cache, and what comes out of it."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from ondevice.kernels import attention
from quant.format import Array
from tests.ondevice.kernels.harness import Rows, bits, run

EPSILON = 1e-6
CONTEXT = 3 * attention.TILE
LAYER = 1  # of two: the other one's cache must stay as it is
HALF_ROUNDING = 2.0**-11  # of a float16
ROUNDING = 5e-6


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass
class Case:
    """One layer's weights, a sequence of q (query and gate per head), k and v, and its cache."""

    heads: int
    kv_heads: int
    size: int
    pairs: int
    tokens: int
    context: int = CONTEXT

    def __post_init__(self) -> None:
        heads, kv_heads, size = self.heads, self.kv_heads, self.size
        self.q = normal(self.tokens, heads * 2 * size)
        self.k, self.v = normal(2, self.tokens, kv_heads * size, seed=2)
        self.q_norm, self.k_norm = 1 + normal(2, size, seed=3) / 4
        exponents = -np.arange(self.pairs) / np.float32(max(self.pairs, 1))
        self.frequencies = (10000.0**exponents).astype(np.float32)
        self.layer_bytes = attention.cache_bytes(kv_heads, size, self.context)
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
            attention.attention_inputs,
            *(q, k, v, *shape, self.pairs, table, self.q_norm, self.k_norm, EPSILON, LAYER),
            tasks=self.heads + self.kv_heads,
            per_token=True,
            **where,
        )
        out = Rows(count, self.heads * self.size)
        parts = Rows(1, attention.partial_bytes(self.heads, self.size), np.uint8)
        run(
            attention.attend,
            *(q, *shape, out, LAYER, parts.address),
            scratch=attention.scratch_bytes(*shape),
            times=tasks,
            threads=threads,
            **where,
        )
        parts.check()
        run(
            attention.attention_output,
            *(q, self.heads, self.size, out, parts.address),
            per_token=True,
            **where,
        )
        return out.values

    def cached(self) -> tuple[Array, Array]:
        """Keys and values (kv heads, context, stride) float64, as documented."""
        own = self.cache[LAYER * self.layer_bytes :][: self.layer_bytes].view(np.float16)
        width, tiles = attention.stride(self.size), self.context // attention.TILE
        with np.errstate(invalid="ignore"):
            own = own.astype(np.float64).reshape(self.kv_heads, tiles, 2, -1)
        keys = own[:, :, 0].reshape(self.kv_heads, -1, width, attention.GROUP)
        values = own[:, :, 1].reshape(self.kv_heads, tiles, -1, attention.TILE, 16)
        shape = (self.kv_heads, self.context, width)
        return (
            keys.transpose(0, 1, 3, 2).reshape(shape),
            values.transpose(0, 1, 3, 2, 4).reshape(shape),
        )

    def turned(self, x: Array, weight: Array) -> Array:
        """rope(norm(x)) of x (tokens, heads, size) in float64."""
        x = x.astype(np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(EPSILON)) * weight
        angle = np.arange(len(x), dtype=np.float32)[:, None] * self.frequencies
        cosine, sine = (f(angle.astype(np.float64))[:, None] for f in (np.cos, np.sin))
        a, b, rest = np.split(x, [self.pairs, 2 * self.pairs], axis=-1)
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], axis=-1)

    def exact(self) -> Array:
        """Outputs from the keys and values that are in the cache."""
        query, gate = np.split(self.q.reshape(self.tokens, self.heads, -1), 2, axis=-1)
        query = self.turned(query, self.q_norm)
        keys, values = (x[:, : self.tokens, : self.size] for x in self.cached())
        out = np.empty((self.tokens, self.heads, self.size))
        later = np.triu(np.full((self.tokens, self.tokens), -np.inf), 1)
        for head in range(self.heads):
            own = head // (self.heads // self.kv_heads)
            scores = query[:, head] @ keys[own].T / np.sqrt(self.size) + later
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = share @ values[own] / share.sum(axis=1, keepdims=True)
        out /= 1 + np.exp(-gate.astype(np.float64))
        return out.reshape(self.tokens, -1)


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "pairs"),
    [(4, 2, 32, 4), (3, 1, 24, 3), (2, 2, 16, 8), (5, 5, 7, 1), (8, 1, 40, 0)],
)


@SHAPES
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 131, 192])
def test_attention(heads: int, kv_heads: int, size: int, pairs: int, tokens: int) -> None:
    case = Case(heads, kv_heads, size, pairs, tokens)
    out = case.run(0, tokens)
    keys, values = case.cached()
    assert not values[:, :tokens, size:].any()
    wanted = case.turned(case.k.reshape(tokens, kv_heads, size), case.k_norm)
    for cached, rows in ((keys, wanted), (values, case.v.reshape(tokens, kv_heads, size))):
        rows = rows.transpose(1, 0, 2)
        np.testing.assert_allclose(
            cached[:, :tokens, :size], rows, rtol=1.001 * HALF_ROUNDING, atol=1e-6
        )
        assert np.isnan(cached[:, tokens:]).all(), "written beyond the sequence"
    assert (case.cache[: case.layer_bytes] == 0xFF).all(), "another layer's cache was written"
    np.testing.assert_allclose(out, case.exact(), rtol=ROUNDING, atol=ROUNDING)


@SHAPES
def test_batches_change_no_bit(heads: int, kv_heads: int, size: int, pairs: int) -> None:
    tokens = 131
    case = Case(heads, kv_heads, size, pairs, tokens)
    whole, cache = case.run(0, tokens), case.cache.tolist()
    for ends in (range(tokens + 1), [0, 1, 63, 64, 66, 128, 129, tokens]):
        other = Case(heads, kv_heads, size, pairs, tokens)
        rows = [other.run(a, b) for a, b in itertools.pairwise(ends)]
        assert bits(np.concatenate(rows)) == bits(whole)
        assert other.cache.tolist() == cache


def test_what_a_later_position_left_behind_does_not_matter() -> None:
    """Going back to a snapshot leaves keys and values beyond it in the cache."""
    case = Case(4, 2, 32, 4, 100)
    case.run(0, 100)
    again = case.run(70, 75)
    fresh = Case(4, 2, 32, 4, 100)
    assert bits(again) == bits(fresh.run(0, 75)[70:])


def test_scores_far_apart() -> None:
    """Large queries choose one position each; nothing overflows."""
    case = Case(2, 1, 16, 0, 130)
    case.q_norm *= np.float32(1e4)
    out = case.run(0, 130)
    assert np.isfinite(out).all()
    # differences of scores near 1e4 are known to about 1e-3 only
    close = np.isclose(out, case.exact(), rtol=1e-2, atol=1e-2)
    assert close.mean() > 0.99


def test_sizes() -> None:
    assert [attention.stride(size) for size in (1, 16, 17, 256)] == [16, 16, 32, 256]
    assert attention.cache_bytes(2, 24, 64) == 2 * 2 * 64 * 32 * 2
    assert attention.scratch_bytes(24) == 4 * (64 + 32)


def test_rotations_of_late_positions() -> None:
    frequencies = np.array([1.0, 0.1, 1e-3, 1e-7], np.float32)
    table = np.zeros((3, 2, 4), np.float32)
    run(attention.rotations, frequencies, 4, table, tasks=3, position=262_142)
    angle = np.arange(262_142, 262_145, dtype=np.float32)[:, None] * frequencies
    for row, function in enumerate((np.cos, np.sin)):
        exact = function(angle.astype(np.float64))
        np.testing.assert_allclose(table[:, row], exact, rtol=1e-7)
