"""Dot products of tiles against NumPy's integers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ondevice.kernels import probe, products, sums, tiles
from ondevice.kernels.arithmetic import lane_sum
from ondevice.kernels.operation import CompiledFunction
from ondevice.kernels.simd import f32x16, i16x32, i32x16, load, splat, store, store_i32, u8x64
from ondevice.kernels.tiles import tile1, tile2
from quant.format import Array
from tests.ondevice.kernels.harness import (
    MACHINES,
    Rows,
    compiled_for,
    run_python,
    three_integers,
)

Draw = Callable[[int, int, int], Array]
DRAWS: dict[str, Draw] = {
    "random": lambda low, high, n: np.random.default_rng(7).integers(low, high + 1, n),
    "lowest": lambda low, high, n: np.full(n, low),
    "highest": lambda low, high, n: np.full(n, high),
    "edges": lambda low, high, n: np.where(np.arange(n) % 2, low, high),
}
EDGES = pytest.mark.parametrize(
    ("left", "right"), [(DRAWS[a], DRAWS[b]) for a in DRAWS for b in DRAWS]
)
STEP = 128  # bytes between the two tokens
BIAS = 128 if tiles.BIASED else 0
STARTS = np.array([1000, -(2**24)], np.int32)
SCALES = np.random.default_rng(8).integers(-128, 128, 16).astype(np.int32)


@three_integers
def wide(w: int, a: int, out: int) -> None:
    tokens = (a, a + STEP)
    scale = sums.dots_scale(load(i32x16, w + 64))
    start = tiles.spread(tile2, tokens, 64, 3)
    small = products.wide_dot(tiles.zero_dots(tile2), load(u8x64, w), tokens, 8)
    added = sums.add_dots(start, small, scale)
    unscaled = sums.end_dots(
        start, products.wide_dot(sums.begin_dots(start), load(u8x64, w), tokens, 8)
    )
    words = products.wide_dot_words(start, load(i16x32, w), tokens, 8)
    totals = tiles.zero_floats(tile2)
    one = load(f32x16, w + 128)
    tiles.store_floats(out, sums.add_scaled(totals, added, one, tokens, 68))
    tiles.store_floats(out + 128, sums.add_scaled(totals, unscaled, one, tokens, 68))
    tiles.store_floats(out + 256, sums.add_scaled(totals, words, one, tokens, 68))
    more = sums.add_multiple(unscaled, start, -32)
    tiles.store_floats(out + 384, sums.add_scaled(totals, more, one, tokens, 68))


def inputs(codes: Array) -> Array:
    """Two tokens' codes, the second's in reverse, each with an int32 and a 1.0 behind them."""
    memory = np.zeros((2, STEP), np.uint8)
    memory[:, : codes.nbytes] = np.stack([codes, codes[::-1]]).view(np.uint8)
    memory[:, 64:68] = STARTS[:, None].view(np.uint8)
    memory[:, 68:72] = np.ones((2, 1), np.float32).view(np.uint8)
    memory[:, 72:76] = np.array([[-300], [7]], np.int32).view(np.uint8)
    return memory


def weights(codes: Array) -> Array:
    """64 bytes, 16 scales and 16 times 1.0."""
    ones = np.ones(16, np.float32)
    return np.concatenate([part.view(np.uint8) for part in (codes, SCALES, ones)])


def call(kernel: CompiledFunction, w: Array, a: Array, vectors: int) -> Array:
    """What a kernel (w, a, out) writes: float32 (vectors, 16)."""
    out = Rows(1, 16 * vectors)
    kernel(w.ctypes.data, a.ctypes.data, out.address)
    out.check()
    return out.values[0].reshape(vectors, 16).astype(np.float64)


def rounded(sums: Array) -> Array:
    """Integer sums as float32 has them."""
    return sums.astype(np.float32).astype(np.float64)


@EDGES
def test_wide(left: Draw, right: Draw) -> None:
    w, a = left(0, 63, 64).astype(np.uint8), right(-127, 127, 64).astype(np.int8)
    out = call(wide, weights(w), inputs(a), 8)
    for token, codes in enumerate((a, a[::-1])):
        start = 3 * int(STARTS[token])
        dots = w.reshape(16, 4).astype(int) @ codes[8:12].astype(int)
        assert (out[token] == rounded(start + dots * SCALES)).all()
        assert (out[2 + token] == rounded(start + dots)).all()
        pairs = w.view(np.int16).reshape(16, 2).astype(int)
        words = pairs @ np.ascontiguousarray(codes[8:12]).view(np.int16).astype(int)
        assert (out[4 + token] == rounded(start + words)).all()
        assert (out[6 + token] == rounded(start + dots - 32 * start)).all()


@three_integers
def wide_full(w: int, a: int, out: int) -> None:
    tokens = (a, a + STEP)
    start = tiles.spread_words(tile2, tokens, 72, 1)
    dots = products.wide_dot_bytes(sums.begin_dots(start), load(u8x64, w), tokens, 8)
    added = sums.end_dots(start, dots)
    ones = load(f32x16, w + 128)
    totals = sums.add_scaled(tiles.zero_floats(tile2), added, ones, tokens, 68)
    tiles.store_floats(out, totals)


@three_integers
def quad_full(w: int, a: int, out: int) -> None:
    tokens = (a, a + STEP)
    start = tiles.zero_sums(tile2)
    dots = products.quad_dot_bytes(sums.begin_dots(start), load(u8x64, w), tokens, 8)
    added = sums.fold_quads(sums.end_dots(start, dots))
    ones = load(f32x16, w + 128)
    totals = sums.add_scaled(tiles.zero_floats(tile2), added, ones, tokens, 68)
    tiles.store_floats(out, totals)


@EDGES
def test_full_bytes(left: Draw, right: Draw) -> None:
    w, a = left(-128, 127, 64), right(-127, 127, 64).astype(np.int8)
    kept = weights((w + BIAS).astype(np.uint8))
    wide_out, quad_out = call(wide_full, kept, inputs(a), 2), call(quad_full, kept, inputs(a), 2)
    for token, codes in enumerate((a, a[::-1])):
        fours, sixteen = codes[8:12].astype(int), codes[8:24].astype(int)
        surplus = (-300, 7)[token] + BIAS * fours.sum()
        assert (wide_out[token] == surplus + w.reshape(16, 4) @ fours).all()
        rows = w.reshape(4, 16) @ sixteen + BIAS * sixteen.sum()
        assert (quad_out[token] == rows.repeat(4)).all()


@three_integers
def quad(w: int, a: int, out: int) -> None:
    tokens = (a,)
    codes, scales = load(u8x64, w), load(i16x32, w + 192)
    start = tiles.zero_sums(tile1)
    dots = products.quad_dot(tiles.zero_dots(tile1), codes, tokens, 8)
    others = products.quad_dot(tiles.zero_dots(tile1), codes, tokens, 24)
    scaled = sums.add_two_dots(start, dots, others, scales)
    plain = sums.end_dots(start, products.quad_dot(sums.begin_dots(start), codes, tokens, 8))
    words = products.quad_dot_words(start, scales, tokens, 8)
    totals, ones = tiles.zero_floats(tile1), load(f32x16, w + 128)
    scaled = sums.add_scaled(totals, sums.fold_quads(scaled), ones, tokens, 68)
    tiles.store_floats(out, scaled)
    plain = sums.add_scaled(totals, sums.fold_quads(plain), ones, tokens, 68)
    tiles.store_floats(out + 64, plain)
    words = sums.add_scaled(totals, sums.fold_quads(words), ones, tokens, 68)
    tiles.store_floats(out + 128, words)
    tiles.store_apart(scaled, (out + 192,), 0, 8)
    tiles.store_first(scaled, (out + 192,), 4)
    tiles.store_folded(scaled, (out + 192,), 12)


@EDGES
def test_quad(left: Draw, right: Draw) -> None:
    w, a = left(0, 63, 64).astype(np.uint8), right(-127, 127, 64).astype(np.int8)
    scales = left(-128, 127, 8).reshape(4, 2)
    memory = np.concatenate([weights(w), scales.repeat(4).astype(np.int16).view(np.uint8)])
    out = call(quad, memory, inputs(a), 4)
    dots, others = (w.reshape(4, 16).astype(int) @ a[i : i + 16].astype(int) for i in (8, 24))
    scaled = dots * scales[:, 0] + others * scales[:, 1]
    assert (out[0] == rounded(scaled.repeat(4))).all()
    assert (out[1] == dots.repeat(4)).all()
    pairs = a[8:24].view(np.int16).astype(int).reshape(2, 4).sum(1)
    assert (out[2] == rounded((scales @ pairs).repeat(4))).all()
    assert (out[3, :8:2] == rounded(scaled)).all()
    assert out[3, 1] == rounded(scaled)[0]
    assert abs(out[3, 3] - 4 * scaled.sum()) <= 2e-7 * 4 * abs(scaled).sum()


@three_integers
def floats_of_two(w: int, a: int, out: int) -> None:
    totals = tiles.load_floats(tile2, out)
    tiles.store_floats(out, sums.add_products(totals, load(f32x16, w), (a, a + STEP), 4))
    store(out + 128, load(f32x16, w))


def test_products_of_floats() -> None:
    random = np.random.default_rng(3)
    w, a = (random.standard_normal(n).astype(np.float32) for n in (16, 64))
    out = np.zeros((3, 16), np.float32)
    out[:2] = random.standard_normal((2, 16))
    expected = out[:2] + w.astype(np.float64) * np.stack([a[1:17], a[33:49]])
    floats_of_two(w.ctypes.data, a.ctypes.data, out.ctypes.data)
    assert abs(out[:2] - expected).max() < 1e-6
    assert (out[2] == w).all()


@three_integers
def peak_dot(w: int, a: int, out: int) -> None:
    one = splat(probe.PEAK_TOTAL, 1)
    total = probe.peak_dot(one, load(probe.PEAK_BYTES, w), load(probe.PEAK_BYTES, a))
    store_i32(out, np.int64(lane_sum(total)))


def test_peak_dot() -> None:
    lanes = probe.PEAK_BYTES.lanes
    w, a = DRAWS["random"](0, 15, lanes), DRAWS["random"](-10, 10, lanes)
    if lanes == probe.PEAK_MACS:
        expected = (w * a).sum()
    else:  # the product of a 2 x 8 matrix and an 8 x 2 one
        expected = (w.reshape(2, 8) @ a.reshape(2, 8).T).sum()
        assert probe.PEAK_MACS == 2 * 8 * 2
    expected += probe.PEAK_TOTAL.lanes
    out = np.zeros(1, np.int32)
    codes = [w.astype(np.uint8), a.astype(np.int8)]
    peak_dot(codes[0].ctypes.data, codes[1].ctypes.data, out.ctypes.data)
    assert out[0] == expected


@pytest.mark.parametrize("cpu", MACHINES)
def test_on_lesser_machines(cpu: str, tmp_path: Path) -> None:
    """All of the above in other instructions."""
    environment = compiled_for(cpu, tmp_path)
    chosen = [__file__, "-k", "not lesser", "-q", "-p", "no:cacheprovider"]
    assert " passed" in run_python(["-m", "pytest", *chosen], environment)
