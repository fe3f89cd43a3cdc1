"""The probes do all the work they are timed for: every byte once, every product."""

import numpy as np
import pytest

from ondevice.kernels import probe
from ondevice.kernels.probe import PEAK_BYTES, PEAK_MACS, PEAK_TOTAL
from tests.ondevice.kernels.harness import run


def test_every_word_is_added_once() -> None:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, 5 * probe.CHUNK // 4, np.int32)
    sums = np.full(6, -1, np.int64)
    run(probe.read_memory, words, sums, tasks=5)
    assert sums[-1] == -1
    chunks = words.reshape(5, -1).sum(axis=1, dtype=np.int64)
    assert ((sums[:-1] - chunks) % 2**32 == 0).all()


def test_every_product_is_added() -> None:
    lanes = PEAK_BYTES.lanes
    if lanes != PEAK_MACS:
        pytest.skip("a matrix product adds other pairs; test_simd has its instruction")
    vectors = np.random.default_rng(2).integers(0, 128, (probe.VECTORS, 64), np.uint8)
    sums = np.full(3, -1, np.int64)
    run(probe.multiply_bytes, vectors, sums, tasks=2)
    used = vectors[:, :lanes].astype(np.int64)
    activations, weights = used[:2], used[2:].reshape(4, probe.CHAINS // 2, lanes)
    products = np.einsum("al,tcl->act", activations, weights).sum() * (probe.TURNS // 4)
    start = PEAK_TOTAL.lanes * sum(range(probe.CHAINS))
    bits = 2**PEAK_TOTAL.element.bitwidth
    assert ((sums[:2] - products - start) % bits == 0).all()
    assert sums[2] == -1
    assert activations.size * weights.size // 4 // lanes * probe.TURNS == probe.PRODUCTS
