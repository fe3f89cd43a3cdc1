"""Peaks against NumPy, with pieces and rows of any length."""

import numpy as np
import pytest

from ondevice.kernels.layout import word
from ondevice.kernels.peaks import greatest_logit
from ondevice.kernels.simd import store_i64
from quant.format import Array
from tests.ondevice.kernels.harness import peaks_of, three_integers


@three_integers
def choose(logits: int, peaks: int, words: int) -> None:
    store_i64(words, greatest_logit(logits, word(words, 0), word(words, 1), peaks))


def chosen(logits: Array, peaks: Array, piece: int) -> int:
    words = np.array([len(logits), piece])
    choose(logits.ctypes.data, peaks.ctypes.data, words.ctypes.data)
    return int(words[0])


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 47, 48, 49, 300, 1000])
@pytest.mark.parametrize("piece", [16, 48, 1008])
def test_peaks(vocabulary: int, piece: int) -> None:
    random = np.random.default_rng(vocabulary)
    for digits in (6, 0):  # distinct logits, many equal ones
        logits = np.round(random.standard_normal((3, vocabulary)), digits).astype(np.float32)
        for row, peaks in zip(logits, peaks_of(logits, piece), strict=True):
            expected = [row[start : start + piece].max() for start in range(0, vocabulary, piece)]
            assert peaks.tolist() == expected
            assert chosen(row, peaks, piece) == row.argmax()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 47, 48, 98, 99])
def test_a_piece_with_a_wrong_logit(wrong: float, place: int) -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, place] = wrong
    (peaks,) = peaks_of(logits, 48)
    assert np.isnan(peaks).tolist() == [piece == place // 48 for piece in range(3)]
    assert chosen(logits[0], peaks, 48) == -1


def test_the_smallest_logits_there_are() -> None:
    logits = np.full((1, 100), np.finfo(np.float32).min)
    assert chosen(logits[0], peaks_of(logits, 48)[0], 48) == 0
