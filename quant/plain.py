"""F32, F16 and BF16: one weight per block, nothing but a float.

    F32    4 bytes   sign, 8 exponent bits, 23 fraction bits; as it is
    F16    2 bytes   sign, 5 exponent bits, 10 fraction bits; up to 65504
    BF16   2 bytes   the upper half of an F32

Rounding goes to the nearest value, ties to the even one. A finite weight beyond the range becomes
the largest finite value; infinities stay, and every NaN stays a (quiet) NaN of its sign.
"""

import numpy as np

from quant.format import Array, Format


def _dequantize_f32(blocks: Array) -> Array:
    """(..., n) f32 -> (..., n) f32, a copy."""
    return blocks.astype(np.float32)


def _quantize_f32(values: Array) -> Array:
    """(..., n) f32 -> (..., n) f32, a copy."""
    return values.astype("<f4")


def _dequantize_f16(blocks: Array) -> Array:
    """(..., n) f16 -> (..., n) f32."""
    return blocks.astype(np.float32)


def _quantize_f16(values: Array) -> Array:
    """(..., n) f32 -> (..., n) f16."""
    values = np.asarray(values, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        bits = values.astype("<f2").view("<u2")
    return _mend(values, bits, infinity=0x7C00, quiet=0x0200).view("<f2")


def _dequantize_bf16(blocks: Array) -> Array:
    """(..., n) u16, bits of bf16 -> (..., n) f32."""
    return (blocks.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _quantize_bf16(values: Array) -> Array:
    """(..., n) f32 -> (..., n) u16, bits of bf16."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    # Adding just under half of the last kept place, plus that place's own bit, carries exactly
    # when the dropped half is above the middle, or at it and the kept part is odd.
    nearest = bits >> np.uint32(16)
    nearest &= np.uint32(1)
    nearest += np.uint32(0x7FFF)
    nearest += bits
    nearest >>= np.uint32(16)
    return _mend(values, nearest.astype("<u2"), infinity=0x7F80, quiet=0x0040)


def _mend(values: Array, bits: Array, infinity: int, quiet: int) -> Array:
    """Bits of rounded values, with what plain rounding makes of overflow and NaN put right."""
    if np.all(bits & infinity != infinity) and np.all(np.isfinite(values)):
        return bits
    sign = (np.signbit(values) * 0x8000).astype("<u2")
    overflown = np.isfinite(values) & (bits & infinity == infinity)
    bits = np.where(overflown, sign | np.uint16(infinity - 1), bits)
    return np.where(np.isnan(values), sign | np.uint16(infinity | quiet), bits).astype("<u2")


F32 = Format("F32", 0, np.dtype("<f4"), 1, _dequantize_f32, _quantize_f32)
F16 = Format("F16", 1, np.dtype("<f2"), 1, _dequantize_f16, _quantize_f16)
BF16 = Format("BF16", 30, np.dtype("<u2"), 1, _dequantize_bf16, _quantize_bf16)
