"""The encoders: small error, no surprises at the edges, the same bytes however they are called."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from quant import encoders, iq4_nl, mxfp4, search
from quant.format import Array, Format
from quant.jit import from_python
from quant.measure import normalised_rmse
from quant.registry import FORMATS
from tests.quant.data import gaussian, heavy_tailed

half_bits = from_python(search.half_bits)
half_scale = from_python(search.half_scale)
half_value = from_python(search.half_value)
NAMES = ["Q8_0", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
EACH = pytest.mark.parametrize("format", [FORMATS[name] for name in NAMES], ids=NAMES)

# Codes of a format (Q8_0's without the one it does not use): a weight is at most about half of
# 1 / (codes - 1) of the block's range away from a code when the scale is the plain one. For uneven
# codes, as many as even ones would be at their widest spacing.
CODES = {"Q8_0": 255, "Q4_0": 16, "Q5_0": 32, "Q5_1": 32, "Q4_K": 16, "Q5_K": 32, "Q6_K": 64}
CODES |= {"IQ4_NL": 11, "IQ4_XS": 11, "MXFP4": 7}

# How far off a lone weight may be, which the scale is made for. An f16 scale is good to 2^-11, and
# to 2^-8 where it is subnormal (0.0137 in Q6_K); with a power of two, what is stored is 1 or 1.5.
PRECISION = dict.fromkeys(NAMES, 2.0**-8) | {"MXFP4": 0.2}

# Normalised RMSE of llama.cpp's encoders (ggml 0.25.3) without an importance matrix on the two
# arrays of tests/quant/data.py, measured by tests/quant/test_llama_cpp.py; and of ours.
MEASURED = {
    "Q8_0": ((0.005369, 0.005366), (0.008357, 0.008356)),
    "Q4_0": ((0.086087, 0.081144), (0.128599, 0.124326)),
    "Q5_0": ((0.042646, 0.039947), (0.066058, 0.064257)),
    "Q5_1": ((0.037797, 0.033159), (0.048353, 0.042974)),
    "IQ4_NL": ((0.075867, 0.073056), (0.102703, 0.099135)),
    "MXFP4": ((0.114022, 0.111325), (0.142997, 0.139348)),
    "Q4_K": ((0.071355, 0.069426), (0.092727, 0.089980)),
    "Q5_K": ((0.036168, 0.034191), (0.046805, 0.044367)),
    "Q6_K": ((0.017764, 0.016441), (0.025419, 0.023999)),
    "IQ4_XS": ((0.076497, 0.073733), (0.103780, 0.100244)),
}


def encode(format: Format, values: Array) -> Array:
    assert format.quantize is not None
    return format.quantize(values)


def stored(format: Format, values: Array) -> Array:
    return format.dequantize(encode(format, values))


# The acceptance limit against llama.cpp, and room for another rounding of the same search.
WORSE_THAN_LLAMA_CPP = 1.02
WORSE_THAN_BEFORE = 1.002


@EACH
@pytest.mark.parametrize("which", [0, 1], ids=["gaussian", "heavy-tailed"])
def test_error_is_what_it_was_measured_to_be(format: Format, which: int) -> None:
    values = (gaussian, heavy_tailed)[which]()
    theirs, ours = MEASURED[format.name][which]
    error = normalised_rmse(values, stored(format, values))
    assert error <= WORSE_THAN_LLAMA_CPP * theirs
    assert error <= WORSE_THAN_BEFORE * ours


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q5_1"])
def test_no_line_of_a_fine_grid_is_much_better(name: str) -> None:
    """Exhaustive search in float64 over 200 x 25 lines per block."""
    format = FORMATS[name]
    values = gaussian(1, 32 * 64).reshape(-1, 32).astype(np.float64)
    lowest, highest = values.min(axis=1), values.max(axis=1)
    extreme = abs(values).max(axis=1)
    top = CODES[name] - 1
    least = np.full(len(values), np.inf)
    for share in np.linspace(0.7, 1.2, 200):
        if name == "Q5_1":
            lines = [
                (share * (highest - lowest) / top, lowest + start * (highest - lowest) / top)
                for start in np.linspace(-1, 3, 25)
            ]
        else:
            half = (top + 1) / 2
            lines = [
                (slope, -half * slope)
                for slope in (share * extreme / half, -share * extreme / half)
            ]
        for slope, start in lines:
            codes = np.clip(np.rint((values.T - start) / slope), 0, top)
            least = np.minimum(least, ((codes * slope + start - values.T) ** 2).sum(axis=0))
    ours = stored(format, values.astype(np.float32)) - values
    # Of the total squared error; an f16 scale and 32 lanes instead of 5000 cost this much.
    assert (ours**2).sum() <= 1.03 * least.sum()


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4"])
def test_no_scale_of_a_fine_grid_is_much_better(name: str) -> None:
    """Exhaustive search in float64 over 800 scales, or all powers of two, for uneven codes."""
    format = FORMATS[name]
    values = gaussian(1, 32 * 64).reshape(-1, 32).astype(np.float64)
    codes = np.unique((iq4_nl if name == "IQ4_NL" else mxfp4).VALUES).astype(np.float64)
    extreme = values[np.arange(len(values)), abs(values).argmax(axis=1)][:, None]
    if name == "IQ4_NL":
        scales = [
            extreme / (end * share) for end in (-127, 113) for share in np.linspace(0.6, 1.4, 400)
        ]
    else:
        scales = [np.full_like(extreme, 2.0**exponent) for exponent in range(-40, 10)]
    least = np.full(len(values), np.inf)
    for scale in scales:
        nearest = codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, values / scale)]
        least = np.minimum(least, ((nearest * scale - values) ** 2).sum(axis=1))
    ours = stored(format, values.astype(np.float32)) - values
    assert (ours**2).sum() <= (1.001 if name == "IQ4_NL" else 1.000001) * least.sum()


@EACH
def test_no_weight_is_further_from_its_code_than_a_step(format: Format) -> None:
    values = gaussian(8)
    blocks = values.reshape(-1, 16 if format.name == "Q6_K" else 32)
    width = 2 * abs(blocks).max(axis=1, keepdims=True)
    step = np.broadcast_to(width / (CODES[format.name] - 1), blocks.shape).reshape(values.shape)
    # Half a step for rounding, the rest because the search may clip the extremes.
    assert (abs(stored(format, values) - values) <= 1.5 * step).all()


@EACH
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_stay_zeros(format: Format, zero: float) -> None:
    values = np.full((2, 2 * format.length), zero, np.float32)
    assert stored(format, values).tobytes() == np.zeros_like(values).tobytes()


@EACH
def test_a_zero_block_between_others_stays_zero(format: Format) -> None:
    values = gaussian(1, 3 * format.length)
    values[0, format.length : 2 * format.length] = 0
    assert not stored(format, values)[0, format.length : 2 * format.length].any()


@EACH
@pytest.mark.parametrize("constant", [1.0, -1.0, 0.0137, -3000.0])
def test_a_constant_block_keeps_its_value(format: Format, constant: float) -> None:
    values = np.full((1, format.length), constant, np.float32)
    np.testing.assert_allclose(stored(format, values), values, rtol=PRECISION[format.name])


@EACH
def test_one_large_weight_survives_among_small_ones(format: Format) -> None:
    values = gaussian(1, format.length)
    values[0, 5] = 40.0
    assert stored(format, values)[0, 5] == pytest.approx(
        40.0, rel=max(0.02, PRECISION[format.name])
    )


@EACH
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-10, 2e-8, 1e-7, 1e-6, 1e-5, 1e-4])
def test_tiny_weights_stay_tiny(format: Format, size: float) -> None:
    values = (gaussian(1, 4 * format.length) * np.float64(size / 0.02)).astype(np.float32)
    difference = abs(stored(format, values) - values)
    # Two codes, and half a step of the f16 scale, 2^-24 for weights as small as these, for each.
    codes = CODES[format.name]
    allowed = 2 * abs(values).max() / (codes - 1) + codes / 2 * 2.0**-24
    assert (difference <= np.minimum(allowed, 1.5 * abs(values).max())).all()


# The largest magnitude a format can hold: 65504 times its largest integer factors.
REACH = {
    "Q8_0": 65504 * 127,
    "Q4_0": 65504 * 7,
    "Q5_0": 65504 * 15,
    "Q5_1": 65504,
    "IQ4_NL": 65504 * 113,
    "MXFP4": 1.5 * 2.0**127,
    "Q4_K": 65504 * 63,
    "Q5_K": 65504 * 63,
    "Q6_K": 65504 * 127 * 31,
    "IQ4_XS": 65504 * 31 * 113,
}


@EACH
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_large_weights_that_fit_keep_their_precision(format: Format, share: float) -> None:
    values = gaussian(4, 4 * format.length).astype(np.float64)
    values = (values * (share * REACH[format.name] / abs(values).max())).astype(np.float32)
    error = normalised_rmse(values, stored(format, values))
    assert error <= 1.5 * MEASURED[format.name][0][1]  # few blocks: the error varies


@EACH
@pytest.mark.parametrize("size", [1e9, 1e20, 3.4e38])
def test_weights_beyond_the_reach_become_the_largest(format: Format, size: float) -> None:
    values = np.where(gaussian(2, 2 * format.length) < 0, -size, size).astype(np.float32)
    result = stored(format, values)
    assert np.isfinite(result).all()
    assert (np.sign(result) == np.sign(values)).all()
    largest = min(size, REACH[format.name])
    assert (abs(result) >= min(0.99, 1 - PRECISION[format.name]) * largest).all()


@EACH
def test_a_weight_beyond_the_reach_does_not_make_others_infinite(format: Format) -> None:
    values = gaussian(1, format.length)
    values[0, 0] = np.finfo(np.float32).max
    assert np.isfinite(stored(format, values)).all()


@EACH
def test_infinite_weights_become_the_largest(format: Format) -> None:
    """The converter refuses them; what else encodes them gets no infinity and no NaN."""
    values = gaussian(1, format.length)
    finite = values.copy()
    values[0, [0, 20]] = np.inf, -np.inf
    finite[0, [0, 20]] = np.array([1, -1]) * np.finfo(np.float32).max
    assert encode(format, values).tobytes() == encode(format, finite).tobytes()


@EACH
def test_bytes_do_not_depend_on_how_rows_are_cut_or_laid_out(format: Format) -> None:
    values = heavy_tailed(6, 2 * format.length)
    whole = encode(format, values)
    assert whole.shape == (6, 2)
    assert whole.dtype == format.block
    by_row = np.stack([encode(format, row[None])[0] for row in values])
    by_block = encode(format, values.reshape(-1, format.length)).reshape(6, 2)
    stack = encode(format, values.reshape(2, 3, -1)).reshape(6, 2)
    spread = np.zeros((6, 4 * format.length), np.float32)[:, ::2]
    spread[:] = values
    read_only = values.copy()
    read_only.flags.writeable = False
    for other in (by_row, by_block, stack, encode(format, spread), encode(format, read_only)):
        assert other.tobytes() == whole.tobytes()


@EACH
def test_threads_get_the_same_bytes(format: Format) -> None:
    values = heavy_tailed(32, 2 * format.length)
    expected = encode(format, values)
    got: dict[int, Array] = {}

    def work(part: int) -> None:
        got[part] = encode(format, values[part * 8 : part * 8 + 8])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.concatenate([got[part] for part in range(4)]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_encoders_release_the_gil(name: str) -> None:
    assert getattr(encoders, name.lower()).options["nogil"]


def test_every_finite_f16_has_its_value_and_its_bits() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[np.isfinite(bits.view(np.float16))]
    values = bits.view(np.float16).astype(np.float32)
    assert [half_value(int(b)) for b in bits[::7]] == values[::7].tolist()
    expected = [int(b) if b != 0x8000 else 0 for b in bits]  # a scale is never -0
    assert [half_bits(value) for value in values] == expected


def test_f16_rounding_equals_numpy() -> None:
    random = np.random.default_rng(2)
    values = (random.standard_normal(4000) * 2.0 ** random.integers(-26, 15, 4000)).astype("f4")
    ties = (np.arange(0x0001, 0x7B00, 5, dtype=np.uint16).view(np.float16)).astype(np.float32)
    ties = (ties + np.nextafter(ties.astype(np.float16), np.float16(np.inf)).astype("f4")) / 2
    for value in np.concatenate([values, ties]):
        if value:
            assert half_bits(value) == int(np.float16(value).view(np.uint16))


def test_f16_scales_neither_overflow_nor_vanish() -> None:
    assert half_bits(np.float32(3e38)) == 0x7BFF
    assert half_bits(np.float32(-3e38)) == 0xFBFF
    assert half_bits(np.float32(1e-30)) == 0
    assert half_scale(np.float32(1e-30)) == 1
    assert half_scale(np.float32(-1e-30)) == 0x8001
    assert half_scale(np.float32(0)) == 0
    assert half_scale(np.float32(1.4 * 2.0**-24)) == 2  # 1 would clip 29 %
    assert half_scale(np.float32(1000.4 * 2.0**-24)) == 1000
    assert half_scale(np.float32(3e38)) == 0x7BFF


@pytest.mark.slow
def test_bytes_are_the_same_on_a_plain_cpu(tmp_path: Path) -> None:
    """Compiled for the baseline of this architecture: other vector widths, no fused operations."""
    code = (
        "import hashlib; from quant.registry import FORMATS; from tests.quant.data import *\n"
        "data = b''.join(FORMATS[name].quantize(heavy_tailed(4)).tobytes()"
        f" for name in {NAMES})\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "ONDEVICE_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **plain},
        check=True,
        capture_output=True,
        text=True,
    )
    data = b"".join(encode(FORMATS[name], heavy_tailed(4)).tobytes() for name in NAMES)
    assert result.stdout.strip() == hashlib.sha256(data).hexdigest()
