"""A short run of a model under a budget, for what nobody can tell in advance: which experts its
texts use, and what disk and processor make of that.

What it finds is in the usage profile afterwards (usage.py), as after any run.
"""

import dataclasses
import time
from collections.abc import Callable

from ondevice.planning import Options
from quant.compiling import Report

BEGINNING = "Once upon a time, in a town by the sea,"
TOKENS = 80
ENOUGH_TOKENS = 48
"""After which a trial that has taken SECONDS ends."""
SECONDS = 20.0
MOST_SECONDS = 60.0
"""After which it ends, however few tokens there are."""


def write_some(
    options: Options,
    progress: Callable[[int, int], None] | None = None,
    compiling: Report | None = None,
) -> None:
    """Open the model and let it write; progress(done, all) is told how many tokens there are,
    `compiling` how many kernels."""
    from ondevice.model import Model

    with Model(
        options.path,
        options.threads,
        options.context,
        options.memory,
        options.kv,
        compiling,
        mtp=options.mtp,
    ) as model:
        model.ends[:] = 0
        if model.ahead is not None:
            model.ahead.depth.fixed = 0  # what guesses use is not noted
        prompt = model.tokenize(BEGINNING) or [0]
        completion = model.complete(prompt, dataclasses.replace(model.sampling, seed=0), TOKENS)
        started = time.perf_counter()
        for _ in completion:
            done = len(completion.tokens)
            if progress is not None:
                progress(done, completion.max_tokens)
            seconds = time.perf_counter() - started
            if seconds > (SECONDS if done >= ENOUGH_TOKENS else MOST_SECONDS):
                completion.cancel()
        if progress is not None:
            progress(completion.max_tokens, completion.max_tokens)
