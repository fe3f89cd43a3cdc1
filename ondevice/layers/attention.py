"""Gated attention, the token mixer of every fourth layer.

    (q, gate), k, v = W_q x, W_k x, W_v x            q and gate interleaved per head
    o = attention(rope(norm(q)), rope(norm(k)), v)   kernels/attention.py
    y = W_o (o * sigmoid(gate))

HF: Qwen3NextAttention in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

import numpy as np

from ondevice.config import Config
from ondevice.kernels import attention as kernels
from ondevice.kernels.layout import BESIDE, CHAIN
from ondevice.program import Buffer, Program, float_bits
from ondevice.weights import Weights


def rotations(program: Program, config: Config) -> int:
    """Add the angles of a batch's positions; returns the address that `attention` takes."""
    pairs = config.rope_dimensions // 2
    exponents = np.arange(0, config.rope_dimensions, 2, dtype=np.float32)
    base = np.float32(config.rope_base)
    frequencies = np.float32(1) / base ** (exponents / np.float32(config.rope_dimensions))
    table = program.keep(np.zeros((program.capacity, 2, pairs), np.float32))
    program.add(
        kernels.rotations,
        *(program.keep(frequencies.astype(np.float32)), pairs, table),
        per_token=True,
        then=CHAIN,
    )
    return table


def attention(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    x: Buffer,
    angles: int,
    index: int,
) -> Buffer:
    """y for every token; `index` counts the attention layers before this one."""
    block = f"blk.{layer}"
    hidden, size = config.hidden, config.head_dim
    q_matrix = weights.matrix(f"{block}.attn_q.weight", 2 * config.heads * size, hidden)
    k_matrix = weights.matrix(f"{block}.attn_k.weight", config.kv_heads * size, hidden)
    v_matrix = weights.matrix(f"{block}.attn_v.weight", config.kv_heads * size, hidden)
    out_matrix = weights.matrix(f"{block}.attn_output.weight", hidden, config.heads * size)
    readers = (q_matrix, k_matrix, v_matrix)

    attn_norm = weights.vector(f"{block}.attn_norm.weight", hidden)
    h = program.norm(x, attn_norm, config.norm_epsilon, "mixer input", readers)
    q = program.linear(q_matrix, h, "q", then=BESIDE)
    k = program.linear(k_matrix, h, "k", then=BESIDE)
    v = program.linear(v_matrix, h, "v")
    program.add(
        kernels.attention_inputs,
        *(q.address, q.row_bytes, k.address, k.row_bytes, v.address, v.row_bytes),
        *(config.heads, config.kv_heads, size, config.rope_dimensions // 2, angles),
        program.keep(weights.vector(f"{block}.attn_q_norm.weight", size)),
        program.keep(weights.vector(f"{block}.attn_k_norm.weight", size)),
        float_bits(config.norm_epsilon),
        index,
        tasks=config.heads + config.kv_heads,
        per_token=True,
    )
    o = program.activation("attention output", config.heads * size, (out_matrix,))
    program.scratch_bytes = max(program.scratch_bytes, kernels.scratch_bytes(size))
    program.add(
        kernels.attend,
        *(q.address, q.row_bytes, config.heads, config.kv_heads, size),
        *(o.floats.address, o.floats.row_bytes, index),
        tasks=config.heads,
        per_token=True,
    )
    program.quantize(o)
    return program.linear(out_matrix, o, "mixer output")
