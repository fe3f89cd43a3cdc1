"""The stored bytes mean what GGUF says they mean: against the `gguf` package."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.errors import Error
from quant.format import Format
from quant.measure import bits_per_weight, normalised_rmse, rmse
from quant.registry import BY_TYPE, FORMATS, TYPE_NAMES, unsupported

ALL = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
BLOCKS = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
]
READ_ONLY = ["Q4_1", "Q2_K", "Q3_K"]


def test_the_registry_holds_every_format_once() -> None:
    assert list(FORMATS) == ["F32", "F16", "BF16", *BLOCKS]
    assert len(BY_TYPE) == len(FORMATS)
    assert all(FORMATS[format.name] is format for format in BY_TYPE.values())


def test_some_formats_are_read_only() -> None:
    assert [format.name for format in FORMATS.values() if format.quantize is None] == READ_ONLY


@ALL
def test_number_length_and_size_are_those_of_gguf(format: Format) -> None:
    kind = gguf.GGMLQuantizationType[format.name]
    assert format.type_id == kind.value
    assert (format.length, format.block.itemsize) == gguf.GGML_QUANT_SIZES[kind]


def test_type_names_are_those_of_gguf() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert TYPE_NAMES[kind.value] == kind.name
    assert all(TYPE_NAMES[number] == format.name for number, format in BY_TYPE.items())


@ALL
def test_dequantize_equals_gguf_bit_for_bit_on_random_bytes(format: Format) -> None:
    # 4096 blocks: every value of every byte, and scales that are zero, subnormal, infinite, NaN
    raw = np.random.default_rng(1).integers(0, 256, (64, 64 * format.block.itemsize), np.uint8)
    with np.errstate(all="ignore"):
        ours = format.dequantize(format.blocks(raw))
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[format.name])
    assert ours.dtype == np.float32
    assert not np.isfinite(theirs).all()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@ALL
def test_blocks_are_a_view_of_read_only_bytes_in_any_number_of_dimensions(format: Format) -> None:
    raw = np.zeros((2, 3, 5 * format.block.itemsize), np.uint8)
    raw.flags.writeable = False
    blocks = format.blocks(raw)
    assert blocks.shape == (2, 3, 5)
    assert np.shares_memory(blocks, raw)
    weights = format.dequantize(blocks)
    assert weights.shape == (2, 3, 5 * format.length)
    assert weights.flags.writeable


@ALL
def test_row_bytes(format: Format) -> None:
    assert format.row_bytes(3 * format.length) == 3 * format.block.itemsize
    if format.length > 1:
        message = f"a row of 1000 weights cannot be {format.name}: .* multiple of {format.length}"
        with pytest.raises(Error, match=message):
            format.row_bytes(1000)
        if format.quantize is not None:
            with pytest.raises(Error, match="1000 weights"):
                format.quantize(np.zeros((2, 1000), np.float32))
        with pytest.raises(Error, match=f"7 bytes per row cannot be {format.name}"):
            format.blocks(np.zeros((2, 7), np.uint8))


def test_reading_formats_does_not_load_numba() -> None:
    code = "import sys, quant.registry; sys.exit('numba' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_an_unsupported_type_is_named_with_the_supported_ones() -> None:
    message = str(unsupported(21, "blk.0.attn_q.weight", Path("model.gguf")))
    assert message.startswith("model.gguf: tensor blk.0.attn_q.weight has type IQ3_S")
    assert message.endswith(f"supported types are F32, F16, BF16, {', '.join(BLOCKS)}")
    assert "number 4711, which is unknown" in str(unsupported(4711, "x", "model.gguf"))
    assert "\n" not in message


def test_measures() -> None:
    x = np.array([3.0, 4.0], np.float32)
    assert rmse(x, x) == 0
    assert rmse(x, np.array([3.0, 2.0])) == pytest.approx(2**0.5)
    assert normalised_rmse(x, np.zeros(2)) == pytest.approx(1)
    assert normalised_rmse(np.zeros(2), np.zeros(2)) == 0
    measured = [bits_per_weight(FORMATS[name]) for name in BLOCKS]
    of_256 = [2.625, 3.4375, 4.5, 5.5, 6.5625, 4.25]
    assert measured == [8.5, 4.5, 5.0, 5.5, 6.0, 4.5, 4.25, *of_256]
