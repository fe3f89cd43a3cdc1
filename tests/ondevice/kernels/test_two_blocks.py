"""Two blocks at a time and one block at a time: the same sums, bit for bit."""

import numpy as np
import pytest

from ondevice.kernels.dot.block import BLOCK, scale_at, sums_at
from ondevice.kernels.dot.two_blocks import TWO
from ondevice.kernels.formats import READERS
from quant.registry import FORMATS
from tests.ondevice.kernels.harness import bits, multiply, pack, random_blocks

SEED = 11


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "MXFP4", "Q8_0"])
@pytest.mark.parametrize("extreme", [False, True])
def test_a_block_that_adds_nothing_changes_nothing(name: str, extreme: bool) -> None:
    """An odd number of blocks is taken one at a time, and with one more two at a time."""
    random = np.random.default_rng(SEED)
    odd, even = 13 * BLOCK, 14 * BLOCK
    assert even % TWO == 0 and odd % TWO
    raw = random_blocks(name, 9, even, random, extreme)
    codes = random.integers(-127, 128, (3, even), np.int8)
    if extreme:
        # the greatest sums: each row has one code only, and all activations are of one sign
        header = 1 if name == "MXFP4" else 2
        ends = np.array([0x00, 0x77, 0x7F, 0x80, 0x81, 0x88, 0xF7, 0xFF, 0x0F], np.uint8)
        raw.reshape(9, 14, -1)[:, :, header:] = ends[:, None, None]
        codes[:] = np.array([127, -127, 127], np.int8)[:, None]
    codes[:, odd:] = 0
    scales = 10.0 ** random.uniform(-4, 0, (3, 14))
    scales[:, -1] = 0
    kind = READERS[name].activation
    whole = pack(kind, codes, scales)
    shorter = pack(kind, codes[:, :odd], scales[:, :-1])
    rest = np.ascontiguousarray(raw[:, : FORMATS[name].row_bytes(odd)])
    for tokens in (1, 2, 3):
        expected = multiply(name, rest, odd, shorter[:tokens])
        assert bits(multiply(name, raw, even, whole[:tokens])) == bits(expected)


def test_where_records_have_what() -> None:
    random = np.random.default_rng(SEED)
    columns = 5 * BLOCK
    codes = random.integers(-127, 128, (1, columns), np.int8)
    scales = random.uniform(0, 1, (1, 5)).astype(np.float32)
    record = pack(READERS["Q4_0"].activation, codes, scales)[0].view(np.uint8)
    for b in range(5):
        scale, total = (at.py_func(columns, b) for at in (scale_at, sums_at))
        assert record[scale : scale + 4].view(np.float32)[0] == scales[0, b]
        expected = -8 * codes[0, BLOCK * b : BLOCK * (b + 1)].astype(int).sum()
        assert record[total : total + 4].view(np.int32)[0] == expected
