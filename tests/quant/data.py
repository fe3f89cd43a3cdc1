"""Weights for the tests of the block formats."""

import numpy as np

from quant.format import Array

SEED = 7
SPREAD = np.float32(0.02)  # of a typical weight matrix


def gaussian(rows: int = 64, columns: int = 1024) -> Array:
    """(rows, columns) f32, normal: the shape of freshly initialised weights."""
    return np.random.default_rng(SEED).standard_normal((rows, columns)).astype("f4") * SPREAD


def heavy_tailed(rows: int = 64, columns: int = 1024) -> Array:
    """(rows, columns) f32, Student t with 3 degrees of freedom: more outliers than trained ones."""
    return np.random.default_rng(SEED).standard_t(3, (rows, columns)).astype("f4") * SPREAD
