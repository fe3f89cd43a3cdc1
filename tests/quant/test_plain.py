"""F32, F16 and BF16: round to nearest even, against NumPy and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from quant.format import Array
from quant.registry import FORMATS


def encode(name: str, values: Array) -> Array:
    quantize = FORMATS[name].quantize
    assert quantize is not None
    return quantize(values)


def decode(name: str, values: Array) -> Array:
    return FORMATS[name].dequantize(encode(name, values))


def finite_bits() -> Array:
    """(about 65000,) f32: random bits, without infinities and NaN."""
    bits = np.random.default_rng(3).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    return bits.view(np.float32)[np.isfinite(bits.view(np.float32))]


def test_f32_is_a_copy() -> None:
    values = finite_bits()
    stored = encode("F32", values)
    assert stored.tobytes() == values.tobytes()
    assert not np.shares_memory(stored, values)


def test_bf16_equals_ml_dtypes() -> None:
    values = finite_bits()
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    fits = np.isfinite(expected)
    np.testing.assert_array_equal(
        encode("BF16", values[fits]), expected[fits].view(np.uint16).astype("<u2")
    )


def test_f16_equals_numpy() -> None:
    fits = finite_bits()
    fits = fits[abs(fits) < 65504]
    with np.errstate(under="ignore"):
        expected = fits.astype("<f2")
    np.testing.assert_array_equal(encode("F16", fits).view("<u2"), expected.view("<u2"))


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("BF16", 1 + 2**-8, 1.0),  # ties go to the even one, down
        ("BF16", 1 + 3 * 2**-8, 1 + 2**-6),  # and up
        ("BF16", 1 + 2**-8 + 2**-20, 1 + 2**-7),
        ("BF16", 3.4e38, 3.3895313892515355e38),
        ("BF16", -3.4e38, -3.3895313892515355e38),
        ("BF16", 1e-45, 0.0),
        ("F16", 1 + 2**-11, 1.0),
        ("F16", 1 + 3 * 2**-11, 1 + 2**-9),
        ("F16", 65519.0, 65504.0),
        ("F16", 65520.0, 65504.0),
        ("F16", -1e30, -65504.0),
        ("F16", 2.0**-24, 2.0**-24),
        ("F16", 2.0**-25, 0.0),
    ],
)
def test_rounding(name: str, value: float, stored: float) -> None:
    assert decode(name, np.array([value], np.float32))[0] == np.float32(stored)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_zero_keeps_its_sign_and_infinity_stays(name: str) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf], np.float32)
    assert decode(name, values).tobytes() == values.tobytes()


@pytest.mark.parametrize(("name", "quiet"), [("F16", 0x0200), ("BF16", 0x0040)])
def test_nan_stays_a_quiet_nan_of_its_sign(name: str, quiet: int) -> None:
    patterns = [0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]  # two signalling ones
    with np.errstate(invalid="ignore"):
        stored = encode(name, np.array(patterns, np.uint32).view(np.float32)).view("<u2")
        assert np.isnan(FORMATS[name].dequantize(stored.view(FORMATS[name].block))).all()
    assert (stored & quiet == quiet).all()
    assert (stored >> 15).tolist() == [0, 1, 0, 0, 1]
