"""GGUF bytes made by hand: no reader or writer of ours, none of the `gguf` package's.

`Builder` writes whatever it is told, lies included, for the hostile files. `tiny_model` writes a
small and valid Qwen3-Next model of any shape with random weights, for every test that needs one:

    tiny_model(path)                                  4 layers, attention in the last, one MTP block
    tiny_model(path, shape=Shape(experts=512, experts_used=10))
    tiny_model(path, legacy=True, fused=True, tied=True)      the other layouts
    tiny_model(path, metadata={"qwen3next.block_count": 0})   one key changed; None removes it
    tiny_model(path, tensors={"output_norm.weight": None})    one tensor removed, or another array

The weights are residual-dominated (unit embeddings, matrices of 0.8 / sqrt(fan-in), router logits
of spread 2), so that rounding alone does not change which experts are chosen.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBER_LAYOUTS = dict(
    zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True)
)
TENSOR_F32, TENSOR_F16 = 0, 1

Encoded = tuple[int, bytes]
Encode = Callable[[str, np.ndarray], Encoded]


def number(kind: int, value: Any) -> bytes:
    return struct.pack("<" + NUMBER_LAYOUTS[kind], value)


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return number(U64, len(raw)) + raw


@dataclass
class Array:
    """An array value: elements of one type."""

    kind: int
    values: list[Any]


def typed(value: Any) -> tuple[int, bytes]:
    """Value type and bytes of a metadata value; ints are u32, or i32 below 0, or u64 above."""
    if isinstance(value, Array):
        encode = string if value.kind == STRING else lambda item: number(value.kind, item)
        head = number(U32, value.kind) + number(U64, len(value.values))
        return ARRAY, head + b"".join(encode(item) for item in value.values)
    if isinstance(value, bool):
        return BOOL, number(BOOL, value)
    if isinstance(value, int):
        kind = I32 if value < 0 else U32 if value < 2**32 else U64
        return kind, number(kind, value)
    if isinstance(value, float):
        return F32, number(F32, value)
    assert isinstance(value, str | bytes), value
    return STRING, string(value)


@dataclass
class Builder:
    """A file under construction. Every count and offset can be overridden by a lie."""

    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    key_count: int | None = None
    tensor_count: int | None = None
    keys: list[bytes] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    data: bytes = b""

    def key(self, name: str | bytes, value: Any) -> "Builder":
        kind, raw = typed(value)
        return self.raw_key(name, kind, raw)

    def raw_key(self, name: str | bytes, kind: int, raw: bytes) -> "Builder":
        self.keys.append(string(name) + number(U32, kind) + raw)
        return self

    def tensor(
        self,
        name: str | bytes,
        sizes: list[int],
        kind: int = TENSOR_F32,
        data: bytes = b"",
        offset: int | None = None,
        dimensions: int | None = None,
    ) -> "Builder":
        """`sizes` fastest first, as they stand in the file; `data` goes behind what is there."""
        if offset is None:
            offset = len(self.data)
        self.entries.append(
            string(name)
            + number(U32, len(sizes) if dimensions is None else dimensions)
            + b"".join(number(U64, size) for size in sizes)
            + number(U32, kind)
            + number(U64, offset)
        )
        self.data += data + bytes(-len(data) % self.alignment)
        return self

    def array(self, name: str, values: np.ndarray) -> "Builder":
        """An F32 tensor."""
        raw = values.astype("<f4").tobytes()
        return self.tensor(name, list(reversed(values.shape)), TENSOR_F32, raw)

    def build(self) -> bytes:
        keys = len(self.keys) if self.key_count is None else self.key_count
        tensors = len(self.entries) if self.tensor_count is None else self.tensor_count
        front = self.magic + struct.pack("<IQQ", self.version, tensors, keys)
        front += b"".join(self.keys) + b"".join(self.entries)
        return front + bytes(-len(front) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


@dataclass(frozen=True)
class Shape:
    """The numbers of a tiny model."""

    hidden: int = 64
    layers: int = 4
    mtp_layers: int = 1
    interval: int | None = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rope_dimensions: int = 4
    rope_base: float = 1e6
    epsilon: float = 1e-6
    experts: int = 8
    experts_used: int = 3
    expert_width: int = 32
    shared_width: int = 48
    key_heads: int = 2
    value_heads: int = 4
    state_size: int = 16
    conv_kernel: int = 4
    context_length: int = 512

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.state_size

    def recurrent(self, layer: int) -> bool:
        return layer < self.layers and (layer + 1) % (self.interval or 4) != 0


def byte_tokens() -> list[str]:
    """The 256 byte symbols of byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [symbols.get(byte, chr(byte)) for byte in range(256)]


MERGED_TOKENS = ["th", "the"]
MERGES = ["t h", "th e"]
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(MERGED_TOKENS) + len(CONTROL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_metadata(shape: Shape) -> dict[str, Any]:
    tokens = byte_tokens() + MERGED_TOKENS + CONTROL_TOKENS
    types = [1] * (256 + len(MERGED_TOKENS)) + [3] * len(CONTROL_TOKENS)
    keys: dict[str, Any] = {
        "general.architecture": "qwen3next",
        "general.name": "tiny",
        "qwen3next.block_count": shape.layers + shape.mtp_layers,
        "qwen3next.context_length": shape.context_length,
        "qwen3next.embedding_length": shape.hidden,
        "qwen3next.feed_forward_length": shape.shared_width,
        "qwen3next.attention.head_count": shape.heads,
        "qwen3next.attention.head_count_kv": shape.kv_heads,
        "qwen3next.attention.key_length": shape.head_dim,
        "qwen3next.attention.value_length": shape.head_dim,
        "qwen3next.attention.layer_norm_rms_epsilon": shape.epsilon,
        "qwen3next.rope.freq_base": shape.rope_base,
        "qwen3next.rope.dimension_count": shape.rope_dimensions,
        "qwen3next.expert_count": shape.experts,
        "qwen3next.expert_used_count": shape.experts_used,
        "qwen3next.expert_feed_forward_length": shape.expert_width,
        "qwen3next.expert_shared_feed_forward_length": shape.shared_width,
        "qwen3next.ssm.conv_kernel": shape.conv_kernel,
        "qwen3next.ssm.state_size": shape.state_size,
        "qwen3next.ssm.group_count": shape.key_heads,
        "qwen3next.ssm.time_step_rank": shape.value_heads,
        "qwen3next.ssm.inner_size": shape.value_heads * shape.state_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": Array(STRING, tokens),
        "tokenizer.ggml.token_type": Array(I32, types),
        "tokenizer.ggml.merges": Array(STRING, MERGES),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if shape.interval is not None:
        keys["qwen3next.full_attention_interval"] = shape.interval
    if shape.mtp_layers:
        keys["qwen3next.nextn_predict_layers"] = shape.mtp_layers
    return keys


def tiny_weights(
    shape: Shape, *, seed: int = 0, legacy: bool = False, fused: bool = False, tied: bool = False
) -> dict[str, np.ndarray]:
    """float32 tensors by GGUF name; the same seed gives the same model in every layout."""
    return dict(_weights(shape, np.random.default_rng(seed), legacy, fused, tied))


def _weights(
    shape: Shape, random: np.random.Generator, legacy: bool, fused: bool, tied: bool
) -> Iterator[tuple[str, np.ndarray]]:
    hidden, state = shape.hidden, shape.state_size

    def matrix(*sizes: int, scale: float = 0.8) -> np.ndarray:
        return random.standard_normal(sizes, np.float32) * np.float32(scale / sizes[-1] ** 0.5)

    def norm(length: int) -> np.ndarray:
        return 1 + random.standard_normal(length, np.float32) * np.float32(0.1)

    yield "token_embd.weight", random.standard_normal((VOCABULARY, hidden), np.float32)
    output = matrix(VOCABULARY, hidden, scale=2)
    if not tied:
        yield "output.weight", output
    yield "output_norm.weight", norm(hidden)
    for layer in range(shape.layers + shape.mtp_layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", norm(hidden)
        yield f"{block}.post_attention_norm.weight", norm(hidden)
        if shape.recurrent(layer):
            values = shape.value_heads // shape.key_heads
            by_head = [
                matrix(shape.key_heads, rows * state, hidden) for rows in (1, 1, values, values)
            ]
            if legacy:
                joined = np.concatenate(by_head, axis=1)
                yield f"{block}.ssm_in.weight", joined.reshape(-1, hidden)
            else:
                q, k, v, z = (part.reshape(-1, hidden) for part in by_head)
                yield f"{block}.attn_qkv.weight", np.concatenate([q, k, v])
                yield f"{block}.attn_gate.weight", z
            yield f"{block}.ssm_ba.weight", matrix(2 * shape.value_heads, hidden)
            yield f"{block}.ssm_conv1d.weight", matrix(shape.channels, shape.conv_kernel)
            yield f"{block}.ssm_dt.bias", random.uniform(-4, 1, shape.value_heads)
            yield f"{block}.ssm_a", -random.uniform(0.5, 8, shape.value_heads)
            yield f"{block}.ssm_norm.weight", norm(state)
            yield f"{block}.ssm_out.weight", matrix(hidden, shape.value_heads * state)
        else:
            width = shape.heads * shape.head_dim
            yield f"{block}.attn_q.weight", matrix(2 * width, hidden)
            yield f"{block}.attn_k.weight", matrix(shape.kv_heads * shape.head_dim, hidden)
            yield f"{block}.attn_v.weight", matrix(shape.kv_heads * shape.head_dim, hidden)
            yield f"{block}.attn_q_norm.weight", norm(shape.head_dim)
            yield f"{block}.attn_k_norm.weight", norm(shape.head_dim)
            yield f"{block}.attn_output.weight", matrix(hidden, width)
        yield f"{block}.ffn_gate_inp.weight", matrix(shape.experts, hidden, scale=2)
        gate, up = (matrix(shape.experts, shape.expert_width, hidden) for _ in range(2))
        if fused:
            yield f"{block}.ffn_gate_up_exps.weight", np.concatenate([gate, up], axis=1)
        else:
            yield f"{block}.ffn_gate_exps.weight", gate
            yield f"{block}.ffn_up_exps.weight", up
        yield f"{block}.ffn_down_exps.weight", matrix(shape.experts, hidden, shape.expert_width)
        yield f"{block}.ffn_gate_inp_shexp.weight", matrix(1, hidden, scale=1)[0]
        yield f"{block}.ffn_gate_shexp.weight", matrix(shape.shared_width, hidden)
        yield f"{block}.ffn_up_shexp.weight", matrix(shape.shared_width, hidden)
        yield f"{block}.ffn_down_shexp.weight", matrix(hidden, shape.shared_width)
        if layer >= shape.layers:
            yield f"{block}.nextn.eh_proj.weight", matrix(hidden, 2 * hidden)
            for name in ("enorm", "hnorm", "shared_head_norm"):
                yield f"{block}.nextn.{name}.weight", norm(hidden)


def encode_f32(name: str, values: np.ndarray) -> Encoded:
    return TENSOR_F32, values.astype("<f4").tobytes()


def encode_f16(name: str, values: np.ndarray) -> Encoded:
    """F16 for what a converter would quantize, F32 for norms, router and the like."""
    kept = values.ndim == 1 or any(part in name for part in ("conv1d", "ffn_gate_inp"))
    return encode_f32(name, values) if kept else (TENSOR_F16, values.astype("<f2").tobytes())


def tiny_builder(
    *,
    shape: Shape | None = None,
    seed: int = 0,
    legacy: bool = False,
    fused: bool = False,
    tied: bool = False,
    encode: Encode = encode_f32,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> Builder:
    """A valid model, except for what `metadata` and `tensors` add, change or (None) remove."""
    shape = shape or Shape()
    keys = {**tiny_metadata(shape), **(metadata or {})}
    weights: dict[str, np.ndarray | None] = {
        **tiny_weights(shape, seed=seed, legacy=legacy, fused=fused, tied=tied),
        **(tensors or {}),
    }
    builder = Builder()
    for key, value in keys.items():
        if value is not None:
            builder.key(key, value)
    for name, values in weights.items():
        if values is not None:
            kind, raw = encode(name, values)
            builder.tensor(name, list(reversed(values.shape)), kind, raw)
    return builder


def tiny_model(path: Path, **options: Any) -> Path:
    """Write `tiny_builder(**options)` to `path`."""
    return tiny_builder(**options).write(path)
