"""int8 records by their documented layout; exp, sigmoid and SiLU against float64."""

import numpy as np
import pytest

from ondevice.kernels import activation
from ondevice.kernels.activation import NONE, PER_32, PER_256
from ondevice.kernels.dot import superblock
from ondevice.kernels.operation import CompiledFunction
from ondevice.kernels.simd import f32x16, load, load_f32, store, store_f32
from quant.format import Array
from quant.jit import from_python
from tests.ondevice.kernels.harness import (
    Rows,
    bits,
    meant,
    run,
    sums_of,
    three_integers,
    unpack,
)

KINDS = pytest.mark.parametrize("kind", [PER_256, PER_32], ids=["per 256", "per 32"])
COLUMNS = 512
GROUP = {PER_256: 256, PER_32: 32}


def quantized(values: Array, kind: int, per_token: int = 1, threads: int = 2) -> Array:
    """Records of values (rows, columns)."""
    rows, columns = values.shape
    records = Rows(rows, activation.record_bytes(kind, columns), np.uint8)
    places = [records, 0, 0] if kind == PER_256 else [0, 0, records]
    run(
        activation.quantize,
        *(Rows.of(values), columns, *places),
        tasks=per_token,
        per_token=True,
        count=rows // per_token,
        threads=threads,
    )
    return records.values


def gaussian(rows: int = 3) -> Array:
    return np.random.default_rng(1).standard_normal((rows, COLUMNS)).astype(np.float32)


def with_one_value() -> Array:
    values = np.zeros((3, COLUMNS), np.float32)
    values[[0, 1, 2], [0, 37, 511]] = 3.5, -1e-3, 1e20
    return values


INPUTS = {
    "gaussian": gaussian(),
    "negative": -abs(gaussian()),
    "zeros": np.zeros((1, COLUMNS), np.float32),
    "one value": with_one_value(),
    "tiny": gaussian() * np.float32(1e-34),
    "huge": gaussian() * np.float32(1e36),
    "halves": np.tile(np.arange(-127, 129, dtype=np.float32) / 2, (1, 2)),
}


def test_places_in_a_record() -> None:
    records = quantized(gaussian(), PER_256)
    codes, scales, _ = unpack(PER_256, records, COLUMNS)
    wanted = (
        (superblock.scales_at, scales),
        (superblock.sums_of_16_at, sums_of(codes, 16).astype(np.int16)),
        (superblock.sums_of_32_at, sums_of(codes, 32).astype(np.int16)),
    )
    for place, values in wanted:
        at = from_python(place)(COLUMNS)
        found = records[:, at : at + values[0].nbytes].copy().view(values.dtype)
        assert bits(found) == bits(values)


@KINDS
@pytest.mark.parametrize("values", INPUTS.values(), ids=INPUTS)
def test_records_mean_the_values(kind: int, values: Array) -> None:
    records = quantized(values, kind)
    codes, scales, sums = unpack(kind, records, COLUMNS)
    groups = values.reshape(len(values), -1, GROUP[kind])
    assert bits(scales) == bits(abs(groups).max(axis=2) / np.float32(127))
    assert abs(codes.astype(int)).max() <= 127
    step = np.repeat(scales.astype(np.float64), GROUP[kind], axis=1)
    # 127 / max is rounded, and so is its product with a value: a hundredth of a thousandth
    assert (abs(meant(kind, records, COLUMNS) - values) <= (0.5 + 3e-5) * step).all()
    if kind == PER_256:
        expected = np.concatenate([sums_of(codes, 16), sums_of(codes, 32)], axis=1)
    else:
        expected = -8 * sums_of(codes, 32)
    assert (sums == expected).all()


@KINDS
def test_halves_are_rounded_to_even(kind: int) -> None:
    values = np.zeros((1, COLUMNS), np.float32)
    values[:, ::32] = 127
    values[:, 1::32] = 0.5
    values[:, 2::32] = 1.5
    values[:, 3::32] = -2.5
    codes = unpack(kind, quantized(values, kind), COLUMNS)[0]
    assert codes.reshape(-1, 32)[:, :4].tolist() == [[127, 0, 2, -2]] * 16


@KINDS
def test_subnormal_values_become_small(kind: int) -> None:
    values = gaussian() * np.float32(1e-40)
    assert abs(meant(kind, quantized(values, kind), COLUMNS)).max() <= abs(values).max()


@KINDS
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(kind: int, wrong: float) -> None:
    """A damaged weight makes NaN; logits made from a record that hides it would look fine."""
    values = gaussian()
    values[1, 40] = wrong
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(meant(kind, quantized(values, kind), COLUMNS))
    assert finite[[0, 2]].all()
    assert not finite[1].all()


@KINDS
def test_a_record_does_not_depend_on_others(kind: int) -> None:
    values = gaussian(12)
    whole = quantized(values, kind, threads=1)
    assert quantized(values, kind, per_token=3).tolist() == whole.tolist()
    for row in range(12):
        assert quantized(values[row : row + 1], kind).tolist() == whole[row : row + 1].tolist()


def test_both_records_at_once() -> None:
    values = gaussian()
    both = {
        kind: Rows(3, activation.record_bytes(kind, COLUMNS), np.uint8)
        for kind in (PER_256, PER_32)
    }
    run(activation.quantize, Rows.of(values), COLUMNS, both[PER_256], both[PER_32], tasks=3)
    for kind, records in both.items():
        assert records.values.tolist() == quantized(values, kind).tolist()


def test_record_bytes_are_an_odd_number_of_cache_lines() -> None:
    assert activation.record_bytes(PER_256, 256) == 320  # 256 codes, a scale, 24 sums of 2
    assert activation.record_bytes(PER_32, 32) == 64  # 32 codes, a scale, a sum
    assert activation.record_bytes(PER_32, 256) == 320
    assert activation.record_bytes(NONE, 17) == 192


# ---- elementwise functions ----


@three_integers
def exponentials(x: int, count: int, out: int) -> None:
    for i in range(0, count, 16):
        store(out + 4 * i, activation.exponential(load(f32x16, x + 4 * i)))


@three_integers
def powers(x: int, count: int, out: int) -> None:
    for i in range(0, count, 16):
        store(out + 4 * i, activation.exponential_2(load(f32x16, x + 4 * i)))


@three_integers
def sigmoids(x: int, count: int, out: int) -> None:
    for i in range(0, count, 16):
        store(out + 4 * i, activation.sigmoid(load(f32x16, x + 4 * i)))


@three_integers
def silus(x: int, count: int, out: int) -> None:
    for i in range(0, count, 16):
        store(out + 4 * i, activation.silu(load(f32x16, x + 4 * i)))


@three_integers
def single_sigmoids(x: int, count: int, out: int) -> None:
    for i in range(count):
        store_f32(out + 4 * i, activation.sigmoid_of(load_f32(x + 4 * i)))


@three_integers
def gated(gate: int, columns: int, up: int) -> None:
    activation.silu_times(gate, up, columns, gate)


def applied(function: CompiledFunction, values: Array) -> Array:
    values = np.ascontiguousarray(values, np.float32)
    out = np.full_like(values, np.nan)
    function(values.ctypes.data, values.size, out.ctypes.data)
    return out


def relative_error(result: Array, exact: Array) -> float:
    return float((abs(result - exact) / abs(exact)).max())


ULP = 2.0**-23
WIDE = np.linspace(-87, 88, 1 << 16).astype(np.float32)
NARROW = np.linspace(-0.01, 0.01, 1 << 12).astype(np.float32)


def exact_sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


@pytest.mark.parametrize("x", [WIDE, NARROW], ids=["wide", "narrow"])
def test_exponential_is_exact_to_an_ulp(x: Array) -> None:
    assert relative_error(applied(exponentials, x), np.exp(x.astype(np.float64))) <= ULP


@pytest.mark.parametrize("x", [(WIDE - 88) * 0.719, NARROW], ids=["wide", "narrow"])
def test_exponential_2_is_exact_to_two_ulp(x: Array) -> None:
    assert relative_error(applied(powers, x), np.exp2(x.astype(np.float64))) <= 2 * ULP


def test_exponential_2_of_what_is_far_below() -> None:
    x = np.array([0.0, -1.0, -126, -127, -1e30, -np.inf] * 3, np.float32)[:16]
    found = applied(powers, x)
    assert found[:3].tolist() == [1, 0.5, 2.0**-126]
    assert ((found[3:6] > 0) & (found[3:6] <= 2.0**-126)).all()


@pytest.mark.parametrize("x", [WIDE, NARROW], ids=["wide", "narrow"])
def test_sigmoid_and_silu_are_exact_to_two_ulp(x: Array) -> None:
    exact = exact_sigmoid(x)
    normal = exact > 2.0**-126
    assert relative_error(applied(sigmoids, x)[normal], exact[normal]) <= 2 * ULP
    normal &= x != 0
    assert relative_error(applied(silus, x)[normal], (exact * x)[normal]) <= 3 * ULP
    assert bits(applied(single_sigmoids, x[::64])) == bits(applied(sigmoids, x)[::64])


def test_special_values() -> None:
    x = np.array([0.0, -0.0, 100, 1e30, np.inf, -100, -1e30, -np.inf] * 2, np.float32)
    with np.errstate(all="ignore"):
        great, small = np.float32(np.exp(88.0)), np.float32(np.exp(-87.0))
    exponential = applied(exponentials, x)[:8]
    assert exponential[:2].tolist() == [1, 1]
    np.testing.assert_allclose(exponential[2:5], great, rtol=ULP)
    np.testing.assert_allclose(exponential[5:], small, rtol=ULP)
    sigmoid = applied(sigmoids, x)[:8]
    assert sigmoid[:5].tolist() == [0.5, 0.5, 1, 1, 1]
    assert (sigmoid[5:] < 1e-38).all()
    silu = applied(silus, x)[:8]
    assert silu[:5].tolist() == [0, 0, 100, np.float32(1e30), np.inf]
    assert -1e-30 < silu[5] <= 0


@pytest.mark.parametrize(
    "function",
    [exponentials, powers, sigmoids, silus],
    ids=["exp", "exp 2", "sigmoid", "silu"],
)
def test_nan_stays_nan(function: CompiledFunction) -> None:
    x = np.full(16, np.nan, np.float32)
    assert np.isnan(applied(function, x)).all()


@pytest.mark.parametrize("columns", [1, 15, 16, 40])
def test_silu_times_stays_within_its_columns(columns: int) -> None:
    random = np.random.default_rng(2)
    gate, up = (random.standard_normal((1, columns)).astype(np.float32) for _ in range(2))
    both = Rows.of(gate), Rows.of(up)
    gated(both[0].address, columns, both[1].address)
    for rows in both:
        rows.check()
    np.testing.assert_allclose(both[0].values, gate * exact_sigmoid(gate) * up, rtol=5 * ULP)
    assert bits(both[1].values) == bits(up)
