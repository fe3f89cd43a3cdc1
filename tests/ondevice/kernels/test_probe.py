"""Reading memory for the bandwidth probe: every byte once."""

import numpy as np

from ondevice.kernels import probe
from tests.ondevice.kernels.harness import run


def test_every_word_is_added_once() -> None:
    words = np.random.default_rng(1).integers(-(2**31), 2**31, 5 * probe.CHUNK // 4, np.int32)
    sums = np.full(6, -1, np.int64)
    run(probe.read_memory, words, sums, tasks=5)
    assert sums[-1] == -1
    chunks = words.reshape(5, -1).sum(axis=1, dtype=np.int64)
    assert ((sums[:-1] - chunks) % 2**32 == 0).all()
