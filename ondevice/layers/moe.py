"""The sparse feed-forward layer: k of many experts, and one that every token shares.

    h = norm(x)
    x = x + sum over the chosen of weight_e * down_e(silu(gate_e h) * up_e h)
          + sigmoid(w . h) * down(silu(gate h) * up h)            kernels/experts.py

HF: Qwen3NextSparseMoeBlock in transformers, models/qwen3_next/modeling_qwen3_next.py.
"""

import numpy as np

from ondevice.config import Config
from ondevice.experts import Pool
from ondevice.kernels import experts as kernels
from ondevice.kernels import routing as record
from ondevice.kernels import store
from ondevice.kernels.layout import BARRIER, BESIDE, CHAIN, WORD
from ondevice.program import Buffer, Program
from ondevice.weights import Weights
from quant.format import Array

GUESSED_LAYERS = 2
"""Layers after this one whose experts are asked for before their routers have spoken."""


def moe(
    program: Program,
    config: Config,
    weights: Weights,
    layer: int,
    x: Buffer,
    mixed: Buffer,
    pool: Pool | None = None,
) -> None:
    """x += mixed, the token mixer's output, then x += experts(norm(x)); in place.

    Experts are in the mapping, or come from `pool`.
    """
    last = layer + 1 >= config.layers  # or the block behind them
    # the layers whose experts are guessed
    later = [] if pool is None else list(range(layer + 1, config.layers))[:GUESSED_LAYERS]
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
    h = program.norm(
        x, ffn_norm, config.norm_epsilon, "experts input", readers, mixed,
        then=CHAIN if later else BARRIER,
    )  # fmt: skip
    guesses = [] if pool is None else _guesses(program, config, weights, later, x, pool)
    logits = program.linear(router, h, "router logits", then=BESIDE)
    opening = program.linear(openness, h, "shared opening")

    chosen, shares = program.numbers("chosen", k), program.numbers("shares", k)
    routing = _routing_record(program, count, k)
    routing_address = program.keep(routing)
    likely = [0] * GUESSED_LAYERS
    for i, (guess, times) in enumerate(guesses):
        likely[i] = program.numbers(f"likely {i}", k)
        program.add(
            kernels.route,
            *(guess.address, guess.row_bytes, count, k, likely[i]),
            program.numbers(f"shares of the likely {i}", k),
            per_token=True,
            times=times,
            then=BESIDE,
            label="guess route",
        )
    program.add(
        kernels.route, logits.address, logits.row_bytes, count, k, chosen, shares, per_token=True
    )
    inner = program.activation("expert hidden", width, (down,), k)
    shared_inner = program.activation("shared hidden", shared, (shared_down,))
    outputs = program.buffer("expert outputs", 4 * hidden, k)
    shared_output = program.buffer("shared output", 4 * hidden)
    group = (chosen, count, k, routing_address)
    if pool is None:
        program.add(kernels.group, *group)
        program.gate_up(gate, up, h, inner, "expert", routing_address, k, then=BESIDE)
        program.gate_up(shared_gate, shared_up, h, shared_inner, "shared")
        program.quantize(inner, then=BESIDE if shared_inner.records else BARRIER)
        program.quantize(shared_inner)
        program.down(down, inner, outputs, routing_address, k, then=BESIDE)
        program.down(shared_down, shared_inner, shared_output)
    else:
        order = program.keep(np.zeros(count, np.int32))
        places = program.keep(np.zeros(count * record.PLACE_WORDS, np.int64))
        pool.connect(routing, layer, order, places)
        claim = (pool.address, layer, routing_address)
        program.add(kernels.group, *group, then=CHAIN)
        program.add(store.claim, *claim, chosen, k, then=BESIDE)
        program.gate_up(shared_gate, shared_up, h, shared_inner, "shared")
        wave = program.length
        if later:
            seen = program.keep(np.zeros(2 * count, np.int32))
            program.add(
                store.guess,
                *(*claim, k, seen, *likely),
                times=guesses[0][1],
                then=BESIDE,
            )
        program.gate_up(gate, up, h, inner, "expert", routing_address, k)
        program.quantize_slots(inner, routing_address)
        program.down(down, inner, outputs, routing_address, k)
        program.quantize(shared_inner, then=BESIDE)
        loop = routing_address + WORD * record.AGAIN
        program.add(store.claim_more, *claim, loop=loop, back=program.length + 1 - wave)
        program.down(shared_down, shared_inner, shared_output)
    program.add(
        kernels.combine,
        *(x.address, x.row_bytes, hidden, outputs.address, outputs.row_bytes, k, shares),
        *(shared_output.address, shared_output.row_bytes, opening.address, opening.row_bytes),
        per_token=True,
        then=BARRIER if last else CHAIN,  # the next layer begins with a norm per token
    )


def _guesses(
    program: Program, config: Config, weights: Weights, layers: list[int], x: Buffer, pool: Pool
) -> list[tuple[Buffer, int]]:
    """What the routers of layers to come make of the stream that enters this layer's experts,
    each with the address of the word that says whether it is wanted."""
    inputs = []
    for i, layer in enumerate(layers):
        norm = weights.vector(f"blk.{layer}.post_attention_norm.weight", config.hidden)
        router = weights.likely_router(layer)
        h = program.norm(
            x, norm, config.norm_epsilon, f"guess input {i}", (router,),
            then=CHAIN if layer != layers[-1] else BARRIER, times=pool.guessing(i),
        )  # fmt: skip
        inputs.append((router, h, pool.guessing(i)))
    return [
        (program.linear(router, h, f"guess {i}", then=BESIDE, times=times), times)
        for i, (router, h, times) in enumerate(inputs)
    ]


def _routing_record(program: Program, experts: int, k: int) -> Array:
    routing = np.zeros(record.ROUTING_WORDS, np.int64)
    routing[record.NUMBERS] = program.keep(np.zeros(experts, np.int32))
    routing[record.STARTS] = program.keep(np.zeros(experts + 1, np.int32))
    routing[record.SLOTS] = program.numbers("slots", k)
    routing[record.SLOT_TOKENS] = program.numbers("tokens of slots", k)
    return routing
