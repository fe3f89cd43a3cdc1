"""Gated attention, the token mixer of every fourth layer.

    (q, gate), k, v = W_q x, W_k x, W_v x            q and gate interleaved per head
    o = attention(rope(norm(q)), rope(norm(k)), v)   kernels/attention.py
    y = W_o (o * sigmoid(gate))

HF: Qwen3NextAttention in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ondevice.config import Config
from ondevice.kernels import attention as kernels
from ondevice.kernels.layout import BESIDE, CHAIN
from ondevice.program import Activation, Buffer, Program, float_bits, record_arguments
from ondevice.weights import Matrix, Weights


class Positions(NamedTuple):
    """What a batch's positions say to all attention layers: addresses."""

    angles: int
    tasks: int
    partials: int


def positions(program: Program, config: Config, then: int = CHAIN) -> Positions:
    """Add what depends on a batch's positions alone; `then` is what may follow."""
    pairs = config.rope_dimensions // 2
    exponents = np.arange(0, config.rope_dimensions, 2, dtype=np.float32)
    base = np.float32(config.rope_base)
    frequencies = np.float32(1) / base ** (exponents / np.float32(config.rope_dimensions))
    table = program.numbers("rotations", 2 * pairs)
    tasks = np.zeros(1, np.int64)
    program.add(
        kernels.rotations,
        *(program.keep(frequencies.astype(np.float32)), pairs, table),
        *(config.kv_heads, program.keep(tasks)),
        per_token=True,
        then=then,
    )
    partials = np.zeros(kernels.partial_bytes(config.heads, config.head_dim), np.uint8)
    return Positions(table, int(tasks.ctypes.data), program.keep(partials))


@dataclass(frozen=True)
class Attention:
    """One layer's, to be added to a program; `index` counts the attention layers before it, kv says
    how keys and values are kept."""

    program: Program
    config: Config
    weights: Weights
    layer: int
    index: int
    kv: str

    def mixed(self, x: Buffer, at: Positions) -> Buffer:
        """y for every token."""
        h = self._input(x)
        with self.program.stage("attention"):
            q = self.program.linear(self._queries, h, "q", then=BESIDE)
            self._keep(q, self._keys_and_values(h), at)
        return self._attend(q, at)

    def follow(self, x: Buffer, at: Positions) -> Activation:
        """Keep every token's keys and values, and nothing else; norm(x)."""
        h = self._input(x)
        with self.program.stage("attention"):
            self._keep(None, self._keys_and_values(h), at)
        return h

    def mixed_after(self, h: Activation, at: Positions) -> Buffer:
        """y for tokens that `follow` has seen; h is norm(x)."""
        with self.program.stage("attention"):
            q = self.program.linear(self._queries, h, "q")
            self._keep(q, None, at)
        return self._attend(q, at)

    @property
    def _queries(self) -> Matrix:
        return self._matrix("q", 2 * self.config.heads)

    def _matrix(self, part: str, heads: int) -> Matrix:
        config, name = self.config, f"blk.{self.layer}.attn_{part}.weight"
        return self.weights.matrix(name, heads * config.head_dim, config.hidden)

    def _input(self, x: Buffer) -> Activation:
        """norm(x), for all three matrices."""
        k, v = (self._matrix(part, self.config.kv_heads) for part in "kv")
        norm = self.weights.vector(f"blk.{self.layer}.attn_norm.weight", self.config.hidden)
        readers = (self._queries, k, v)
        return self.program.norm(x, norm, self.config.norm_epsilon, "mixer input", readers)

    def _keys_and_values(self, h: Activation) -> tuple[Buffer, Buffer]:
        k = self.program.linear(self._matrix("k", self.config.kv_heads), h, "k", then=BESIDE)
        return k, self.program.linear(self._matrix("v", self.config.kv_heads), h, "v")

    def _keep(self, q: Buffer | None, keys: tuple[Buffer, Buffer] | None, at: Positions) -> None:
        """Norm and rotate queries, and keep keys and values, of those that are there."""
        config, program, size = self.config, self.program, self.config.head_dim
        heads, kv_heads = (config.heads if q else 0), (config.kv_heads if keys else 0)
        buffers = (q, *(keys or (None, None)))
        places = [(x.address, x.row_bytes) if x else (0, 0) for x in buffers]
        program.add(
            kernels.CACHES[self.kv].inputs,
            *(word for place in places for word in place),
            *(heads, kv_heads, size, config.rope_dimensions // 2, at.angles),
            program.keep(self.weights.vector(f"blk.{self.layer}.attn_q_norm.weight", size)),
            program.keep(self.weights.vector(f"blk.{self.layer}.attn_k_norm.weight", size)),
            float_bits(config.norm_epsilon),
            self.index,
            tasks=heads + kv_heads,
            per_token=True,
        )

    def _attend(self, q: Buffer, at: Positions) -> Buffer:
        """From the queries on."""
        config, program, size = self.config, self.program, self.config.head_dim
        columns = config.heads * size
        name = f"blk.{self.layer}.attn_output.weight"
        out_matrix = self.weights.matrix(name, config.hidden, columns)
        with program.stage("attention"):
            o = program.activation("attention output", columns, (out_matrix,))
            heads = program.heads_of_task(config.heads, o)
            scratch = kernels.scratch_bytes(config.heads, config.kv_heads, size)
            program.scratch_bytes = max(program.scratch_bytes, scratch)
            program.add(
                kernels.CACHES[self.kv].attend,
                *(q.address, q.row_bytes, config.heads, config.kv_heads, size),
                *(o.floats.address, o.floats.row_bytes, self.index, at.partials),
                times=at.tasks,
            )
            program.add(
                kernels.attention_output,
                *(q.address, q.row_bytes, config.heads, size, o.floats.address, o.floats.row_bytes),
                *(at.partials, *record_arguments(o), heads),
                per_token=True,
                few=config.heads // heads,
            )
        return program.linear(out_matrix, o, "mixer output")
