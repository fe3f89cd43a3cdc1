"""Norms against float64, and the records that they leave for the next product."""

import numpy as np
import pytest

from ondevice.kernels import norm
from ondevice.kernels.activation import PER_32, PER_256, record_bytes
from ondevice.kernels.layout import FEW
from quant.format import Array
from tests.ondevice.kernels.harness import Rows, bits, meant, run, unpack

EPSILON = 1e-6
ROUNDING = 5e-7  # of float32, through a sum, a root and two products


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_norm(x: Array, weight: Array, epsilon: float = EPSILON) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def records_for(tokens: int, columns: int) -> dict[int, Rows]:
    return {kind: Rows(tokens, record_bytes(kind, columns), np.uint8) for kind in (PER_256, PER_32)}


def check_records(records: dict[int, Rows], values: Array) -> None:
    """Records hold values (tokens, columns) to within half a step of their own scale."""
    for kind, rows in records.items():
        scales = unpack(kind, rows.values, values.shape[1])[1]
        groups = values.reshape(*scales.shape, -1)
        assert bits(scales) == bits(abs(groups).max(axis=2) / np.float32(127))
        step = np.repeat(scales, groups.shape[2], axis=1)
        difference = abs(meant(kind, rows.values, values.shape[1]) - values)
        assert (difference <= 0.5001 * step).all()


@pytest.mark.parametrize("columns", [1, 5, 16, 33, 512])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_rms_norm(columns: int, size: float) -> None:
    x, weight = normal(5, columns) * np.float32(size), normal(columns, seed=2)
    rows, out = Rows.of(x), Rows(5, columns)
    run(norm.rms_norm, rows, columns, weight, EPSILON, 0, 0, out, tasks=5, threads=3)
    np.testing.assert_allclose(out.values, exact_norm(x, weight), rtol=ROUNDING)
    assert bits(rows.values) == bits(x)


def test_zeros_stay_zeros() -> None:
    out, records = Rows(1, 256), records_for(1, 256)
    zeros = Rows.of(np.zeros((1, 256), np.float32))
    weight = normal(256)
    run(norm.rms_norm, zeros, 256, weight, EPSILON, 0, 0, out, *records.values())
    assert not out.values.any()
    for kind, rows in records.items():
        assert not meant(kind, rows.values, 256).any()


def test_rms_norm_adds_and_leaves_records() -> None:
    columns = 512
    x, addend, weight = normal(6, columns), normal(6, columns, seed=2), normal(columns, seed=3)
    rows, out, records = Rows.of(x), Rows(6, columns), records_for(6, columns)
    run(
        norm.rms_norm,
        *(rows, columns, weight, EPSILON, Rows.of(addend), out, *records.values()),
        tasks=6,
    )
    assert bits(rows.values) == bits(x + addend)
    np.testing.assert_allclose(out.values, exact_norm(x + addend, weight), rtol=ROUNDING)
    check_records(records, out.values)


def test_rms_norm_from_a_later_row() -> None:
    """The output head starts in the middle of a batch; its results start at its own first row."""
    columns = 40
    x, addend, weight = normal(9, columns), normal(9, columns, seed=2), normal(columns, seed=3)
    rows, out = Rows.of(x), Rows(3, columns)
    run(norm.rms_norm, rows, columns, weight, EPSILON, Rows.of(addend), out, tasks=3, first=5)
    sums = x.copy()
    sums[5:8] += addend[5:8]
    assert bits(rows.values) == bits(sums)
    np.testing.assert_allclose(out.values, exact_norm(sums[5:8], weight), rtol=ROUNDING)


def test_a_token_does_not_depend_on_its_batch() -> None:
    columns = 256
    x, weight = normal(7, columns), normal(columns, seed=2)
    whole = Rows(7, columns)
    run(norm.rms_norm, Rows.of(x), columns, weight, EPSILON, 0, 0, whole, tasks=7, threads=3)
    for token in range(7):
        out = Rows(1, columns)
        run(norm.rms_norm, Rows.of(x[token : token + 1]), columns, weight, EPSILON, 0, 0, out)
        assert bits(out.values[0]) == bits(whole.values[token])


@pytest.mark.parametrize("tokens", [4, FEW + 1])
@pytest.mark.parametrize(
    ("heads", "size", "heads_of_task"),
    [(1, 256, 1), (4, 256, 2), (8, 64, 4), (32, 8, 32), (3, 24, 1), (5, 17, 1)],
)
def test_gated_norm(heads: int, size: int, heads_of_task: int, tokens: int) -> None:
    columns = heads * size
    x, z, weight = normal(tokens, columns), 3 * normal(tokens, columns, seed=2), normal(size)
    rows = Rows.of(x)
    records = records_for(tokens, columns) if columns % 256 == 0 else {}
    addresses = list(records.values()) or [0, 0, 0, 0]
    run(
        norm.gated_norm,
        *(rows, Rows.of(z), heads, size, weight, EPSILON, *addresses, heads_of_task),
        per_token=True,
        few=heads // heads_of_task,
        count=tokens,
    )
    gate = z.astype(np.float64)
    exact = exact_norm(x.reshape(tokens, heads, size), weight).reshape(x.shape)
    exact *= gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(rows.values, exact, rtol=2 * ROUNDING)
    check_records(records, rows.values)
