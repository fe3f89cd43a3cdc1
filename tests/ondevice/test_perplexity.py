"""Perplexity against the definition, worked out for models whose answer is known."""

import itertools
import math

import numpy as np
import pytest

from ondevice.perplexity import log_softmax, measure
from quant.errors import Error, UsageError
from tests.fake_model import FakeModel


def test_log_softmax_survives_huge_logits() -> None:
    found = log_softmax(np.array([[1e30, 0, -1e30], [3e38, 3e38, 3e38]], dtype=np.float32))
    assert found[0, 0] == 0
    assert found[1].tolist() == pytest.approx([-math.log(3)] * 3, rel=1e-15)


def test_a_model_that_knows_nothing() -> None:
    found = measure(FakeModel(), "hello world", 4)
    assert found == {
        "perplexity": pytest.approx(128),
        "bits_per_byte": pytest.approx(7),
        "tokens": 8,  # 11 tokens in windows of 4, 4 and 3, the first of each not scored
    }


def test_against_the_definition_over_windows() -> None:
    model = FakeModel()
    model.table = np.random.default_rng(2).normal(scale=3, size=(128, 128)).astype(np.float32)
    text = "It was the best of times, it was the worst of times" * 3
    size = 50  # longer than the rows turned to float64 at a time
    surprise, tokens = 0.0, 0
    for start in range(0, len(text), size):
        window = text[start : start + size]
        for left, right in itertools.pairwise(window):
            row = model.table[ord(left)].astype(np.float64)
            surprise -= row[ord(right)] - math.log(np.exp(row).sum())
            tokens += 1
    seen: list[int] = []
    found = measure(model, text, size, progress=lambda done, total, _: seen.append(done))
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(surprise / tokens), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(surprise / math.log(2) / tokens, rel=1e-12)
    assert seen == [1, 2, 3, 4]


def test_the_reference_against_the_definition() -> None:
    model, reference = FakeModel(), FakeModel()
    reference.table = np.zeros((128, 128), dtype=np.float32)
    reference.table[:, ord("b")] = math.log(127)  # p(b) = 1/2, every other 1/254
    model.table[:, ord("a")] = math.log(127)
    found = measure(model, "aab", 8, reference=reference)
    # sum_v r ln(r/p): b is 1/2 against 1/254, a the other way round, the rest equal
    assert found["kl_divergence"] == pytest.approx((1 / 2 - 1 / 254) * math.log(127), rel=1e-6)
    assert found["top1_agreement"] == 0
    assert measure(model, "aab", 8, reference=model)["kl_divergence"] == 0


def test_bits_count_bytes_not_letters() -> None:
    model = FakeModel()
    model.table = np.broadcast_to(np.float32(0), (0xD800, 0xD800))
    assert measure(model, "가나", 8)["bits_per_byte"] == pytest.approx(math.log2(0xD800) / 3)


def test_a_begin_of_text_token_starts_every_window() -> None:
    model = FakeModel()
    model.tokenizer.bos, model.tokenizer.add_bos = 2, True
    model.table = np.zeros((128, 128), dtype=np.float32)
    model.table[2, ord("a")] = math.log(127)  # p(a) = 1/2 at the start of a window
    found = measure(model, "aa", 2)  # windows of one token and the begin-of-text token
    assert found == {"perplexity": pytest.approx(2), "bits_per_byte": pytest.approx(1), "tokens": 2}


@pytest.mark.parametrize("text", ["", "x"])
def test_too_short_a_text(text: str) -> None:
    with pytest.raises(Error, match=f"the text has {len(text)} tokens; at least 2"):
        measure(FakeModel(), text, 8)


def test_too_small_a_window() -> None:
    with pytest.raises(UsageError, match="a window of 1 token"):
        measure(FakeModel(), "text", 1)


def test_a_reference_with_another_tokenizer() -> None:
    other = FakeModel()
    other.tokenizer.encode = lambda text, special=False: [0]  # type: ignore[method-assign]
    with pytest.raises(Error, match="different tokens"):
        measure(FakeModel(), "text", 8, reference=other)
