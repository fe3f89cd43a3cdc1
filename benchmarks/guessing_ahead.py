"""Speed of guessing tokens ahead against plain decoding, for a given share of right guesses.

    python -m benchmarks.guessing_ahead FILE --right 0.85 0.2

A synthetic head cannot predict, so a hook replaces its drafts by the true tokens with that chance.
Both ways decode the same text at the same time, a burst of 80 ms by turns, since a shared machine
is another one a second later; the figures are medians over rounds. FILE needs a
multi-token-prediction block: `python -m benchmarks.synthetic FILE --layers 8 --mtp`.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

import ondevice
from ondevice.depth import Depth
from ondevice.model import Model
from ondevice.sampling import Sampling
from ondevice.speculate import random_hook

SAMPLING = Sampling(temperature=1.0, top_k=20, top_p=1.0, seed=3)
PROMPT = 20


def speeds(first: Model, second: Model, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Tokens per second of an answer by either model, burst by burst; both must be the same."""
    one, other = (model.complete(prompt, SAMPLING, tokens) for model in (first, second))
    for a, b in zip(one.ids(), other.ids(), strict=True):
        assert a == b
    rate, rate_of_other = (c.timings["decode_tokens_per_second"] for c in (one, other))
    return rate, rate_of_other


def compare(guessing: Model, plain: Model, right: float, tokens: int, rounds: int) -> str:
    """Measure by turns; a line to read."""
    prompt = np.random.default_rng(0).integers(0, 1000, PROMPT).tolist()
    answer = list(plain.complete(prompt, SAMPLING, tokens).ids())
    assert guessing.ahead is not None
    guessing.ahead.depth = depth = Depth("auto")
    ratios, rates, misses, gains = [], [], [], []
    for number in range(rounds + 1):
        truth = random_hook(guessing, prompt + answer, right)
        expected = float(depth.rate(depth.choose()))
        gain = expected / depth.rate(0) if expected else 1.0
        if number % 2:
            rate, before = speeds(guessing, plain, prompt, tokens)
        else:
            before, rate = speeds(plain, guessing, prompt, tokens)
        del truth
        if number:  # the first round warms up, and teaches the depth
            ratios.append(rate / before)
            rates.append(rate)
            misses.append(expected / rate - 1)
            gains.append(gain / (rate / before) - 1)
    return (
        f"{right:.2f} of guesses right: {_spread(ratios, '.3f', '.2f')} of plain decoding; "
        f"depth {depth.choose()}, {statistics.median(rates):.1f} tokens/s. Expected before each "
        f"round against measured: gain {_spread(gains)}, tokens/s {_spread(misses)}"
    )


def _spread(values: list[float], median: str = "+.1%", ends: str = "+.0%") -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{median}} ({low:{ends}} to {high:{ends}})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure guessing tokens ahead.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--right", type=float, nargs="+", default=[0.85, 0.2])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with (
        ondevice.load(arguments.file, context=1024) as guessing,
        ondevice.load(arguments.file, context=1024, mtp="off") as plain,
    ):
        guessing.ends[:] = plain.ends[:] = 0
        for right in arguments.right:
            print(compare(guessing, plain, right, arguments.tokens, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
