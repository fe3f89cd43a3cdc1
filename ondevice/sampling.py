"""How the next token is chosen. The arithmetic is in kernels/sample.py."""

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from ondevice.kernels import sample as kernel
from quant.errors import UsageError
from quant.format import Array

GREATEST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of the choice; UsageError names the one that is out of range."""

    temperature: float = 0.7
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_k: int = 20
    """Keep so many likeliest tokens; 0 keeps all."""
    top_p: float = 0.8
    """Keep the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest."""
    repeat_penalty: float = 1.0
    """Divides the positive logits of recent tokens, and multiplies the negative."""
    seed: int | None = None
    """Of the random numbers; None takes a new one for every answer."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, GREATEST_SEED)

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> "Sampling":
        """The defaults that a file recommends in `general.sampling.*`, ours where it is silent."""
        names = {
            "temp": "temperature",
            "top_k": "top_k",
            "top_p": "top_p",
            "min_p": "min_p",
            "penalty_repeat": "repeat_penalty",
        }
        known: dict[str, Any] = {}
        for key, name in names.items():
            value = metadata.get(f"general.sampling.{key}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                exact = round(float(value), 6)  # the file holds float32
                whole = name == "top_k" and exact.is_integer()
                known[name] = int(exact) if whole else exact
        return cls(**known)

    def record(self, logits: int, vocabulary: int, ends: Array, space: Array) -> Array:
        """The sampler record for kernels.sample; `ends` and `space` must outlive it."""
        words = np.zeros(kernel.SAMPLER_WORDS, np.int64)
        seed = secrets.randbelow(GREATEST_SEED) if self.seed is None else self.seed
        words[[kernel.LOGITS, kernel.VOCABULARY]] = logits, vocabulary
        words[[kernel.TOP_K, kernel.SEED]] = self.top_k, seed
        words[[kernel.ENDS, kernel.SPACE]] = ends.ctypes.data, space.ctypes.data
        reals = words.view(np.float64)
        reals[kernel.TEMPERATURE] = self.temperature
        reals[kernel.TOP_P] = self.top_p
        reals[kernel.MIN_P] = self.min_p
        reals[kernel.PENALTY] = self.repeat_penalty
        return words


def _check(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
