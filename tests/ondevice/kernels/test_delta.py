"""Gated DeltaNet against its recurrent formula in float64, step after step."""

import numpy as np
import pytest

from ondevice.kernels import delta
from ondevice.kernels.layout import FEW
from quant.format import Array
from tests.ondevice.kernels.harness import Rows, bits, run

ROUNDING = 2e-6
CHANNELS, PAIRS = 48, 3  # of a task
MOST = delta.MOST_TENTATIVE
BATCHES = ((11,), (1,) * 11, (2, 5, 1, 3))
HEADS = pytest.mark.parametrize(
    ("key_heads", "value_heads", "size"),
    [(1, 1, 16), (2, 4, 32), (3, 3, 24), (1, 3, 17), (3, 9, 5), (2, 2, 1), (1, 2, 65)],
)


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pieces(count: tuple[int, ...]) -> list[slice]:
    ends = np.cumsum(count)
    return [slice(end - n, end) for n, end in zip(count, ends, strict=True)]


# ---- convolution ----


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("channels", [16, 40, 128, 301])
def test_convolution(channels: int, kernel: int) -> None:
    x, weights = normal(11, channels), normal(kernel, channels, seed=2)
    past = normal(kernel - 1, channels, seed=3)
    line = np.concatenate([past, x]).astype(np.float64)
    sums = sum(weights[j] * line[j : j + len(x)] for j in range(kernel))
    exact = sums / (1 + np.exp(-sums))
    place = 64
    results = []
    for batches in BATCHES:
        state = np.full(place + past.nbytes + 64, 0xFF, np.uint8)
        state[place : place + past.nbytes] = past.view(np.uint8).ravel()
        out = Rows(len(x), channels)
        for piece in pieces(batches):
            part = Rows(piece.stop - piece.start, channels)
            run(
                delta.convolve,
                *(Rows.of(x[piece]), part, channels, kernel, weights, place, 0),
                *(CHANNELS, 2 * CHANNELS),
                tasks=-(-channels // CHANNELS),
                few=-(-channels // (2 * CHANNELS)),
                count=len(part.values),
                state=state,
            )
            out.values[piece] = part.values
        window = state[place : place + past.nbytes].view(np.float32).reshape(past.shape)
        assert bits(window) == bits(np.concatenate([past, x])[len(x) :])
        assert (state[:place] == 0xFF).all()
        assert (state[place + past.nbytes :] == 0xFF).all()
        np.testing.assert_allclose(out.values, exact, rtol=ROUNDING, atol=ROUNDING)
        results.append(bits(out.values))
    assert results.count(results[0]) == len(BATCHES), "the batch changes the result"


# ---- norms and gates ----


def heads_of_task(key_heads: int) -> int:
    return 2 if key_heads % 2 == 0 else 1


@pytest.mark.parametrize("tokens", [5, FEW + 1])
@HEADS
def test_inputs(key_heads: int, value_heads: int, size: int, tokens: int) -> None:
    ratio = value_heads // key_heads
    qkv = normal(tokens, (2 * key_heads + value_heads) * size)
    # a key head's row of ba: its value heads' b, then their alpha
    ba = 4 * normal(tokens, 2 * value_heads, seed=2)
    a, dt = -abs(normal(value_heads, seed=3)), normal(value_heads, seed=4)
    rows = Rows.of(qkv)
    kq, decay, beta = Rows(1, tokens * key_heads), *(Rows(1, tokens * value_heads) for _ in "gb")
    run(
        delta.delta_inputs,
        *(rows, Rows.of(ba), key_heads, value_heads, size, a, dt),
        *(kq.address, decay.address, beta.address, 0, heads_of_task(key_heads)),
        per_token=True,
        few=key_heads // heads_of_task(key_heads),
        count=tokens,
    )
    for result in (kq, decay, beta):
        result.check()
    split = np.cumsum([key_heads * size] * 2)
    q, k, v = np.split(qkv.astype(np.float64), split, axis=1)
    q, k = (x.reshape(tokens, key_heads, size) for x in (q, k))
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(size)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    new_q, new_k, new_v = np.split(rows.values, split, axis=1)
    np.testing.assert_allclose(new_q, q.reshape(tokens, -1), rtol=ROUNDING)
    np.testing.assert_allclose(new_k, k.reshape(tokens, -1), rtol=ROUNDING)
    assert bits(new_v) == bits(v)
    overlap = (q * k).sum(-1).ravel()
    np.testing.assert_allclose(kq.values[0], overlap, rtol=ROUNDING, atol=1e-7)
    b, alpha = np.moveaxis(ba.astype(np.float64).reshape(tokens, key_heads, 2, ratio), 2, 0)
    open_to = (1 / (1 + np.exp(-b))).ravel()
    np.testing.assert_allclose(beta.values[0], open_to, rtol=ROUNDING)
    kept = np.exp(a * np.logaddexp(0, alpha.reshape(tokens, -1) + dt)).ravel()
    np.testing.assert_allclose(decay.values[0], kept, rtol=ROUNDING)


def test_gates_far_out() -> None:
    """alpha beyond what exp takes: remembers all or nothing, and is never NaN."""
    ba = np.array([[0, 500], [0, -500], [1e30, 90], [-1e30, -90]], np.float32)
    a, dt = np.array([-2], np.float32), np.zeros(1, np.float32)
    rows, kq, decay, beta = Rows.of(np.zeros((4, 48), np.float32)), *np.zeros((3, 4), np.float32)
    run(delta.delta_inputs, rows, Rows.of(ba), 1, 1, 16, a, dt, kq, decay, beta, 0, 1, tasks=4)
    assert not rows.values.any()
    assert not kq.any()
    assert decay.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(beta, [0.5, 0.5, 1, 0], atol=1e-30)


# ---- the delta rule ----


def unpacked(state: Array, heads: int, size: int) -> Array:
    """(heads, column blocks, size, 16) -> (heads, size, size)."""
    blocks = -(-size // 16)
    memory = state.view(np.float32).reshape(heads, blocks, size, 16)
    return memory.transpose(0, 2, 1, 3).reshape(heads, size, -1)[:, :, :size]


@HEADS
def test_delta_rule(key_heads: int, value_heads: int, size: int) -> None:
    tokens, ratio = 11, value_heads // key_heads
    q, k = normal(2, tokens, key_heads, size)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = normal(tokens, value_heads, size, seed=2)
    qkv = np.concatenate([x.reshape(tokens, -1) for x in (q, k, v)], axis=1)
    kq = (q.astype(np.float64) * k).sum(-1).astype(np.float32)
    random = np.random.default_rng(3)
    decay, beta = random.uniform(0, 1, (2, tokens, value_heads)).astype(np.float32)

    memory = np.zeros((value_heads, size, size))
    exact = np.empty((tokens, value_heads, size))
    for t in range(tokens):
        queries, keys = (x[t].astype(np.float64).repeat(ratio, axis=0) for x in (q, k))
        memory *= decay[t][:, None, None]
        wrong = v[t] - np.einsum("hkv,hk->hv", memory, keys)
        memory += keys[:, :, None] * (beta[t][:, None] * wrong)[:, None, :]
        exact[t] = np.einsum("hkv,hk->hv", memory, queries)

    place, used = 192, delta.memory_bytes(value_heads, size)
    results = []
    for batches in BATCHES:
        state = np.zeros(place + used + 64, np.uint8)
        state[:place] = state[place + used :] = 0xFF
        out = Rows(tokens, value_heads * size)
        for piece in pieces(batches):
            part = Rows(piece.stop - piece.start, value_heads * size)
            run(
                delta.delta_rule,
                *(Rows.of(qkv[piece]), kq[piece], decay[piece], beta[piece], part),
                *(key_heads, value_heads, size, place, PAIRS),
                tasks=-(-delta.column_pairs(value_heads, size) // PAIRS),
                scratch=delta.scratch_bytes(size),
                count=len(part.values),
                state=state,
            )
            out.values[piece] = part.values
        np.testing.assert_allclose(
            out.values.reshape(exact.shape), exact, rtol=ROUNDING, atol=ROUNDING
        )
        kept = unpacked(state[place : place + used], value_heads, size)
        np.testing.assert_allclose(kept, memory, rtol=ROUNDING, atol=ROUNDING)
        assert (state[:place] == 0xFF).all()
        assert (state[place + used :] == 0xFF).all()
        results.append((bits(out.values), state.tolist()))
    assert results.count(results[0]) == len(BATCHES), "the batch changes the result"


# ---- tokens that may be taken back ----


@HEADS
def test_taken_back_tokens_leave_no_trace(key_heads: int, value_heads: int, size: int) -> None:
    """All three kernels: 1 certain token and up to 4 more, of which some stay, turn after turn."""
    channels, kernel = (2 * key_heads + value_heads) * size, 4
    qkv, ba = normal(60, channels), 4 * normal(60, 2 * value_heads, seed=2)
    weights = normal(kernel, channels, seed=3)
    a, dt = -abs(normal(value_heads, seed=4)), normal(value_heads, seed=5)
    window_bytes = -(-4 * (kernel - 1) * channels // 64) * 64

    class Sequence:
        def __init__(self) -> None:
            self.state = np.zeros(
                window_bytes + delta.memory_bytes(value_heads, size) + 64, np.uint8
            )
            self.journal = Rows(1, delta.journal_bytes(key_heads, value_heads, size), np.uint8)
            self.pending = 0

        def take(self, rows: slice, tentative: int = 0) -> Array:
            """The outputs of a batch."""
            part, gates = Rows.of(qkv[rows]), Rows.of(ba[rows])
            count = len(part.values)
            mixed = Rows(MOST + count, channels)
            kq = np.zeros((MOST + count, key_heads), np.float32)
            decay, beta = np.zeros((2, MOST + count, value_heads), np.float32)
            out = Rows(count, value_heads * size)
            words = {
                "count": count,
                "state": self.state,
                "journal": self.journal.address,
                "pending": self.pending,
                "tentative": tentative,
            }
            run(
                delta.convolve,
                *(part, mixed, channels, kernel, weights, 0, 0, CHANNELS, 2 * CHANNELS),
                tasks=-(-channels // CHANNELS),
                few=-(-channels // (2 * CHANNELS)),
                **words,
            )
            run(
                delta.delta_inputs,
                *(mixed, gates, key_heads, value_heads, size, a, dt, kq, decay, beta, 0),
                heads_of_task(key_heads),
                per_token=count > 0,
                few=key_heads // heads_of_task(key_heads),
                **words,
            )
            run(
                delta.delta_rule,
                *(mixed, kq, decay, beta, out, key_heads, value_heads, size, window_bytes, PAIRS),
                tasks=-(-delta.column_pairs(value_heads, size) // PAIRS),
                scratch=delta.scratch_bytes(size),
                **words,
            )
            self.journal.check()
            self.pending = tentative
            return out.values

    plain, guessing = Sequence(), Sequence()
    random, at = np.random.default_rng(6), 0
    while at < 50:
        count = int(random.integers(1, MOST + 2))
        kept = int(random.integers(0, count))
        found = guessing.take(slice(at, at + count), count - 1)
        # what is taken back is not what comes next
        expected = plain.take(slice(at, at + kept + 1))
        assert bits(found[: kept + 1]) == bits(expected)
        guessing.pending = kept
        at += kept + 1
        qkv[at : at + 5] += 1
    guessing.take(slice(0, 0))
    assert guessing.pending == 0
    assert guessing.state.tolist() == plain.state.tolist()


def test_memory_bytes() -> None:
    assert delta.memory_bytes(32, 128) == 32 * 128 * 128 * 4
    assert delta.memory_bytes(3, 17) == 3 * 2 * 17 * 16 * 4
