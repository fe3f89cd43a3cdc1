"""Write a random Qwen3-Next checkpoint of any shape, in Hugging Face layout.

The folder holds what a published checkpoint holds: `config.json`, BF16 safetensors shards with
their index, a byte-level BPE `tokenizer.json` with Qwen's pre-tokenizer and special tokens,
`tokenizer_config.json` with a ChatML template, `generation_config.json`. The same shape and seed
give the same bits on every machine: weights are sums of four random bytes (nearly Gaussian, exact
in integers) of one PCG64 stream per tensor, whose output NumPy guarantees.

Scales keep the model dominated by its residual stream, or rounding alone would flip the router
and every comparison would drown: embeddings of unit variance, matrices of 0.8 / sqrt(fan-in), half
that where they write to the stream, router logits of spread 2. Decay rates follow the Gated
DeltaNet initialiser (A uniform in 0..16, time step log-uniform in 0.001..0.1), so that some heads
remember for thousands of tokens.

    python -m tools.random_checkpoint FOLDER --hidden 256 --layers 4 --experts 512
"""

import argparse
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tools.small_tokenizer import SPECIAL_TOKENS, special_ids, tokenizer, tokenizer_config

BYTES_SUMMED = 4
BYTES_MEAN = BYTES_SUMMED * 127.5
BYTES_DEVIATION = math.sqrt(BYTES_SUMMED * (256**2 - 1) / 12)

MATRIX_GAIN = 0.8
OUTPUT_GAIN = 0.4
ROUTER_SPREAD = 2.0
NORM_SPREAD = 0.1


@dataclass(frozen=True)
class Shape:
    """The dimensions of a checkpoint, by this project's names; the defaults are small."""

    hidden: int = 128
    layers: int = 4
    interval: int = 4  # every interval-th layer is gated attention
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    partial_rotary: float = 0.25
    rope_base: float = 1e7
    key_heads: int = 2
    value_heads: int = 4
    state_size: int = 32
    conv_kernel: int = 4
    experts: int = 16
    experts_used: int = 4
    expert_width: int = 32
    shared_width: int = 64
    vocabulary: int = 384
    context_length: int = 8192
    norm_epsilon: float = 1e-6
    mtp: bool = True
    tied: bool = False
    fused_experts: bool = False  # one stack per layer, as transformers 5 keeps them
    shards: int = 2


# The shapes that stored reference outputs exist for; each stresses one thing.
SHAPES = {
    "experts_512": Shape(
        hidden=64,
        heads=2,
        kv_heads=1,
        value_heads=2,
        key_heads=1,
        experts=512,
        experts_used=10,
        vocabulary=320,
        mtp=False,
        shards=3,
    ),
    "odd_heads": Shape(
        hidden=192,
        heads=6,
        kv_heads=3,
        head_dim=48,
        key_heads=3,
        value_heads=9,
        experts=24,
        experts_used=5,
        rope_base=5e6,
    ),
    "deep": Shape(layers=8, value_heads=8, experts=32, experts_used=8, fused_experts=True),
    "odd_sizes": Shape(
        hidden=160,
        heads=5,
        kv_heads=1,
        key_heads=3,
        value_heads=3,
        expert_width=96,
        shared_width=32,
        experts=20,
        experts_used=3,
        vocabulary=512,
        partial_rotary=0.5,
        interval=2,
    ),
    "whole_superblocks": Shape(
        hidden=256,
        heads=4,
        kv_heads=4,
        head_dim=64,
        key_heads=2,
        value_heads=4,
        state_size=64,
        experts=16,
        experts_used=4,
        expert_width=256,
        shared_width=256,
        vocabulary=512,
    ),
}


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the checkpoint into `folder` (made if missing) and return it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, shape, seed)
    files = {
        "config.json": config(shape),
        "tokenizer.json": tokenizer(shape.vocabulary),
        "tokenizer_config.json": tokenizer_config(shape.vocabulary, shape.context_length),
        "generation_config.json": generation_config(shape),
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def fingerprint(folder: Path) -> str:
    """SHA-256 of every tensor's name, dtype, shape and bytes, whatever the sharding."""
    values: dict[str, np.ndarray] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        values |= load_file(path)
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {values[name].shape}".encode())
        digest.update(values[name].tobytes())
    return digest.hexdigest()


def tensors(shape: Shape, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its Hugging Face name, in the file's order, as BF16."""

    def random(name: str, *dimensions: int, deviation: float, mean: float = 0.0) -> np.ndarray:
        return (mean + deviation * _gaussian(seed, name, dimensions)).astype(ml_dtypes.bfloat16)

    def matrix(
        name: str, rows: int, columns: int, gain: float = MATRIX_GAIN
    ) -> tuple[str, np.ndarray]:
        return name, random(name, rows, columns, deviation=gain / math.sqrt(columns))

    def norm(name: str, length: int, mean: float = 0.0) -> tuple[str, np.ndarray]:
        return name, random(name, length, deviation=NORM_SPREAD, mean=mean)

    def delta_net(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        keys, values = shape.key_heads * shape.state_size, shape.value_heads * shape.state_size
        yield matrix(prefix + "in_proj_qkvz.weight", 2 * keys + 2 * values, shape.hidden)
        yield matrix(prefix + "in_proj_ba.weight", 2 * shape.value_heads, shape.hidden)
        name = prefix + "conv1d.weight"
        deviation = MATRIX_GAIN / math.sqrt(shape.conv_kernel)
        channels = 2 * keys + values
        yield name, random(name, channels, 1, shape.conv_kernel, deviation=deviation)
        rate = 16.0 * _uniform(seed, prefix + "A_log", shape.value_heads)
        yield prefix + "A_log", np.log(rate).astype(ml_dtypes.bfloat16)
        position = _uniform(seed, prefix + "dt_bias", shape.value_heads)
        step = 0.001 * 100.0**position
        yield prefix + "dt_bias", np.log(np.expm1(step)).astype(ml_dtypes.bfloat16)
        yield norm(prefix + "norm.weight", shape.state_size, mean=1.0)
        yield matrix(prefix + "out_proj.weight", shape.hidden, values, OUTPUT_GAIN)

    def attention(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        yield matrix(prefix + "q_proj.weight", 2 * shape.heads * shape.head_dim, shape.hidden)
        yield matrix(prefix + "k_proj.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        yield matrix(prefix + "v_proj.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        yield matrix(
            prefix + "o_proj.weight", shape.hidden, shape.heads * shape.head_dim, OUTPUT_GAIN
        )
        yield norm(prefix + "q_norm.weight", shape.head_dim)
        yield norm(prefix + "k_norm.weight", shape.head_dim)

    def gated_network(prefix: str, width: int) -> Iterator[tuple[str, np.ndarray]]:
        yield matrix(prefix + "gate_proj.weight", width, shape.hidden)
        yield matrix(prefix + "up_proj.weight", width, shape.hidden)
        yield matrix(prefix + "down_proj.weight", shape.hidden, width, OUTPUT_GAIN)

    def mixture(prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        name = prefix + "gate.weight"
        deviation = ROUTER_SPREAD / math.sqrt(shape.hidden)
        yield name, random(name, shape.experts, shape.hidden, deviation=deviation)
        each = [
            gated_network(f"{prefix}experts.{expert}.", shape.expert_width)
            for expert in range(shape.experts)
        ]
        if shape.fused_experts:
            stacks = [[value for _, value in network] for network in each]
            fused = [np.concatenate([gate, up]) for gate, up, _ in stacks]
            yield prefix + "experts.gate_up_proj", np.stack(fused)
            yield prefix + "experts.down_proj", np.stack([down for _, _, down in stacks])
        else:
            for network in each:
                yield from network
        yield from gated_network(prefix + "shared_expert.", shape.shared_width)
        yield matrix(prefix + "shared_expert_gate.weight", 1, shape.hidden)

    def layer(prefix: str, recurrent: bool) -> Iterator[tuple[str, np.ndarray]]:
        yield norm(prefix + "input_layernorm.weight", shape.hidden)
        yield from (
            delta_net(prefix + "linear_attn.") if recurrent else attention(prefix + "self_attn.")
        )
        yield norm(prefix + "post_attention_layernorm.weight", shape.hidden)
        yield from mixture(prefix + "mlp.")

    name = "model.embed_tokens.weight"
    yield name, random(name, shape.vocabulary, shape.hidden, deviation=1.0)
    for number in range(shape.layers):
        yield from layer(f"model.layers.{number}.", (number + 1) % shape.interval != 0)
    yield norm("model.norm.weight", shape.hidden)
    if not shape.tied:
        yield matrix("lm_head.weight", shape.vocabulary, shape.hidden)
    if shape.mtp:
        yield norm("mtp.pre_fc_norm_embedding.weight", shape.hidden)
        yield norm("mtp.pre_fc_norm_hidden.weight", shape.hidden)
        yield matrix("mtp.fc.weight", shape.hidden, 2 * shape.hidden)
        yield from layer("mtp.layers.0.", recurrent=False)
        yield norm("mtp.norm.weight", shape.hidden)


def _stream(seed: int, name: str) -> np.random.PCG64:
    return np.random.PCG64([seed, zlib.crc32(name.encode())])


def _gaussian(seed: int, name: str, dimensions: tuple[int, ...]) -> np.ndarray:
    """Nearly Gaussian numbers of unit variance, bounded by 3.5, the same bits everywhere."""
    count = math.prod(dimensions)
    words = _stream(seed, name).random_raw(-(-count * BYTES_SUMMED // 8)).astype("<u8")
    summed = words.view(np.uint8)[: count * BYTES_SUMMED].reshape(count, BYTES_SUMMED)
    total = summed.sum(axis=1, dtype=np.int32).reshape(dimensions)
    unit: np.ndarray = ((total - BYTES_MEAN) / BYTES_DEVIATION).astype(np.float32)
    return unit


def _uniform(seed: int, name: str, count: int) -> np.ndarray:
    """Numbers strictly inside 0..1, (count,) float64."""
    words = np.asarray(_stream(seed, name).random_raw(count), np.uint64)
    return ((words >> np.uint64(12)) + 0.5) / 2.0**52


def _write_shards(folder: Path, shape: Shape, seed: int) -> None:
    items = list(tensors(shape, seed))
    total = sum(value.nbytes for _, value in items)
    shards: list[dict[str, np.ndarray]] = [{} for _ in range(shape.shards)]
    written = 0
    for name, value in items:
        shards[min(written * shape.shards // total, shape.shards - 1)][name] = value
        written += value.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{shape.shards:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


# --- the files beside the weights -----------------------------------------------------------------


def config(shape: Shape) -> dict[str, Any]:
    """`config.json`, with the published checkpoint's keys."""
    special = dict(zip(SPECIAL_TOKENS, special_ids(shape.vocabulary), strict=True))
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": special["<|endoftext|>"],
        "decoder_sparse_step": 1,
        "eos_token_id": special["<|im_end|>"],
        "full_attention_interval": shape.interval,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.expert_width * shape.experts_used,
        "linear_conv_kernel_dim": shape.conv_kernel,
        "linear_key_head_dim": shape.state_size,
        "linear_num_key_heads": shape.key_heads,
        "linear_num_value_heads": shape.value_heads,
        "linear_value_head_dim": shape.state_size,
        "max_position_embeddings": shape.context_length,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_used,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "output_router_logits": False,
        "partial_rotary_factor": shape.partial_rotary,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_scaling": None,
        "rope_theta": shape.rope_base,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": shape.shared_width,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }


def generation_config(shape: Shape) -> dict[str, Any]:
    """`generation_config.json` with the published sampling defaults."""
    end_of_text, _, end_of_turn = special_ids(shape.vocabulary)
    return {
        "bos_token_id": end_of_text,
        "do_sample": True,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }


def main() -> None:
    """Command line: one option per field of Shape."""
    parser = argparse.ArgumentParser(description="Write a random Qwen3-Next checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--named", choices=SHAPES, help="one of the stored shapes, as it is")
    for entry in dataclasses.fields(Shape):
        flag = "--" + entry.name.replace("_", "-")
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=entry.default)
        else:
            parser.add_argument(flag, type=type(entry.default), default=entry.default)
    options = vars(parser.parse_args())
    folder, seed, named = (options.pop(key) for key in ("folder", "seed", "named"))
    write_checkpoint(folder, SHAPES[named] if named else Shape(**options), seed)


if __name__ == "__main__":
    main()
