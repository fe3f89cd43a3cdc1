"""Every vector operation against NumPy."""

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import types

from ondevice.kernels import arithmetic, atomics, calls, shuffles, simd
from ondevice.kernels.operation import CompiledFunction
from ondevice.kernels.simd import (
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i8x64,
    i16x8,
    i16x16,
    i16x32,
    i32x8,
    i32x16,
    load,
    store,
    u8x16,
    u8x32,
    u8x64,
    u16x16,
    u32x4,
    u32x16,
)
from quant.format import Array
from tests.ondevice.kernels.harness import Rows, compiled_for, run_python, three_integers

FLOATS = np.random.default_rng(1).standard_normal(16).astype(np.float32)
OTHERS = np.random.default_rng(2).standard_normal(16).astype(np.float32)
WORDS = np.random.default_rng(3).integers(-(2**31), 2**31, 16, np.int32)
WORDS[:4] = -(2**31), 2**31 - 1, 0, -1
BYTES = np.random.default_rng(4).integers(0, 256, 64, np.uint8)


def call(kernel: CompiledFunction, a: Array, b: Array, kind: Any, lanes: int) -> Array:
    """What a kernel (a, b, out) writes: exactly so many lanes, at an address of no alignment."""
    out = Rows(1, lanes, kind)
    kernel(a.ctypes.data, b.ctypes.data, out.address)
    out.check()
    return out.values[0]


# ---- operators ----


@three_integers
def float_operators(a: int, b: int, out: int) -> None:
    x, y = load(f32x16, a), load(f32x16, b)
    store(out, x + y)
    store(out + 64, x - y)
    store(out + 128, x * y)
    store(out + 192, x / y)
    store(out + 256, x * np.float32(3))
    z = x
    z += y
    z *= y
    z -= x
    store(out + 320, z)


def test_float_operators() -> None:
    x, y = FLOATS, OTHERS
    results = call(float_operators, x, y, np.float32, 96).reshape(6, 16)
    expected = [x + y, x - y, x * y, x / y, x * np.float32(3), (x + y) * y - x]
    assert results.tolist() == np.array(expected).tolist()


@three_integers
def integer_operators(a: int, b: int, out: int) -> None:
    x, y = load(i32x16, a), load(i32x16, b)
    store(out, x + y)
    store(out + 64, x - y)
    store(out + 128, x * y)
    store(out + 192, x & y)
    store(out + 256, x | y)
    store(out + 320, x ^ y)
    store(out + 384, x << np.int32(5))
    store(out + 448, x >> np.int32(5))
    store(out + 512, load(u32x16, a) >> np.uint32(5))
    z = x
    z |= y
    z &= x
    store(out + 576, z)


def test_integer_operators() -> None:
    x, y = WORDS, WORDS[::-1].copy()
    results = call(integer_operators, x, y, np.int32, 160).reshape(10, 16)
    logical = (x.view(np.uint32) >> 5).view(np.int32)
    expected = [x + y, x - y, x * y, x & y, x | y, x ^ y, x << 5, x >> 5, logical, (x | y) & x]
    assert results.tolist() == np.array(expected).tolist()


@three_integers
def funnelled(a: int, b: int, out: int) -> None:
    store(out, simd.funnel(load(i16x32, a), load(i16x32, b), 4))


def test_funnel() -> None:
    upper, lower = WORDS.view(np.uint16), OTHERS.view(np.uint16)
    result = call(funnelled, upper, lower, np.uint16, 32)
    assert result.tolist() == (upper << 12 | lower >> 4).tolist()


@three_integers
def byte_operators(a: int, b: int, out: int) -> None:
    store(out, (load(u8x64, a) & np.uint8(15)) | (load(u8x64, a) << np.uint8(4)))
    store(out + 64, load(u8x64, a) >> np.uint8(4))


def test_byte_operators() -> None:
    results = call(byte_operators, BYTES, BYTES, np.uint8, 128).reshape(2, 64)
    assert results[0].tolist() == (BYTES & 15 | BYTES << 4).tolist()
    assert results[1].tolist() == (BYTES >> 4).tolist()


# ---- memory ----


@three_integers
def copy_vectors(a: int, b: int, out: int) -> None:
    store(out, load(u8x16, a))
    store(out + 16, load(i8x16, a + 16))
    store(out + 32, load(u8x32, a + 32))
    store(out + 64, load(i8x32, a + 64))
    store(out + 96, load(u8x64, a + 96))
    store(out + 160, load(i8x64, a + 160))
    store(out + 224, load(i16x8, a + 224))
    store(out + 240, load(i16x16, a + 240))
    store(out + 272, load(u16x16, a + 272))
    store(out + 304, load(i16x32, a + 304))
    store(out + 368, load(u32x4, a + 368))
    store(out + 384, load(i32x8, a + 384))
    store(out + 416, load(f32x8, a + 416))
    simd.prefetch(a + 4096)


def test_loads_and_stores_of_every_width() -> None:
    data = np.random.default_rng(5).integers(0, 256, 449, np.uint8)[1:]
    assert call(copy_vectors, data, data, np.uint8, 448).tolist() == data.tolist()


@three_integers
def copy_some(a: int, count: int, out: int) -> None:
    simd.store_some(out, simd.load_some(a, count) + np.float32(1), count)


@three_integers
def load_rest(a: int, count: int, out: int) -> None:
    store(out, simd.load_some(a, count))


@pytest.mark.parametrize("count", [-3, 0, 1, 7, 15, 16, 17, 100])
def test_some_lanes(count: int) -> None:
    lanes = min(max(count, 0), 16)
    out = Rows(1, lanes)
    copy_some(FLOATS.ctypes.data, count, out.address)
    out.check()
    assert out.values[0].tolist() == (FLOATS + np.float32(1))[:lanes].tolist()
    whole = Rows(1, 16)
    load_rest(FLOATS.ctypes.data, count, whole.address)
    assert whole.values[0].tolist() == np.where(np.arange(16) < lanes, FLOATS, 0).tolist()


@three_integers
def scalars(a: int, b: int, out: int) -> None:
    simd.store_i64(out, simd.load_i64(a))
    simd.store_i64(out + 8, simd.load_i32(a))
    simd.store_i64(out + 16, np.int64(simd.load_u32(a)))
    simd.store_i64(out + 24, simd.load_i8(a))
    simd.store_i64(out + 32, simd.load_u8(a))
    simd.store_i32(out + 40, simd.load_i64(a))
    simd.store_i16(out + 44, simd.load_i64(a))
    simd.store_i16(out + 46, simd.load_i64(a) >> 16)


@pytest.mark.parametrize("value", [0, 1, -1, 2**62 + 2**31 + 255, -(2**63), 2**63 - 1, 0x80FF80])
def test_scalars(value: int) -> None:
    data = np.array([value], np.int64)
    words = [data[0]] + [int(data.view(kind)[0]) for kind in ("i4", "u4", "i1", "u1")]
    results = call(scalars, data, data, np.int64, 6)
    assert results[:5].tolist() == words
    assert results[5:].view(np.uint32).tolist() == [value & 2**32 - 1] * 2


@three_integers
def scalar_floats(a: int, b: int, out: int) -> None:
    simd.store_f32(out, simd.load_f32(a))
    simd.store_f32(out + 4, np.float32(simd.load_f64(b) * 3.0))


def test_scalar_floats() -> None:
    result = call(scalar_floats, FLOATS, np.array([1e-3]), np.float32, 2)
    assert result.tolist() == [FLOATS[0], np.float32(3e-3)]


@three_integers
def widen_halves(a: int, count: int, out: int) -> None:
    for i in range(0, count, 16):
        store(out + 4 * i, simd.load_halves(a + 2 * i))
        store(out + 4 * (count + i), simd.load_bfloats(a + 2 * i))
        for j in range(i, i + 16):
            simd.store_f32(out + 4 * (2 * count + j), simd.load_f16(a + 2 * j))
            simd.store_f32(out + 4 * (3 * count + j), simd.load_bf16(a + 2 * j))


def test_every_half_and_bfloat_is_read_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty((4, 1 << 16), np.float32)
    widen_halves(every.ctypes.data, len(every), out.ctypes.data)
    with np.errstate(invalid="ignore"):
        halves = every.view(np.float16).astype(np.float32)
    bfloats = (every.astype(np.uint32) << 16).view(np.float32)
    for results, expected in ((out[0::2], halves), (out[1::2], bfloats)):
        number = ~np.isnan(expected)
        for result in results:
            assert (np.isnan(result) == ~number).all()
            assert (result[number].view("u4") == expected[number].view("u4")).all()


@three_integers
def narrow(a: int, count: int, out: int) -> None:
    for i in range(count):
        simd.store_f16(out + 2 * i, simd.load_f32(a + 4 * i))


def test_halves_are_rounded_as_in_numpy() -> None:
    random = np.random.default_rng(6)
    values = (random.standard_normal(1 << 14) * 2.0 ** random.integers(-30, 18, 1 << 14)).astype(
        "f4"
    )
    ties = (1 + (2 * np.arange(16) + 1) * 2.0**-11).astype(np.float32)
    subnormal = ((np.arange(16) + 0.5) * 2.0**-24).astype(np.float32)
    edges = np.array([65504, 65519, 65520, 1e30, np.inf, 0, -0.0, 2.0**-25] * 2, np.float32)
    values = np.concatenate([values, ties, subnormal, edges, -edges])
    out = np.empty(len(values), np.uint16)
    narrow(values.ctypes.data, len(values), out.ctypes.data)
    with np.errstate(over="ignore", under="ignore"):
        expected = values.astype(np.float16).view(np.uint16)
    assert (out == expected).all()


# ---- values ----


@three_integers
def conversions(a: int, b: int, out: int) -> None:
    words, floats = load(i32x16, a), load(f32x16, b)
    store(out, simd.convert(f32x16, words))
    store(out + 64, simd.convert(i32x16, floats * np.float32(100)))
    store(out + 128, simd.convert(i32x16, load(i8x16, a)))
    store(out + 192, simd.convert(i32x16, load(u8x16, a)))
    store(out + 256, simd.convert(f32x16, load(u32x16, a)))
    store(out + 320, simd.convert(i32x16, load(i16x16, a)))
    simd.store_bytes(out + 384, simd.convert(i32x16, load(i8x16, a)))
    store(out + 400, simd.bitcast(u8x32, load(i32x8, a)))


def test_conversions() -> None:
    out = call(conversions, WORDS, OTHERS, np.uint8, 432)
    rows = out[:384].reshape(6, 64)
    narrow_bytes = WORDS.view(np.int8)[:16]
    expected = [
        WORDS.astype(np.float32),
        np.trunc(OTHERS * np.float32(100)).astype(np.int32),
        narrow_bytes.astype(np.int32),
        WORDS.view(np.uint8)[:16].astype(np.int32),
        WORDS.view(np.uint32).astype(np.float32),
        WORDS.view(np.int16)[:16].astype(np.int32),
    ]
    for row, values in zip(rows, expected, strict=True):
        assert row.tolist() == values.view(np.uint8).tolist()
    assert out[384:400].view(np.int8).tolist() == narrow_bytes.tolist()
    assert out[400:].tolist() == WORDS.view(np.uint8)[:32].tolist()


@three_integers
def constants(a: int, b: int, out: int) -> None:
    store(out, simd.zero(i32x16))
    store(out + 64, simd.splat(f32x16, simd.load_f32(a)))


def test_constants() -> None:
    out = call(constants, FLOATS, FLOATS, np.uint8, 128)
    assert not out[:64].any()
    assert out[64:128].view(np.float32).tolist() == [FLOATS[0]] * 16


backwards = shuffles.lane_shuffle(list(range(15, -1, -1)))
doubled = shuffles.lane_shuffle([i // 2 for i in range(32)])
interleaved = shuffles.pair_shuffle([i // 2 + 16 * (i % 2) for i in range(16)])
some_bytes = shuffles.byte_shuffle([3, None, 15, *[0] * 13])
fields = shuffles.word_fields((0, 3, 5, 2), (0x3F, 0x1F, 0x07, 0x30))
squares = shuffles.byte_table([(i - 8) ** 2 - 30 for i in range(16)])
third_half = shuffles.half_in_each(4)


@three_integers
def rearranged(a: int, b: int, out: int) -> None:
    x = load(u8x64, b)
    store(out, backwards(load(f32x16, a)))
    store(out + 64, doubled(load(i16x16, b)))
    store(out + 128, interleaved(load(f32x16, a), load(f32x16, b)))
    store(out + 192, some_bytes(x))
    store(out + 256, fields(x))
    store(out + 320, squares(x & np.uint8(15)))
    store(out + 384, shuffles.each_bit(x))
    store(out + 448, shuffles.load_quad(b, 7))


def test_rearrangements() -> None:
    out = call(rearranged, FLOATS, BYTES, np.uint8, 512)
    assert out[:64].view(np.float32).tolist() == FLOATS[::-1].tolist()
    assert out[64:128].view(np.int16).tolist() == BYTES[:32].view(np.int16).repeat(2).tolist()
    both = np.stack([FLOATS[:8], BYTES.view(np.float32)[:8]], axis=1)
    assert out[128:192].tolist() == both.view(np.uint8).reshape(-1).tolist()
    quarters = BYTES.reshape(4, 16)
    picked = np.concatenate([quarters[:, [3, 3, 15]], quarters[:, [0] * 13]], axis=1)
    picked[:, 1] = 0
    assert out[192:256].tolist() == picked.reshape(-1).tolist()
    words = BYTES.view(np.uint32).reshape(4, 4) >> np.array([0, 3, 5, 2], np.uint32)
    kept = words & (np.array([0x3F, 0x1F, 0x07, 0x30], np.uint32) * np.uint32(0x01010101))
    assert out[256:320].tolist() == kept.reshape(-1).view(np.uint8).tolist()
    numbers = (BYTES & 15).astype(int)
    assert out[320:384].view(np.int8).tolist() == ((numbers - 8) ** 2 - 30).tolist()
    assert out[384:448].tolist() == (BYTES >> (np.arange(64) % 8) & 1).tolist()
    assert (
        out[448:].tolist() == np.concatenate([BYTES[i : i + 16] for i in (0, 7, 14, 21)]).tolist()
    )


@three_integers
def halves(a: int, b: int, out: int) -> None:
    store(out, third_half(load(u8x64, b)))
    store(out + 64, shuffles.half_words(load(u32x16, b), np.uint32(16)))
    store(out + 128, shuffles.exponent_scale(load(u32x16, a)))


@pytest.mark.parametrize("first", range(0, 256, 16))
def test_halves_and_exponents_inside_vectors(first: int) -> None:
    numbers = np.random.default_rng(5).standard_normal(32).astype(np.float16)
    exponents = np.arange(first, first + 16, dtype=np.uint32)
    out = call(halves, exponents, numbers, np.float32, 48)
    assert out[:16].tolist() == numbers[2::8].astype(np.float32).repeat(4).tolist()
    assert out[16:32].tolist() == numbers[1::2].astype(np.float32).tolist()
    assert out[32:].tolist() == [2.0 ** (e - 128) for e in range(first, first + 16)]


# ---- float arithmetic ----


@three_integers
def fused(a: int, b: int, out: int) -> None:
    x, y = load(f32x16, a), load(f32x16, b)
    store(out, arithmetic.fma(x, y, x))
    store(out + 64, arithmetic.fma(x, simd.load_f32(b), y))
    simd.store_f32(
        out + 128, arithmetic.fma(simd.load_f32(a), simd.load_f32(b), simd.load_f32(a + 4))
    )
    store(out + 132, arithmetic.fma(load(f32x8, a), load(f32x8, b), load(f32x8, a)))


def rounded_once(a: Array, b: Array, c: Array) -> list[float]:
    """a * b + c: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(np.float32).tolist()


def test_fused_products_are_rounded_once() -> None:
    x = (1 + FLOATS * np.float32(2.0**-10)).astype(np.float32)
    y = (1 - FLOATS * np.float32(2.0**-10)).astype(np.float32)
    minus = -np.ones(16, np.float32)
    data = np.concatenate([x, minus]), np.concatenate([y, minus])
    out = call(fused, *data, np.float32, 41)
    assert out[:16].tolist() == rounded_once(x, y, x)
    assert out[16:32].tolist() == rounded_once(x, y[:1], y)
    assert out[32] == rounded_once(x[:1], y[:1], x[1:2])[0]
    assert out[33:].tolist() == rounded_once(x[:8], y[:8], x[:8])


@three_integers
def elementwise(a: int, b: int, out: int) -> None:
    x, y = load(f32x16, a), load(f32x16, b)
    store(out, arithmetic.absolute(x))
    store(out + 64, arithmetic.nearest(x))
    store(out + 128, arithmetic.maximum(x, y))
    store(out + 192, arithmetic.minimum(x, y))
    store(out + 256, arithmetic.power_of_two(load(i32x16, b + 64)))


def test_elementwise() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 126.5, 2.4999998], np.float32)
    x = np.concatenate([x, 30 * FLOATS])[:16]
    exponents = np.array([-126, 127, 0, 1, -1, 10, *range(-20, 0, 2)], np.int32)
    data = np.concatenate([OTHERS, exponents.view(np.float32)])
    out = call(elementwise, x, data, np.float32, 80).reshape(5, 16)
    y = OTHERS
    expected = [abs(x), np.rint(x), np.maximum(x, y), np.minimum(x, y), 2.0**exponents]
    assert out.tolist() == np.array(expected, np.float32).tolist()


@three_integers
def folded(a: int, b: int, out: int) -> None:
    simd.store_f32(out, arithmetic.lane_sum(load(f32x16, a)))
    simd.store_f32(out + 4, arithmetic.lane_maximum(load(f32x16, a)))
    simd.store_i32(out + 8, np.int64(arithmetic.lane_sum(load(i32x16, b))))
    simd.store_f32(out + 12, arithmetic.lane_sum(load(f32x8, a)))


def halved(x: Array) -> np.float32:
    """The sum of x, its halves added until one is left."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return np.float32(x[0])


@pytest.mark.parametrize("place", range(16))
def test_folds(place: int) -> None:
    x = FLOATS.copy()
    x[place] = 50
    out = call(folded, x, WORDS, np.float32, 4)
    assert out[[0, 1, 3]].tolist() == [halved(x), 50, halved(x[:8])]
    assert (int(out[2:3].view(np.int32)[0]) - WORDS.sum(dtype=np.int64)) % 2**32 == 0


# ---- threads ----


@three_integers
def shared_words(cell: int, value: int, out: int) -> None:
    simd.store_i64(out, atomics.atomic_add(cell, value))
    simd.store_i64(out + 8, atomics.atomic_load(cell))
    atomics.atomic_store(cell, 7)
    atomics.pause()


def test_atomics() -> None:
    cell, out = np.array([2**40], np.int64), np.zeros(2, np.int64)
    shared_words(cell.ctypes.data, -3, out.ctypes.data)
    assert out.tolist() == [2**40, 2**40 - 3]
    assert cell[0] == 7


call_two = calls.function_call(2)
call_half = calls.function_call(1, types.int32)


@three_integers
def calls(function: int, other: int, out: int) -> None:
    call_two(function, (out, 40))
    simd.store_i64(out + 8, np.int64(call_half(other, (np.int64(-7),))))


def test_functions_are_called_by_address() -> None:
    out = np.zeros(2, np.int64)
    memory = ctypes.c_int64.from_address

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
    def store_twice(place: int, value: int) -> None:
        memory(place).value = 2 * value

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
    def half(value: int) -> int:
        return math.floor(value / 2)

    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in (store_twice, half)]
    calls(addresses[0] or 0, addresses[1] or 0, out.ctypes.data)
    assert out.tolist() == [80, -4]


@pytest.mark.parametrize("cpu", ["generic", "haswell"])
def test_on_lesser_machines(cpu: str, tmp_path: Path) -> None:
    """All of the above, where halves are converted and vectors are split in other ways."""
    environment = compiled_for(cpu, tmp_path)
    chosen = [__file__, "-k", "not lesser", "-q", "-p", "no:cacheprovider"]
    assert " passed" in run_python(["-m", "pytest", *chosen], environment)
