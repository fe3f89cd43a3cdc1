"""A short run of a model under a budget, for what nobody can tell in advance: which experts its
texts use, and what disk and processor make of that. It reads a text and goes on with it: reading
shows how often experts come back over some hundred tokens, writing what a token takes.

What it finds is in the usage profile afterwards (usage.py), as after any run.
"""

import dataclasses
import time
from collections.abc import Callable

from ondevice.planning import Options
from quant.compiling import Report

BEGINNING = """\
The harbour town had one clock, and it was never right. Every morning the baker set out his \
loaves, looked up at the tower, added twenty minutes and opened his door; every evening the \
ferryman took away ten and rang his bell. Strangers missed the boat. "How do you live like \
this?" asked a woman who had come to repair the organ of St. Mary's. The baker laughed. "We know \
how wrong it is," he said. "That is worth more than a clock that is right and that nobody \
checks."

Question: A tank holds 240 litres. One pipe fills it in 6 hours, another empties it in 10. Both \
are open. After how many hours is it full?
Answer: The first pipe brings 240 / 6 = 40 litres an hour, the second takes 240 / 10 = 24. \
Together they bring 16 litres an hour, so it takes 240 / 16 = 15 hours.

```python
def longest_run(values: list[int]) -> int:
    # of equal values
    best = length = 0
    previous = None
    for value in values:
        length = length + 1 if value == previous else 1
        best = max(best, length)
        previous = value
    return best
```

In 1854 a physician marked every death of the epidemic on a map and found that they lay around one \
pump. He had its handle taken off. What he did not have was a theory that others believed: most \
held that bad air was to blame. The map convinced them slowly, because"""
"""Tales, sums, a program and history, about as texts for a model are mixed."""
TOKENS = 400
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
        prompt = (model.tokenize(BEGINNING) or [0])[: model.context // 2]
        tokens = min(TOKENS, model.context - len(prompt))
        completion = model.complete(prompt, dataclasses.replace(model.sampling, seed=0), tokens)
        started = time.perf_counter()
        if progress is not None:
            progress(0, ENOUGH_TOKENS)
        for _ in completion:
            done = len(completion.tokens)
            seconds = time.perf_counter() - started
            if progress is not None:
                likely = max(ENOUGH_TOKENS, done, int(done * SECONDS / seconds))
                progress(done, min(likely, completion.max_tokens))
            if seconds > (SECONDS if done >= ENOUGH_TOKENS else MOST_SECONDS):
                completion.cancel()
        if progress is not None:
            progress(completion.max_tokens, completion.max_tokens)
