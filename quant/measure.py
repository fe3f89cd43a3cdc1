"""How far stored weights are from the weights they stand for, and how much room they take."""

import numpy as np

from quant.format import Array, Format


def rmse(x: Array, y: Array) -> float:
    """Root of the mean squared difference of two arrays of one shape, computed in float64."""
    difference = np.subtract(x, y, dtype=np.float64)
    return float(np.sqrt(np.mean(difference * difference)))


def normalised_rmse(x: Array, y: Array) -> float:
    """rmse(x, y) over the root mean square of x: 0 is exact, 1 is as bad as storing zeros."""
    level = rmse(x, np.zeros_like(x))
    return rmse(x, y) / level if level else rmse(x, y)


def bits_per_weight(format: Format) -> float:
    """Stored bits per weight, scales included."""
    return 8 * format.block.itemsize / format.length
