"""Peaks: the greatest logits, noted while the logits are computed.

The peak of a *piece* of the vocabulary, f32, is the greatest of its logits, or NaN where one of
them is not finite. Who chooses a token then looks at a few hundred peaks instead of at every logit,
while the other threads wait.
"""

import numpy as np

from ondevice.kernels.arithmetic import fma, lane_maximum, lane_sum, maximum
from ondevice.kernels.layout import COUNT, argument, word
from ondevice.kernels.linear import rows_of_task
from ondevice.kernels.operation import operation
from ondevice.kernels.simd import f32x16, load, load_f32, splat, store_f32, zero
from quant.jit import inner


@inner
def note_peak(logits, vocabulary, piece, index, peaks):
    """Write down the peak of a piece of a row of logits."""
    start = piece * index
    end = min(start + piece, vocabulary)
    whole = start + (end - start) // 16 * 16
    greatest, spoilt = splat(f32x16, np.float32(-np.inf)), zero(f32x16)
    for token in range(start, whole, 16):
        value = load(f32x16, logits + 4 * token)
        greatest = maximum(value, greatest)
        spoilt = fma(value, np.float32(0), spoilt)  # NaN where a logit is not finite
    peak, nothing = lane_maximum(greatest), lane_sum(spoilt)
    for token in range(whole, end):
        logit = load_f32(logits + 4 * token)
        peak = max(peak, logit)
        nothing += logit * np.float32(0)
    store_f32(peaks + 4 * index, peak + nothing)


@inner
def greatest_logit(logits, vocabulary, piece, peaks):
    """The token with the greatest logit of a row, the lowest among equals; -1 if not all are
    finite."""
    best, place, nothing = load_f32(peaks), 0, np.float32(0)
    for index in range((vocabulary + piece - 1) // piece):
        peak = load_f32(peaks + 4 * index)
        nothing += peak * np.float32(0)
        if peak > best:
            best, place = peak, index
    if nothing != 0:
        return -1
    token = place * piece
    while load_f32(logits + 4 * token) != best:
        token += 1
    return token


@operation
def note_peaks(op, step, task, scratch):
    """The peaks of the rows of the output matrix that the same task of `linear` has multiplied.

    (logits, bytes, vocabulary, rows of a chunk, runs or 0, peaks, bytes, piece)
    Chunks and runs begin with a piece.
    """
    logits, logits_bytes, vocabulary = argument(op, 0), argument(op, 1), argument(op, 2)
    start, used = rows_of_task(step, task, vocabulary, argument(op, 3), argument(op, 4))
    peaks, peaks_bytes, piece = argument(op, 5), argument(op, 6), argument(op, 7)
    for t in range(word(step, COUNT)):
        for index in range(start // piece, (start + used + piece - 1) // piece):
            row = logits + t * logits_bytes
            note_peak(row, vocabulary, piece, index, peaks + t * peaks_bytes)
