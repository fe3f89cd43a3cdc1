"""The sparse feed-forward layer: k of many experts, and one that every token shares.

    h = norm(x)
    x = x + sum over the chosen of weight_e * down_e(silu(gate_e h) * up_e h)
          + sigmoid(w . h) * down(silu(gate h) * up h)            kernels/experts.py

HF: Qwen3NextSparseMoeBlock in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

import numpy as np

from ondevice.config import Config
from ondevice.kernels import experts as kernels
from ondevice.kernels.layout import BARRIER, BESIDE, CHAIN
from ondevice.program import Buffer, Program
from ondevice.weights import Weights


def moe(
    program: Program, config: Config, weights: Weights, layer: int, x: Buffer, mixed: Buffer
) -> None:
    """x += mixed, the token mixer's output, then x += experts(norm(x)); in place."""
    last = layer + 1 == config.layers
    block = f"blk.{layer}"
    hidden, width, shared = config.hidden, config.expert_width, config.shared_width
    count, k = config.experts, config.experts_used
    router = weights.matrix(f"{block}.ffn_gate_inp.weight", count, hidden)
    openness = weights.matrix(f"{block}.ffn_gate_inp_shexp.weight", 1, hidden)
    gate, up, _ = weights.expert_gate_up(layer)
    down = weights.matrix(f"{block}.ffn_down_exps.weight", hidden, width, count)
    shared_gate = weights.matrix(f"{block}.ffn_gate_shexp.weight", shared, hidden)
    shared_up = weights.matrix(f"{block}.ffn_up_shexp.weight", shared, hidden)
    shared_down = weights.matrix(f"{block}.ffn_down_shexp.weight", hidden, shared)
    readers = (router, openness, gate, up, shared_gate, shared_up)

    ffn_norm = weights.vector(f"{block}.post_attention_norm.weight", hidden)
    h = program.norm(x, ffn_norm, config.norm_epsilon, "experts input", readers, addend=mixed)
    logits = program.linear(router, h, "router logits", then=BESIDE)
    opening = program.linear(openness, h, "shared opening")

    slots = program.capacity * k
    chosen = program.keep(np.zeros(slots, np.int32))
    shares = program.keep(np.zeros(slots, np.float32))
    routing = _routing_record(program, count, slots)
    program.add(
        kernels.route, logits.address, logits.row_bytes, count, k, chosen, shares, per_token=True
    )
    program.add(kernels.group, chosen, count, k, routing)

    inner = program.activation("expert hidden", width, (down,), k)
    shared_inner = program.activation("shared hidden", shared, (shared_down,))
    program.gate_up(gate, up, h, inner, "expert", routing, k, then=BESIDE)
    program.gate_up(shared_gate, shared_up, h, shared_inner, "shared")
    program.quantize(inner, then=BESIDE if shared_inner.records else BARRIER)
    program.quantize(shared_inner)
    outputs = program.buffer("expert outputs", 4 * hidden, k)
    shared_output = program.buffer("shared output", 4 * hidden)
    program.down(down, inner, outputs, routing, k, then=BESIDE)
    program.down(shared_down, shared_inner, shared_output)
    program.add(
        kernels.combine,
        *(x.address, x.row_bytes, hidden, outputs.address, outputs.row_bytes, k, shares),
        *(shared_output.address, shared_output.row_bytes, opening.address, opening.row_bytes),
        per_token=True,
        then=BARRIER if last else CHAIN,  # the next layer begins with a norm per token
    )


def _routing_record(program: Program, experts: int, slots: int) -> int:
    record = np.zeros(kernels.ROUTING_WORDS, np.int64)
    record[kernels.NUMBERS] = program.keep(np.zeros(experts, np.int32))
    record[kernels.STARTS] = program.keep(np.zeros(experts + 1, np.int32))
    record[kernels.SLOTS] = program.keep(np.zeros(slots, np.int32))
    record[kernels.SLOT_TOKENS] = program.keep(np.zeros(slots, np.int32))
    return program.keep(record)
