"""Hugging Face tensor names -> GGUF tensor names of the architecture qwen3next.

    token_embd.weight output_norm.weight [output.weight]
    blk.N.  attn_norm post_attention_norm
            DeltaNet   attn_qkv attn_gate ssm_ba ssm_conv1d ssm_dt.bias ssm_a ssm_norm ssm_out
            attention  attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm
            ffn_gate_inp ffn_{gate,up,down}_exps ffn_gate_inp_shexp ffn_{gate,up,down}_shexp
    blk.<layers>.  the MTP block: an attention layer, and
            nextn.{eh_proj,enorm,hnorm,shared_head_norm}

Experts come one tensor per expert and matrix (`experts.E.gate_proj.weight`, which transformers 5
saves too) or fused (`experts.gate_up_proj` (experts, 2*width, hidden), gate first, the way
transformers 5 holds them in memory). Every output names the rows it is made of; shapes are in NumPy
order (rows..., columns).
"""

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from convert.hparams import HParams
from convert.transforms import Rows, add_one, negative_exp, split_qkvz, unchanged

Shape = tuple[int, ...]
Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one source tensor; `shape` is what the source must have."""

    source: str
    shape: Shape
    rows: Rows


@dataclass(frozen=True, slots=True)
class Output:
    """One GGUF tensor and the source rows it is made of, in order."""

    name: str
    shape: Shape
    segments: tuple[Segment, ...]
    transform: Transform = field(default=unchanged)


def _whole(
    name: str,
    source: str,
    shape: Shape,
    transform: Transform = unchanged,
    source_shape: Shape | None = None,
) -> Output:
    source_shape = source_shape or shape
    segment = Segment(source, source_shape, Rows(0, prod(source_shape[:-1])))
    return Output(name, shape, (segment,), transform)


MTP_PREFIXES = ("mtp.", "model.mtp.")


def mtp_prefix(available: Iterable[str]) -> str | None:
    """The prefix of the MTP tensors, None when the checkpoint has none."""
    names = list(available)
    for prefix in MTP_PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return None


def outputs(hparams: HParams, available: Container[str], mtp: str | None) -> Iterator[Output]:
    """Every tensor of the GGUF file in its order; `mtp` is the MTP tensors' prefix or None."""
    hidden, embedding = hparams.hidden, (hparams.vocabulary, hparams.hidden)
    yield _whole("token_embd.weight", "model.embed_tokens.weight", embedding)
    for layer in range(hparams.layers):
        yield from _block(
            hparams, f"blk.{layer}.", f"model.layers.{layer}.", hparams.recurrent[layer], available
        )
    if mtp is not None:
        block = f"blk.{hparams.layers}."
        yield from _block(hparams, block, f"{mtp}layers.0.", False, available)
        yield _whole(block + "nextn.eh_proj.weight", mtp + "fc.weight", (hidden, 2 * hidden))
        for name, source in (
            ("enorm", "pre_fc_norm_embedding"),
            ("hnorm", "pre_fc_norm_hidden"),
            ("shared_head_norm", "norm"),
        ):
            yield _whole(f"{block}nextn.{name}.weight", f"{mtp}{source}.weight", (hidden,), add_one)
    yield _whole("output_norm.weight", "model.norm.weight", (hidden,), add_one)
    if not hparams.tied:
        yield _whole("output.weight", "lm_head.weight", embedding)


def _block(
    hparams: HParams, block: str, prefix: str, recurrent: bool, available: Container[str]
) -> Iterator[Output]:
    hidden = (hparams.hidden,)
    yield _whole(block + "attn_norm.weight", prefix + "input_layernorm.weight", hidden, add_one)
    if recurrent:
        yield from _deltanet(hparams, block, prefix + "linear_attn.")
    else:
        yield from _attention(hparams, block, prefix + "self_attn.")
    yield _whole(
        block + "post_attention_norm.weight",
        prefix + "post_attention_layernorm.weight",
        hidden,
        add_one,
    )
    yield from _experts(hparams, block, prefix + "mlp.", available)


def _attention(hparams: HParams, block: str, prefix: str) -> Iterator[Output]:
    hidden, head = hparams.hidden, hparams.head_dim
    query, key = hparams.heads * head, hparams.kv_heads * head
    yield _whole(block + "attn_q.weight", prefix + "q_proj.weight", (2 * query, hidden))
    yield _whole(block + "attn_k.weight", prefix + "k_proj.weight", (key, hidden))
    yield _whole(block + "attn_v.weight", prefix + "v_proj.weight", (key, hidden))
    yield _whole(block + "attn_q_norm.weight", prefix + "q_norm.weight", (head,), add_one)
    yield _whole(block + "attn_k_norm.weight", prefix + "k_norm.weight", (head,), add_one)
    yield _whole(block + "attn_output.weight", prefix + "o_proj.weight", (hidden, query))


def _deltanet(hparams: HParams, block: str, prefix: str) -> Iterator[Output]:
    hidden, heads, channels = hparams.hidden, (hparams.value_heads,), hparams.conv_channels
    source = prefix + "in_proj_qkvz.weight"
    source_shape = (2 * hparams.key_dim + 2 * hparams.value_dim, hidden)
    parts = split_qkvz(hparams.key_heads, hparams.value_heads, hparams.state_size)
    for name, rows, count in (
        ("attn_qkv", parts[0], channels),
        ("attn_gate", parts[1], hparams.value_dim),
    ):
        segments = tuple(Segment(source, source_shape, part) for part in rows)
        yield Output(f"{block}{name}.weight", (count, hidden), segments)
    width = hparams.conv_kernel
    yield _whole(
        block + "ssm_conv1d.weight",
        prefix + "conv1d.weight",
        (channels, width),
        source_shape=(channels, 1, width),
    )
    yield _whole(
        block + "ssm_ba.weight", prefix + "in_proj_ba.weight", (2 * hparams.value_heads, hidden)
    )
    yield _whole(block + "ssm_dt.bias", prefix + "dt_bias", heads)
    yield _whole(block + "ssm_a", prefix + "A_log", heads, negative_exp)
    yield _whole(block + "ssm_norm.weight", prefix + "norm.weight", (hparams.state_size,))
    yield _whole(block + "ssm_out.weight", prefix + "out_proj.weight", (hidden, hparams.value_dim))


def _experts(
    hparams: HParams, block: str, prefix: str, available: Container[str]
) -> Iterator[Output]:
    hidden, experts, width = hparams.hidden, hparams.experts, hparams.expert_width
    yield _whole(block + "ffn_gate_inp.weight", prefix + "gate.weight", (experts, hidden))
    fused = prefix + "experts.gate_up_proj" in available
    for matrix, rows, columns, first in (
        ("gate", width, hidden, 0),
        ("up", width, hidden, width),
        ("down", hidden, width, 0),
    ):
        segments: tuple[Segment, ...]
        if not fused:
            segments = tuple(
                Segment(
                    f"{prefix}experts.{expert}.{matrix}_proj.weight",
                    (rows, columns),
                    Rows(0, rows),
                )
                for expert in range(experts)
            )
        elif matrix == "down":
            shape = (experts, rows, columns)
            segments = (Segment(prefix + "experts.down_proj", shape, Rows(0, experts * rows)),)
        else:
            shape = (experts, 2 * width, hidden)
            segments = tuple(
                Segment(
                    prefix + "experts.gate_up_proj", shape, Rows(2 * width * expert + first, width)
                )
                for expert in range(experts)
            )
        yield Output(f"{block}ffn_{matrix}_exps.weight", (experts, rows, columns), segments)
    yield _whole(
        block + "ffn_gate_inp_shexp.weight",
        prefix + "shared_expert_gate.weight",
        (hidden,),
        source_shape=(1, hidden),
    )
    shared = hparams.shared_width
    for matrix, rows, columns in (
        ("gate", shared, hidden),
        ("up", shared, hidden),
        ("down", hidden, shared),
    ):
        yield _whole(
            f"{block}ffn_{matrix}_shexp.weight",
            f"{prefix}shared_expert.{matrix}_proj.weight",
            (rows, columns),
        )
