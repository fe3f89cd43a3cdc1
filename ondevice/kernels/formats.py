"""Which kernels read which block format."""

from collections.abc import Callable
from dataclasses import dataclass

from ondevice.kernels import expand
from ondevice.kernels.activation import NONE, PER_32, PER_256
from ondevice.kernels.dot import blocks, expanded, floats, iq4_xs, mxfp4, pairs, q4_k, q6_k, q8_0
from ondevice.kernels.dot.tile import scratch_bytes
from ondevice.kernels.operation import CompiledFunction


@dataclass(frozen=True)
class Reader:
    """The code that multiplies and expands rows of one format."""

    multiply: CompiledFunction
    expand: CompiledFunction
    activation: int
    """The kind of activation record that `multiply` takes."""
    scratch_bytes: Callable[[int], int]
    """Scratch that `multiply` needs, by columns."""


def _no_scratch(columns: int) -> int:
    return 0


READERS = {
    "F32": Reader(floats.multiply_f32, expand.expand_f32, NONE, _no_scratch),
    "F16": Reader(floats.multiply_f16, expand.expand_f16, NONE, _no_scratch),
    "BF16": Reader(floats.multiply_bf16, expand.expand_bf16, NONE, _no_scratch),
    "Q8_0": Reader(q8_0.multiply_q8_0, expand.expand_q8_0, PER_32, scratch_bytes),
    "Q4_0": Reader(pairs.multiply_q4_0, expand.expand_q4_0, PER_32, scratch_bytes),
    "Q4_1": Reader(blocks.multiply_q4_1, expand.expand_q4_1, PER_32, scratch_bytes),
    "Q5_0": Reader(blocks.multiply_q5_0, expand.expand_q5_0, PER_32, scratch_bytes),
    "Q5_1": Reader(blocks.multiply_q5_1, expand.expand_q5_1, PER_32, scratch_bytes),
    "IQ4_NL": Reader(pairs.multiply_iq4_nl, expand.expand_iq4_nl, PER_32, scratch_bytes),
    "MXFP4": Reader(mxfp4.multiply_mxfp4, expand.expand_mxfp4, PER_32, scratch_bytes),
    "Q2_K": Reader(expanded.multiply_q2_k, expand.expand_q2_k, NONE, expanded.scratch_bytes),
    "Q3_K": Reader(expanded.multiply_q3_k, expand.expand_q3_k, NONE, expanded.scratch_bytes),
    "Q4_K": Reader(q4_k.multiply_q4_k, expand.expand_q4_k, PER_256, scratch_bytes),
    "Q5_K": Reader(q4_k.multiply_q5_k, expand.expand_q5_k, PER_256, scratch_bytes),
    "Q6_K": Reader(q6_k.multiply_q6_k, expand.expand_q6_k, PER_256, scratch_bytes),
    "IQ4_XS": Reader(iq4_xs.multiply_iq4_xs, expand.expand_iq4_xs, PER_256, scratch_bytes),
}
