"""Dense products cut into tasks: every row once, whatever the chunk and the threads."""

import numpy as np
import pytest

from ondevice.kernels.formats import READERS
from ondevice.kernels.linear import linear
from tests.ondevice.kernels.harness import (
    PRODUCT_ERROR,
    Rows,
    bits,
    gaussian_blocks,
    multiply,
    product_error,
    random_records,
    run,
)


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_chunks_and_threads_change_no_bit(name: str) -> None:
    random = np.random.default_rng(1)
    rows, columns, tokens = 45, 256, 5
    raw = gaussian_blocks(name, rows, columns, random)
    records = random_records(READERS[name].activation, tokens, columns, random)
    expected = multiply(name, raw, columns, records)
    assert product_error(name, raw, records, expected) <= PRODUCT_ERROR
    for chunk in (8, 16, 40, 45, 64):
        for threads in (1, 3):
            out = Rows(tokens, rows)
            run(
                linear,
                *(raw, raw.strides[0], rows, columns, READERS[name].multiply.address),
                *(records, records.strides[0], out, chunk),
                tasks=-(-rows // chunk),
                count=tokens,
                threads=threads,
                scratch=READERS[name].scratch_bytes(columns),
            )
            assert bits(out.values) == bits(expected), f"chunks of {chunk}, {threads} threads"
