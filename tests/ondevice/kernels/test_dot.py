"""Products of every format against gguf's weights times the activations that a record means."""

import sys
from pathlib import Path

import numpy as np
import pytest

from ondevice.kernels.dot import (
    blocks,
    expanded,
    floats,
    iq4_xs,
    mxfp4,
    pairs,
    q4_k,
    q6_k,
    q8_0,
    tile,
)
from ondevice.kernels.formats import READERS
from ondevice.kernels.simd import X86
from quant.registry import FORMATS
from tests.ondevice.kernels.harness import (
    MACHINES,
    PRODUCT_ERROR,
    WRITTEN,
    Rows,
    bits,
    compiled_for,
    gaussian_blocks,
    multiply,
    product_error,
    random_blocks,
    random_records,
    run_python,
)

EACH = pytest.mark.parametrize("name", READERS)
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 17, tile.CHUNK + 3)
ROWS = (1, 3, 4, 6, tile.ROWS - 1, tile.ROWS, 2 * tile.ROWS + 3)
SEED = 4
LESSER = ["F16", "Q8_0", "Q4_0", "Q5_1", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def column_counts(name: str) -> list[int]:
    length = FORMATS[name].length
    if length == 1:
        return [1, 5, 15, 16, 33, 100]
    if length == 32:  # may be taken two or four at a time, and be added up in pairs of eight
        return [length, 2 * length, 12 * length, 13 * length]
    return [length, 2 * length, 3 * length, 5 * length]


def test_every_family_of_formats_is_here() -> None:
    modules = (blocks, expanded, floats, iq4_xs, mxfp4, pairs, q4_k, q6_k, q8_0)
    families = {module.__name__ for module in modules}
    assert {reader.multiply.__module__ for reader in READERS.values()} == families


@EACH
@pytest.mark.parametrize("source", ["encoded", "random", "extreme"])
def test_products_differ_by_rounding_only(name: str, source: str) -> None:
    if source == "encoded" and name not in WRITTEN:
        pytest.skip(f"{name} is only read")
    random = np.random.default_rng(SEED)
    extreme = source == "extreme"
    for columns in column_counts(name):
        for rows in ROWS:
            if source == "encoded":
                raw = gaussian_blocks(name, rows, columns, random)
            else:
                raw = random_blocks(name, rows, columns, random, extreme)
            records = random_records(READERS[name].activation, TOKENS[-1], columns, random, extreme)
            for tokens in TOKENS:
                product = multiply(name, raw, columns, records[:tokens])
                error = product_error(name, raw, records[:tokens], product)
                assert error <= PRODUCT_ERROR, f"{rows} x {columns}, {tokens} tokens: {error:.1e}"


@EACH
def test_bits_depend_on_neither_batch_nor_pieces(name: str) -> None:
    random = np.random.default_rng(SEED)
    for columns in column_counts(name):
        raw = random_blocks(name, 35, columns, random)
        records = random_records(READERS[name].activation, TOKENS[-1], columns, random)
        whole = multiply(name, raw, columns, records)
        for tokens in TOKENS:
            assert bits(multiply(name, raw, columns, records[:tokens])) == bits(whole[:tokens])
        for token in range(17):
            alone = multiply(name, raw, columns, records[token : token + 1])
            assert bits(alone[0]) == bits(whole[token])
        for tokens in (1, 2, 6):
            pieces = [
                multiply(name, raw[start:end], columns, records[:tokens])
                for start, end in ((0, 1), (1, 4), (4, 9), (9, 25), (25, 35))
            ]
            assert bits(np.concatenate(pieces, axis=1)) == bits(whole[:tokens])


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_a_wide_row_keeps_to_its_scratch(name: str) -> None:
    random = np.random.default_rng(SEED)
    raw = random_blocks(name, 5, 8192, random)
    records = random_records(READERS[name].activation, 3, 8192, random)
    for tokens in (1, 2, 3):
        product = multiply(name, raw, 8192, records[:tokens])
        assert product_error(name, raw, records[:tokens], product) <= PRODUCT_ERROR


@pytest.mark.skipif(not X86, reason="results are streamed on x86")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_results_that_do_not_stay_in_the_caches(name: str) -> None:
    random = np.random.default_rng(SEED)
    columns = FORMATS[name].length
    rows = 40 * tile.ROWS
    tokens = tile.LARGE // (4 * rows) + 100
    raw = random_blocks(name, rows, columns, random)
    records = random_records(READERS[name].activation, tokens, columns, random)
    whole = multiply(name, raw, columns, records)
    for start in range(0, tokens, 400):
        part = slice(start, start + 400)
        assert bits(multiply(name, raw, columns, records[part])) == bits(whole[part])


@EACH
def test_indices_choose_the_tokens_and_the_places(name: str) -> None:
    random = np.random.default_rng(SEED)
    columns = column_counts(name)[-1]
    raw = random_blocks(name, tile.ROWS + 3, columns, random)
    records = random_records(READERS[name].activation, 20, columns, random)
    whole = multiply(name, raw, columns, records)
    for tokens in TOKENS[:-1]:
        source = random.integers(0, len(records), tokens).astype(np.int32)
        target = random.permutation(30)[:tokens].astype(np.int32)
        assert bits(multiply(name, raw, columns, records, source)) == bits(whole[source])
        out = Rows(30, len(raw))
        multiply(name, raw, columns, records, source, target, out)
        assert bits(out.values[target]) == bits(whole[source])
        others = np.setdiff1d(np.arange(30), target)
        assert np.isnan(out.values[others]).all(), "a row that nobody asked for was written"


@EACH
def test_rows_may_lie_apart(name: str) -> None:
    """A row of weights may be followed by others' bytes, as in a fused tensor."""
    random = np.random.default_rng(SEED)
    columns = column_counts(name)[0]
    raw = random_blocks(name, 9, columns, random)
    apart = Rows.of(raw)
    records = random_records(READERS[name].activation, 5, columns, random)
    assert bits(multiply(name, apart.values, columns, records)) == bits(
        multiply(name, raw, columns, records)
    )


def check_in_process(names: list[str], environment: dict[str, str]) -> str:
    """`check_products` in a process of its own; returns the features it was compiled for."""
    code = (
        "from ondevice.kernels.simd import FEATURES; from tests.ondevice.kernels import harness; "
        f"harness.check_products({names}); print(*sorted(FEATURES))"
    )
    return run_python(["-c", code], environment)


NEEDS_MPROTECT = pytest.mark.skipif(sys.platform == "win32", reason="there is no mprotect")


@NEEDS_MPROTECT
def test_nothing_beyond_the_inputs_is_read() -> None:
    check_in_process(list(READERS), {})


@NEEDS_MPROTECT
@pytest.mark.parametrize("cpu", MACHINES)
def test_products_on_lesser_machines(cpu: str, tmp_path: Path) -> None:
    found = check_in_process(LESSER, compiled_for(cpu, tmp_path))
    assert found.split() == sorted(MACHINES[cpu].split())
