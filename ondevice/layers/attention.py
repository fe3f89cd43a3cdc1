"""Gated attention, the token mixer of every fourth layer.

    (q, gate), k, v = W_q x, W_k x, W_v x            q and gate interleaved per head
    o = attention(rope(norm(q)), rope(norm(k)), v)   kernels/attention.py
    y = W_o (o * sigmoid(gate))

HF: Qwen3NextAttention in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

from typing import NamedTuple

import numpy as np

from ondevice.config import Config
from ondevice.kernels import attention as kernels
from ondevice.kernels.layout import BESIDE, CHAIN
from ondevice.program import Activation, Buffer, Program, float_bits, record_arguments
from ondevice.weights import Weights


class Batch(NamedTuple):
    """What a batch's positions say to all attention layers: addresses."""

    angles: int
    tasks: int
    partials: int


def positions(program: Program, config: Config, then: int = CHAIN) -> Batch:
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
    return Batch(table, int(tasks.ctypes.data), program.keep(partials))


def attention(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    x: Buffer,
    batch: Batch,
    index: int,
    kv: str,
) -> Buffer:
    """y for every token; `index` counts the attention layers before this one, kv says how keys and
    values are kept."""
    block = f"blk.{layer}"
    hidden, size = config.hidden, config.head_dim
    q_matrix = weights.matrix(f"{block}.attn_q.weight", 2 * config.heads * size, hidden)
    k_matrix = weights.matrix(f"{block}.attn_k.weight", config.kv_heads * size, hidden)
    v_matrix = weights.matrix(f"{block}.attn_v.weight", config.kv_heads * size, hidden)
    readers = (q_matrix, k_matrix, v_matrix)

    attn_norm = weights.vector(f"{block}.attn_norm.weight", hidden)
    h = program.norm(x, attn_norm, config.norm_epsilon, "mixer input", readers)
    with program.stage("attention"):
        q = program.linear(q_matrix, h, "q", then=BESIDE)
        k = program.linear(k_matrix, h, "k", then=BESIDE)
        v = program.linear(v_matrix, h, "v")
        _keep(program, config, weights, layer, q, (k, v), batch, index, kv)
    return _attend(program, config, weights, layer, q, batch, index, kv)


def attention_to_kept(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    h: Activation,
    batch: Batch,
    index: int,
    kv: str,
) -> Buffer:
    """As `attention`, of tokens whose keys and values are kept already; h is norm(x)."""
    rows = 2 * config.heads * config.head_dim
    with program.stage("attention"):
        matrix = weights.matrix(f"blk.{layer}.attn_q.weight", rows, config.hidden)
        q = program.linear(matrix, h, "q")
        _keep(program, config, weights, layer, q, None, batch, index, kv)
    return _attend(program, config, weights, layer, q, batch, index, kv)


def keys_and_values(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    x: Buffer,
    batch: Batch,
    index: int,
    kv: str,
) -> Activation:
    """Keep those of every token, and nothing else of `attention`; norm(x)."""
    block = f"blk.{layer}"
    hidden, size = config.hidden, config.head_dim
    q_matrix = weights.matrix(f"{block}.attn_q.weight", 2 * config.heads * size, hidden)
    k_matrix = weights.matrix(f"{block}.attn_k.weight", config.kv_heads * size, hidden)
    v_matrix = weights.matrix(f"{block}.attn_v.weight", config.kv_heads * size, hidden)
    attn_norm = weights.vector(f"{block}.attn_norm.weight", hidden)
    readers = (q_matrix, k_matrix, v_matrix)
    h = program.norm(x, attn_norm, config.norm_epsilon, "mixer input", readers)
    with program.stage("attention"):
        k = program.linear(k_matrix, h, "k", then=BESIDE)
        v = program.linear(v_matrix, h, "v")
        _keep(program, config, weights, layer, None, (k, v), batch, index, kv)
    return h


def _keep(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    q: Buffer | None,
    keys: tuple[Buffer, Buffer] | None,
    batch: Batch,
    index: int,
    kv: str,
) -> None:
    """Norm and rotate queries, and keep keys and values, of those that are there."""
    size = config.head_dim
    heads, kv_heads = (config.heads if q else 0), (config.kv_heads if keys else 0)
    buffers = (q, *(keys or (None, None)))
    places = [(x.address, x.row_bytes) if x else (0, 0) for x in buffers]
    program.add(
        kernels.CACHES[kv].inputs,
        *(word for place in places for word in place),
        *(heads, kv_heads, size, config.rope_dimensions // 2, batch.angles),
        program.keep(weights.vector(f"blk.{layer}.attn_q_norm.weight", size)),
        program.keep(weights.vector(f"blk.{layer}.attn_k_norm.weight", size)),
        float_bits(config.norm_epsilon),
        index,
        tasks=heads + kv_heads,
        per_token=True,
    )


def _attend(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    q: Buffer,
    batch: Batch,
    index: int,
    kv: str,
) -> Buffer:
    """From the queries on."""
    size = config.head_dim
    columns = config.heads * size
    out_matrix = weights.matrix(f"blk.{layer}.attn_output.weight", config.hidden, columns)
    with program.stage("attention"):
        o = program.activation("attention output", columns, (out_matrix,))
        heads = program.heads_of_task(config.heads, o)
        scratch = kernels.scratch_bytes(config.heads, config.kv_heads, size)
        program.scratch_bytes = max(program.scratch_bytes, scratch)
        program.add(
            kernels.CACHES[kv].attend,
            *(q.address, q.row_bytes, config.heads, config.kv_heads, size),
            *(o.floats.address, o.floats.row_bytes, index, batch.partials),
            times=batch.tasks,
        )
        program.add(
            kernels.attention_output,
            *(q.address, q.row_bytes, config.heads, size, o.floats.address, o.floats.row_bytes),
            *(batch.partials, *record_arguments(o), heads),
            per_token=True,
            few=config.heads // heads,
        )
    return program.linear(out_matrix, o, "mixer output")
