"""Gated DeltaNet, the token mixer of three layers in four.

    qkv, z, (b, alpha) = W_qkv x, W_z x, W_ba x
    q, k, v = silu(conv(qkv))
    o = delta_rule(q, k, v, decay(alpha), sigmoid(b))        kernels/delta.py
    y = W_out (norm(o) * silu(z))                            norm per value head

HF: Qwen3NextGatedDeltaNet in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

import numpy as np

from ondevice.config import Config
from ondevice.kernels import delta, norm
from ondevice.kernels.layout import BESIDE
from ondevice.program import (
    WIDE_SHARES_PER_THREAD,
    Buffer,
    Program,
    float_bits,
    record_arguments,
)
from ondevice.weights import Weights


def memory_bytes(config: Config) -> int:
    """Bytes of one layer's state: the convolution's window, then the delta memory."""
    return window_bytes(config) + delta.memory_bytes(config.value_heads, config.state_size)


def window_bytes(config: Config) -> int:
    """Bytes of the last inputs of the convolution, rounded up to cache lines."""
    return -(-4 * (config.conv_kernel - 1) * config.conv_channels // 64) * 64


def journal_bytes(config: Config) -> int:
    """Bytes of one layer's part of the journal."""
    return delta.journal_bytes(config.key_heads, config.value_heads, config.state_size)


def deltanet(
    program: Program, config: Config, weights: Weights, layer: int, x: Buffer, index: int
) -> Buffer:
    """y for every token; `index` counts the DeltaNet layers before this one."""
    place, journal = index * memory_bytes(config), index * journal_bytes(config)
    block = f"blk.{layer}"
    hidden, size = config.hidden, config.state_size
    qkv_matrix, z_matrix = weights.delta_input(layer)
    ba_matrix = weights.matrix(f"{block}.ssm_ba.weight", 2 * config.value_heads, hidden)
    out_matrix = weights.matrix(f"{block}.ssm_out.weight", hidden, config.value_dim)
    conv = weights.array(f"{block}.ssm_conv1d.weight", config.conv_channels, config.conv_kernel)
    readers = (qkv_matrix, z_matrix, ba_matrix)

    attn_norm = weights.vector(f"{block}.attn_norm.weight", hidden)
    h = program.norm(x, attn_norm, config.norm_epsilon, "mixer input", readers)
    with program.stage("deltanet"):
        qkv = program.linear(qkv_matrix, h, "qkv", then=BESIDE)
        z = program.linear(z_matrix, h, "z", then=BESIDE)
        ba = program.linear(ba_matrix, h, "ba")

        mixed = program.buffer("convolved", 4 * config.conv_channels)
        channels = program.share(config.conv_channels, 16)
        wide = program.share(config.conv_channels, 16, WIDE_SHARES_PER_THREAD)
        program.add(
            delta.convolve,
            *(qkv.address, qkv.row_bytes, mixed.address, mixed.row_bytes),
            *(config.conv_channels, config.conv_kernel),
            program.keep(np.ascontiguousarray(conv.T)),
            *(place, journal, channels, wide),
            tasks=-(-config.conv_channels // channels),
            few=-(-config.conv_channels // wide),
        )
        kq = program.numbers("key times query", config.key_heads)
        decay = program.numbers("decay", config.value_heads)
        beta = program.numbers("beta", config.value_heads)
        heads = program.heads_of_task(config.key_heads)
        program.add(
            delta.delta_inputs,
            *(mixed.address, mixed.row_bytes, ba.address, ba.row_bytes),
            *(config.key_heads, config.value_heads, size),
            program.keep(weights.vector(f"{block}.ssm_a", config.value_heads)),
            program.keep(weights.vector(f"{block}.ssm_dt.bias", config.value_heads)),
            *(kq, decay, beta, journal, heads),
            per_token=True,
            few=config.key_heads // heads,
        )
        o = program.activation("delta output", config.value_dim, (out_matrix,))
        program.scratch_bytes = max(program.scratch_bytes, delta.scratch_bytes(size))
        every = delta.column_pairs(config.value_heads, size)
        pairs = program.share(every)
        program.add(
            delta.delta_rule,
            *(mixed.address, mixed.row_bytes, kq, decay, beta),
            *(o.floats.address, o.floats.row_bytes),
            *(config.key_heads, config.value_heads, size, place + window_bytes(config), pairs),
            tasks=-(-every // pairs),
        )
        heads = program.heads_of_task(config.value_heads, o)
        program.add(
            norm.gated_norm,
            *(o.floats.address, o.floats.row_bytes, z.address, z.row_bytes),
            *(config.value_heads, size),
            program.keep(weights.vector(f"{block}.ssm_norm.weight", size)),
            float_bits(config.norm_epsilon),
            *(*record_arguments(o), heads),
            per_token=True,
            few=config.value_heads // heads,
        )
    return program.linear(out_matrix, o, "mixer output")
