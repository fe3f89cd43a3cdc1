"""How well a model predicts a text, and how far it is from a reference model.

The text's tokens are cut into windows of `context_size`, one after another, the last one shorter.
Each window starts from an empty state, so its first token is only read; every later token is
scored given the window's tokens before it. Nothing is left out and nothing counted twice but the
first token of each window, which is why longer windows give lower figures: compare only at the
same size. A model whose tokenizer adds a begin-of-text token gets one before each window, which
then scores all its tokens.

    perplexity       exp(mean over scored tokens of -ln p(token))
    bits_per_byte    sum of -log2 p(token) / UTF-8 bytes of the scored tokens
    kl_divergence    mean over scored positions of sum_v r(v) (ln r(v) - ln p(v)), r the reference
    top1_agreement   share of scored positions where both find the same token likeliest

Sums and logarithms are in float64.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.errors import Error, UsageError

if TYPE_CHECKING:
    from ondevice.model import Model

ROWS = 32
"""Positions turned to float64 at a time: 150,000 logits each make 40 MB."""

Progress = Callable[[int, int, float], None]
"""Called after each window with the windows done, the windows in all, and the perplexity so far."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(positions, vocabulary) -> natural logarithms of the probabilities, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def measure(
    model: "Model",
    text: str,
    context_size: int = 512,
    *,
    reference: "Model | None" = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """perplexity, bits_per_byte and tokens (scored); kl_divergence and top1_agreement too."""
    if context_size < 2:
        raise UsageError(f"a window of {context_size} tokens scores nothing; it needs at least 2")
    ids = model.tokenizer.encode(text)
    if reference is not None and reference.tokenizer.encode(text) != ids:
        raise Error("the model and its reference cut the text into different tokens")
    bos = model.tokenizer.bos
    prefix = [bos] if model.tokenizer.add_bos and bos is not None else []
    step = context_size - len(prefix)
    windows = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise Error(f"the text has {len(ids)} tokens; at least 2 are needed")

    tokens = agreeing = bytes_scored = 0
    surprise = divergence = 0.0
    for number, window in enumerate(windows, 1):
        ours = model.logits(window)
        theirs = None if reference is None else reference.logits(window)
        for start in range(0, len(window) - 1, ROWS):
            positions = slice(start, min(start + ROWS, len(window) - 1))
            found = log_softmax(ours[positions])
            next_tokens = window[positions.start + 1 : positions.stop + 1]
            surprise -= float(found[np.arange(len(next_tokens)), next_tokens].sum())
            if theirs is not None:
                wanted = log_softmax(theirs[positions])
                divergence += float((np.exp(wanted) * (wanted - found)).sum())
                agreeing += int((wanted.argmax(axis=-1) == found.argmax(axis=-1)).sum())
        tokens += len(window) - 1
        bytes_scored += sum(len(model.tokenizer.piece(token)) for token in window[1:])
        if progress is not None:
            progress(number, len(windows), math.exp(surprise / tokens))

    result: dict[str, Any] = {
        "perplexity": math.exp(surprise / tokens),
        "bits_per_byte": surprise / math.log(2) / max(bytes_scored, 1),
        "tokens": tokens,
    }
    if reference is not None:
        result["kl_divergence"] = divergence / tokens
        result["top1_agreement"] = agreeing / tokens
    return result
