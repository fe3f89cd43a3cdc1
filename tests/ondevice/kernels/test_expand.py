"""Expansion of single rows against gguf and quant, bit for bit."""

import numpy as np
import pytest

from ondevice.kernels import expand
from ondevice.kernels.formats import READERS
from quant.format import Array
from quant.registry import FORMATS
from tests.ondevice.kernels.harness import WRITTEN, Rows, bits, expanded, gaussian_blocks, run

EACH = pytest.mark.parametrize("name", READERS)


def expand_rows(name: str, raw: Array, columns: int) -> Array:
    out = Rows(len(raw), columns)
    for row in range(len(raw)):
        READERS[name].expand(raw[row].ctypes.data, columns, out.address + row * out.row_bytes)
    out.check()
    return out.values


@EACH
def test_any_bytes_expand_as_in_gguf(name: str) -> None:
    # every value of every byte, with scales that are zero, subnormal, infinite and NaN
    format = FORMATS[name]
    shape = (64, 64 * format.block.itemsize)
    raw = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    ours, theirs = expand_rows(name, raw, 64 * format.length), expanded(name, raw)
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    assert not np.isfinite(theirs).all()
    number = ~np.isnan(theirs)
    assert bits(ours[number]) == bits(theirs[number])


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("blocks", [1, 3])
def test_encoded_weights_expand_as_in_quant(name: str, blocks: int) -> None:
    format = FORMATS[name]
    columns = blocks * format.length
    raw = gaussian_blocks(name, 5, columns, np.random.default_rng(2))
    assert bits(expand_rows(name, raw, columns)) == bits(format.dequantize(format.blocks(raw)))


@pytest.mark.parametrize("threads", [1, 3])
def test_embed_looks_up_every_token(threads: int) -> None:
    name, columns = "Q4_K", 512
    raw = gaussian_blocks(name, 9, columns, np.random.default_rng(3))
    tokens = np.array([8, 0, 3, 3, 5, 8, 1], np.int32)
    out = Rows(len(tokens) + 1, columns)
    run(
        expand.embed,
        *(raw, raw.strides[0], columns, READERS[name].expand.address, out),
        tasks=len(tokens),
        tokens=tokens,
        threads=threads,
    )
    assert bits(out.values[:-1]) == bits(expanded(name, raw)[tokens])
    assert np.isnan(out.values[-1]).all()
