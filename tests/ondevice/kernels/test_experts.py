"""The sparse layer's steps against float64, and slots against tokens one by one."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from ondevice.kernels import experts
from ondevice.kernels import routing as routing_record
from ondevice.kernels.formats import READERS
from quant.format import Array
from tests.ondevice.kernels.harness import (
    Rows,
    bits,
    expanded,
    gaussian_blocks,
    meant,
    random_records,
    run,
)

FORMATS = pytest.mark.parametrize("name", ["F32", "Q8_0"])
MIXTURES = pytest.mark.parametrize("formats", [("F32", "F32"), ("Q8_0", "F32"), ("Q4_K", "Q4_0")])
ROUNDING = 2e-6


def normal(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def route(logits: Array, k: int, threads: int = 2) -> tuple[Array, Array]:
    """(chosen, weights) of logits (tokens, experts)."""
    tokens, count = logits.shape
    chosen, weights = np.full((tokens, k), -1, np.int32), np.zeros((tokens, k), np.float32)
    run(experts.route, Rows.of(logits), count, k, chosen, weights, tasks=tokens, threads=threads)
    return chosen, weights


@dataclass
class Routing:
    """A routing record and the arrays that it points to."""

    experts: int
    slots: int
    record: Array = field(init=False)

    def __post_init__(self) -> None:
        lengths = (self.experts, self.experts + 1, self.slots, self.slots)
        self.numbers, self.starts, self.order, self.tokens = (
            np.full(length, -1, np.int32) for length in lengths
        )
        arrays = (self.numbers, self.starts, self.order, self.tokens)
        self.record = np.zeros(routing_record.ROUTING_WORDS, np.int64)
        self.record[routing_record.NUMBERS : routing_record.NUMBERS + 4] = [
            a.ctypes.data for a in arrays
        ]


def group(chosen: Array, count: int) -> Routing:
    """The routing of chosen (tokens, k) among `count` experts."""
    routing = Routing(count, chosen.size)
    run(experts.group, chosen, count, chosen.shape[1], routing.record, count=len(chosen))
    return routing


def random_choice(tokens: int, count: int, k: int) -> Array:
    random = np.random.default_rng(3)
    return np.array([random.permutation(count)[:k] for _ in range(tokens)], np.int32)


# ---- choosing ----


@pytest.mark.parametrize(("count", "k"), [(16, 4), (512, 10), (7, 1), (5, 5), (1, 1)])
def test_routes_are_the_renormalised_best(count: int, k: int) -> None:
    logits = 4 * normal(20, count)
    chosen, weights = route(logits, k)
    share = np.exp(logits.astype(np.float64))
    share /= share.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert chosen.tolist() == order.tolist()
    best = np.take_along_axis(share, order, axis=1)
    np.testing.assert_allclose(weights, best / best.sum(axis=1, keepdims=True), rtol=ROUNDING)


def test_of_equal_logits_the_lower_number_wins() -> None:
    logits = np.array([[1, 3, 3, 1, 3, 1], [0, 0, 0, 0, 0, 0]], np.float32)
    chosen, weights = route(logits, 4)
    assert chosen.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert weights[1].tolist() == [0.25] * 4


def test_far_apart_logits() -> None:
    logits = np.array([[-1000, 1000, 0, 3e38], [-3e38, -3e38, -1e38, -2e38]], np.float32)
    chosen, weights = route(logits, 4)
    assert chosen.tolist() == [[3, 1, 2, 0], [2, 3, 0, 1]]
    np.testing.assert_allclose(weights, [[1, 0, 0, 0]] * 2, atol=1e-30)


def test_threads_do_not_change_routes() -> None:
    logits = normal(9, 32)
    for one, other in zip(route(logits, 4, threads=1), route(logits, 4, threads=3), strict=True):
        assert one.tolist() == other.tolist()


# ---- grouping ----


@pytest.mark.parametrize(
    ("tokens", "count", "k"), [(1, 8, 3), (12, 8, 3), (5, 4, 4), (3, 64, 2), (2, 1, 1)]
)
def test_groups_hold_every_slot_once_in_order(tokens: int, count: int, k: int) -> None:
    chosen = random_choice(tokens, count, k)
    routing = group(chosen, count)
    touched = routing.record[routing_record.TOUCHED]
    assert routing.numbers[:touched].tolist() == np.unique(chosen).tolist()
    assert routing.starts[touched] == chosen.size
    for i, expert in enumerate(routing.numbers[:touched]):
        slots = slice(routing.starts[i], routing.starts[i + 1])
        wanted = np.flatnonzero(chosen.ravel() == expert)
        assert routing.order[slots].tolist() == wanted.tolist()
        assert routing.tokens[slots].tolist() == (wanted // k).tolist()


# ---- products ----


@dataclass
class Matrices:
    """One matrix per expert, with bytes of others between them."""

    name: str
    count: int
    rows: int
    columns: int
    seed: int

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        raw = gaussian_blocks(self.name, self.count * self.rows, self.columns, random)
        self.row_bytes = raw.shape[1]
        self.memory = Rows.of(raw.reshape(self.count, -1))
        exact = expanded(self.name, raw).astype(np.float64)
        self.exact = exact.reshape(self.count, self.rows, self.columns)
        self.arguments = (self.memory, self.row_bytes, READERS[self.name].multiply.address)
        self.scratch = READERS[self.name].scratch_bytes(self.columns)

    def records(self, rows: int) -> tuple[Array, Array]:
        """Random activations for these matrices: records, and what they mean."""
        kind = READERS[self.name].activation
        records = random_records(kind, rows, self.columns, np.random.default_rng(self.seed + 1))
        return records, meant(kind, records, self.columns)


WIDTH, COLUMNS, EXPERTS, K = 21, 256, 6, 3


class GateUp:
    """Gate and up matrices, each with records of activations of its own."""

    def __init__(self, formats: tuple[str, str], count: int, tokens: int) -> None:
        self.gate, self.up = (
            Matrices(name, count, WIDTH, COLUMNS, seed)
            for seed, name in enumerate(formats, start=1)
        )
        self.gate_records, self.gate_x = self.gate.records(tokens)
        self.up_records, self.up_x = self.up.records(tokens)

    def run(self, tokens: slice, routing: Routing | None, chunk: int) -> Array:
        """Hidden values of every slot, or of every token without a routing."""
        gate_x, up_x = self.gate_records[tokens], self.up_records[tokens]
        slots = routing.slots if routing else len(gate_x)
        out, products = Rows(slots, WIDTH), 64 * -(-max(self.gate.scratch, self.up.scratch) // 64)
        run(
            experts.gate_up,
            *(*self.gate.arguments, gate_x, gate_x.strides[0]),
            *(*self.up.arguments, up_x, up_x.strides[0], WIDTH, COLUMNS),
            *(out, routing.record if routing else 0, chunk, 0, products),
            tasks=-(-WIDTH // chunk),
            times=routing.record if routing else None,
            count=len(gate_x),
            scratch=products + experts.gate_up_scratch(WIDTH),
        )
        out.check()
        return out.values

    def exact(self, chosen: Array, tokens: Array) -> Array:
        """The same of experts `chosen` and `tokens`, both (slots,), in float64."""
        left = np.einsum("src,sc->sr", self.gate.exact[chosen], self.gate_x[tokens])
        right = np.einsum("src,sc->sr", self.up.exact[chosen], self.up_x[tokens])
        return silu(left) * right


@MIXTURES
@pytest.mark.parametrize("tokens", [1, 7])
def test_gate_up_of_chosen_experts(formats: tuple[str, str], tokens: int) -> None:
    matrices = GateUp(formats, EXPERTS, tokens)
    chosen = random_choice(tokens, EXPERTS, K)
    hidden = matrices.run(slice(None), group(chosen, EXPERTS), chunk=8)
    exact = matrices.exact(chosen.ravel(), np.arange(tokens).repeat(K))
    np.testing.assert_allclose(hidden, exact, rtol=1e-5, atol=1e-6 * abs(exact).max())
    for chunk in (16, 24):
        again = matrices.run(slice(None), group(chosen, EXPERTS), chunk)
        assert bits(again) == bits(hidden)
    for t in range(tokens):
        alone = matrices.run(slice(t, t + 1), group(chosen[t : t + 1], EXPERTS), chunk=8)
        assert bits(alone) == bits(hidden[t * K : t * K + K])


@MIXTURES
def test_gate_up_of_the_shared_expert(formats: tuple[str, str]) -> None:
    matrices = GateUp(formats, 1, 5)
    hidden = matrices.run(slice(None), None, chunk=8)
    exact = matrices.exact(np.zeros(5, int), np.arange(5))
    np.testing.assert_allclose(hidden, exact, rtol=1e-5, atol=1e-6 * abs(exact).max())


def test_gate_up_of_more_tokens_than_have_room_together() -> None:
    tokens = experts.ROOM // (2 * 64 * 3) + 20  # three lines hold WIDTH floats, and are odd
    matrices = GateUp(("Q8_0", "Q8_0"), 1, tokens)
    hidden = matrices.run(slice(None), None, chunk=WIDTH)
    for part in (slice(0, 20), slice(tokens - 40, tokens)):
        assert bits(matrices.run(part, None, chunk=WIDTH)) == bits(hidden[part])


@FORMATS
@pytest.mark.parametrize("tokens", [1, 7])
def test_down_of_chosen_experts(name: str, tokens: int) -> None:
    """Every slot has a hidden vector of its own."""
    matrices = Matrices(name, EXPERTS, 37, COLUMNS, seed=1)
    records, x = matrices.records(tokens * K)
    chosen = random_choice(tokens, EXPERTS, K)
    routing = group(chosen, EXPERTS)
    results = []
    for chunk in (8, 40):
        out = Rows(tokens * K, 37)
        run(
            experts.down,
            *(*matrices.arguments, records, records.strides[0], 37, COLUMNS, out),
            *(routing.record, chunk),
            tasks=-(-37 // chunk),
            times=routing.record,
            count=tokens,
            scratch=matrices.scratch,
        )
        results.append(out.values)
    exact = np.einsum("src,sc->sr", matrices.exact[chosen.ravel()], x)
    np.testing.assert_allclose(results[0], exact, rtol=1e-5, atol=1e-6 * abs(exact).max())
    assert bits(results[0]) == bits(results[1])


def test_down_of_the_shared_expert() -> None:
    matrices = Matrices("Q8_0", 1, 37, COLUMNS, seed=1)
    records, x = matrices.records(6)
    out = Rows(6, 37)
    run(
        experts.down,
        *(*matrices.arguments, records, records.strides[0], 37, COLUMNS, out, 0, 16),
        tasks=3,
        count=6,
        scratch=matrices.scratch,
    )
    np.testing.assert_allclose(out.values, x @ matrices.exact[0].T, rtol=1e-5, atol=1e-5)


# ---- adding up ----


@pytest.mark.parametrize("columns", [1, 16, 50])
@pytest.mark.parametrize("k", [1, 4])
def test_combine(columns: int, k: int) -> None:
    tokens = 5
    x, outputs = normal(tokens, columns), normal(tokens * k, columns, seed=2)
    weights, shared = abs(normal(tokens, k, seed=3)), normal(tokens, columns, seed=4)
    gate = normal(tokens, 1, seed=5)
    rows = Rows.of(x)
    run(
        experts.combine,
        *(rows, columns, Rows.of(outputs), k, weights, Rows.of(shared), Rows.of(gate)),
        tasks=tokens,
        threads=3,
    )
    chosen = (outputs.reshape(tokens, k, columns) * weights.astype(np.float64)[:, :, None]).sum(1)
    exact = x + chosen + shared / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(rows.values, exact, rtol=ROUNDING, atol=ROUNDING)
