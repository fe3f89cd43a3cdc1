"""The keys of a converted file, read by the gguf library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from safetensors.numpy import load_file, save_file

from convert import convert, plan
from quant.errors import Error
from tests.convert.conftest import SHAPE, shards


def keys(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }


def test_all_keys(pristine: Path, tmp_path: Path) -> None:
    convert(pristine, tmp_path / "out.gguf", "Q4_K_M")
    found = keys(tmp_path / "out.gguf")
    needed = {
        "general.architecture": "qwen3next",
        "general.type": "model",
        "general.name": "tiny model",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.alignment": 32,
        "general.sampling.temp": pytest.approx(0.7),
        "general.sampling.top_k": 20,
        "general.sampling.top_p": pytest.approx(0.8),
        "qwen3next.block_count": 5,
        "qwen3next.nextn_predict_layers": 1,
        "qwen3next.context_length": SHAPE.context_length,
        "qwen3next.embedding_length": 64,
        "qwen3next.attention.head_count": 4,
        "qwen3next.attention.head_count_kv": 2,
        "qwen3next.attention.key_length": SHAPE.head_dim,
        "qwen3next.attention.value_length": SHAPE.head_dim,
        "qwen3next.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3next.attention.recurrent_layers": [True, True, True, False, False],
        "qwen3next.full_attention_interval": 4,
        "qwen3next.rope.freq_base": pytest.approx(1e7),
        "qwen3next.rope.dimension_count": SHAPE.head_dim // 4,
        "qwen3next.expert_count": 4,
        "qwen3next.expert_used_count": 2,
        "qwen3next.expert_feed_forward_length": SHAPE.expert_width,
        "qwen3next.expert_shared_feed_forward_length": SHAPE.shared_width,
        "qwen3next.ssm.conv_kernel": 4,
        "qwen3next.ssm.state_size": SHAPE.state_size,
        "qwen3next.ssm.group_count": SHAPE.key_heads,
        "qwen3next.ssm.time_step_rank": SHAPE.value_heads,
        "qwen3next.ssm.inner_size": SHAPE.value_heads * SHAPE.state_size,
        "qwen3next.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found.get(key) for key in needed} == needed
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == len(found["tokenizer.ggml.token_type"]) == 384
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert "<|im_start|>" in found["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("kind", "number"), [("F32", 0), ("F16", 1), ("BF16", 32), ("Q8_0", 7), ("Q6_K", 18)]
)
def test_file_type(pristine: Path, tmp_path: Path, kind: str, number: int) -> None:
    convert(pristine, tmp_path / "out.gguf", kind)
    assert keys(tmp_path / "out.gguf")["general.file_type"] == number


def test_mtp_in_the_config_but_not_in_the_shards(
    checkpoint: Path, tmp_path: Path, edit: Callable[..., None]
) -> None:
    for path in shards(checkpoint):
        kept = {k: v for k, v in load_file(path).items() if not k.startswith("mtp.")}
        save_file(kept, path)
    index = checkpoint / "model.safetensors.index.json"
    names = {name: path.name for path in shards(checkpoint) for name in load_file(path)}
    edit(index, weight_map=names)
    edit(checkpoint / "config.json", mtp_num_hidden_layers=1)
    report = convert(checkpoint, tmp_path / "out.gguf", "Q8_0")
    assert "converted without it" in report.notes[0]
    assert keys(tmp_path / "out.gguf")["qwen3next.block_count"] == 4


def test_greedy_generation_config(checkpoint: Path, edit: Callable[..., None]) -> None:
    path = checkpoint / "generation_config.json"
    edit(path, do_sample=False, temperature=None, repetition_penalty=1.05)
    metadata = plan(checkpoint).metadata
    assert metadata["general.sampling.temp"].data == bytes(4)
    assert "general.sampling.penalty_repeat" in metadata


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("top_p", 1.5), ("top_k", 2.5), ("min_p", True)]
)
def test_bad_sampling_default(
    checkpoint: Path, edit: Callable[..., None], key: str, value: object
) -> None:
    edit(checkpoint / "generation_config.json", **{key: value})
    with pytest.raises(Error, match=f"generation_config.json: {key} is"):
        plan(checkpoint)


def test_the_plan_prints_every_tensor(pristine: Path) -> None:
    planned = plan(pristine, "Q4_K_M")
    text = str(planned)
    assert all(item.name in text for item in planned.tensors)
    assert f"{planned.nbytes:,} bytes as Q4_K_M" in text
