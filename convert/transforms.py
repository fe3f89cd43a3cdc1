"""What changes between a Hugging Face tensor and the GGUF tensor of the same weights.

Every output tensor is a run of rows taken from source tensors, so a stack of experts or a huge
embedding can be streamed in pieces:

    split_qkvz      in_proj_qkvz holds, per key head, [q d | k d | v r*d | z r*d] rows, with r value
                    heads per key head; GGUF wants q of all heads, then k, then v (attn_qkv), and z
                    (attn_gate). v and z stay grouped by key head.
    conv1d          (channels, 1, width) -> (channels, width): the same rows, nothing moves
    add_one         zero-centred RMSNorm weights are stored as w, used as 1 + w; GGUF holds 1 + w
    negative_exp    ssm_a = -exp(A_log)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows from `first` of one tensor, all its axes but the last taken as rows."""

    first: int
    count: int


def split_qkvz(key_heads: int, value_heads: int, state: int) -> tuple[list[Rows], list[Rows]]:
    """Which rows of in_proj_qkvz make attn_qkv and which make attn_gate, in order."""
    value = value_heads // key_heads * state
    stride = 2 * state + 2 * value

    def part(offset: int, count: int) -> list[Rows]:
        return [Rows(head * stride + offset, count) for head in range(key_heads)]

    qkv = part(0, state) + part(state, state) + part(2 * state, value)
    return qkv, part(2 * state + value, value)


def unchanged(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weights as they are."""
    return values


def add_one(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 + w, for zero-centred norm weights."""
    return values + np.float32(1)


def negative_exp(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """-exp(A_log)."""
    return -np.exp(values)
