"""Hyper-parameters: every range and every rule between them, each with its message."""

import math
from pathlib import Path
from typing import Any

import pytest

from ondevice.config import Config
from ondevice.gguf_file import GGUFFile
from quant.errors import Error
from tests.ondevice.gguf_builder import (
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    Array,
    Builder,
    Shape,
    tiny_metadata,
)

TOKENS = "tokenizer.ggml.tokens"
FACTOR = "qwen3next.rope.scaling.factor"


def config_of(
    path: Path, shape: Shape | None = None, changes: dict[str, Any] | None = None
) -> Config:
    """The configuration of a file that holds metadata alone; a change to None removes the key."""
    builder = Builder()
    for key, value in {**tiny_metadata(shape or Shape()), **(changes or {})}.items():
        if value is not None:
            builder.key(key, value)
    with GGUFFile.open(builder.write(path / "m.gguf")) as file:
        return Config.from_gguf(file)


def changed(path: Path, key: str, value: Any) -> Config:
    return config_of(path, changes={f"qwen3next.{key}": value})


def test_reads_every_field(tmp_path: Path) -> None:
    shape = Shape(layers=8, heads=6, kv_heads=3, key_heads=3, value_heads=6, experts=512)
    config = config_of(tmp_path, shape)
    assert (config.architecture, config.name) == ("qwen3next", "tiny")
    assert (config.layers, config.mtp_layers) == (8, 1)
    assert (config.hidden, config.vocabulary, config.context_length) == (64, 261, 512)
    assert config.recurrent == (True, True, True, False) * 2
    assert (config.heads, config.kv_heads, config.head_dim) == (6, 3, 16)
    assert (config.rope_dimensions, config.rope_base) == (4, 1e6)
    assert math.isclose(config.norm_epsilon, 1e-6, rel_tol=1e-6)  # stored as float32
    assert (config.experts, config.experts_used) == (512, 3)
    assert (config.expert_width, config.shared_width) == (32, 48)
    assert (config.key_heads, config.value_heads, config.state_size) == (3, 6, 16)
    assert config.conv_kernel == 4
    assert (config.key_dim, config.value_dim, config.conv_channels) == (48, 96, 192)


BAD = [
    ("block_count", 0, "block_count is 0; needed 1 to 1,024"),
    ("block_count", 2**31, "block_count is 2,147,483,648; needed 1 to 1,024"),
    ("block_count", "four", "block_count is 'four'; needed 1 to 1,024"),
    ("block_count", True, "block_count is True; needed 1 to 1,024"),
    ("block_count", 4.0, r"block_count is 4\.0; needed 1 to 1,024"),
    ("block_count", -1, "block_count is -1; needed 1 to 1,024"),
    ("block_count", None, "qwen3next.block_count is missing; needed 1 to 1,024"),
    ("block_count", 1, "nextn_predict_layers is 1; needed fewer than the 1 blocks"),
    ("nextn_predict_layers", 2, "nextn_predict_layers is 2; needed 0 to 1"),
    ("embedding_length", 0, "embedding_length is 0"),
    ("embedding_length", None, "qwen3next.embedding_length is missing"),
    ("context_length", 0, "context_length is 0"),
    ("full_attention_interval", 0, "full_attention_interval is 0; needed 1 to 1,024"),
    ("full_attention_interval", 2**31, "full_attention_interval is 2,147,483,648"),
    ("attention.head_count", 0, "head_count is 0"),
    ("attention.head_count", None, "qwen3next.attention.head_count is missing"),
    ("attention.head_count_kv", 0, "head_count_kv is 0"),
    ("attention.head_count_kv", 3, "head_count_kv is 3; needed a divisor of 4 heads"),
    ("attention.key_length", 0, "key_length is 0"),
    ("attention.value_length", 8, "value_length is 8; needed attention.key_length, which is 16"),
    ("attention.layer_norm_rms_epsilon", 0.0, r"epsilon is 0\.0; needed a number above 0"),
    ("attention.layer_norm_rms_epsilon", -1e-6, "epsilon is -"),
    ("attention.layer_norm_rms_epsilon", math.nan, "epsilon is nan"),
    ("attention.layer_norm_rms_epsilon", math.inf, "epsilon is inf"),
    ("attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is missing"),
    ("rope.freq_base", 0.0, r"freq_base is 0\.0"),
    ("rope.freq_base", math.nan, "freq_base is nan"),
    ("rope.freq_base", None, "freq_base is missing"),
    ("rope.dimension_count", 3, "dimension_count is 3; needed an even number up to the head's 16"),
    ("rope.dimension_count", 18, "dimension_count is 18; needed an even number up to"),
    ("rope.dimension_count", None, "dimension_count is missing"),
    ("rope.scaling.type", "bogus", "type is 'bogus'; needed one of none, linear, yarn, longrope"),
    ("rope.scaling.type", "yarn", "type is 'yarn'; needed none: scaled positions are not supp"),
    ("rope.scaling.type", 7, "type is 7; needed one of"),
    ("rope.scaling.factor", 4.0, r"factor is 4\.0; needed 1"),
    ("expert_count", 0, "expert_count is 0"),
    ("expert_count", 100_000, "expert_count is 100,000; needed 1 to 8,192"),
    ("expert_used_count", 0, "expert_used_count is 0"),
    ("expert_used_count", 9, "expert_used_count is 9; needed at most expert_count, which is 8"),
    ("expert_feed_forward_length", 0, "expert_feed_forward_length is 0"),
    ("expert_feed_forward_length", Array(U32, [32, 16]), "needed the same width for every layer"),
    ("expert_feed_forward_length", Array(U32, []), "needed the same width for every layer"),
    ("expert_feed_forward_length", Array(F32, [32.0]), "needed the same width for every layer"),
    ("expert_shared_feed_forward_length", 0, "expert_shared_feed_forward_length is 0"),
    ("expert_gating_func", 2, r"expert_gating_func is 2; needed 1, softmax \(the file's is sigm"),
    ("expert_gating_func", 9, r"expert_gating_func is 9; .*\(the file's is unknown\)"),
    ("expert_weights_norm", False, "expert_weights_norm is False; needed true"),
    ("expert_weights_scale", 2.5, r"expert_weights_scale is 2\.5; needed 0 or 1"),
    ("expert_weights_scale", math.nan, "expert_weights_scale is nan"),
    ("ssm.conv_kernel", 0, "conv_kernel is 0"),
    ("ssm.state_size", 0, "state_size is 0"),
    ("ssm.state_size", 8, r"inner_size is 64; needed ssm\.time_step_rank times .* which is 32"),
    ("ssm.group_count", 0, "group_count is 0"),
    (
        "ssm.group_count",
        3,
        r"time_step_rank is 4; needed a multiple of ssm\.group_count, which is 3",
    ),
    ("ssm.time_step_rank", 0, "time_step_rank is 0"),
    ("ssm.inner_size", 100, "inner_size is 100; needed"),
    ("ssm.inner_size", None, "qwen3next.ssm.inner_size is missing"),
    ("vocab_size", 300, r"vocab_size is 300; needed the number of tokenizer\.ggml\.tokens, .* 261"),
    ("attention.recurrent_layers", Array(BOOL, [True, False]), "needed an array of 4 or 5 bools"),
    ("attention.recurrent_layers", Array(I32, [1, 1, 2, 0]), "needed an array of 4 or 5 bools"),
    ("attention.recurrent_layers", Array(BOOL, [True] * 5), "needed False for the multi-token"),
    ("attention.recurrent_layers", True, "needed an array of 4 or 5 bools"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=str)
def test_bad_value_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match=message) as caught:
        changed(tmp_path, key, value)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'm.gguf'}: qwen3next.")
    assert "\n" not in text
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "general.architecture is missing; supported: qwen3next"),
        ("llama", "architecture 'llama' is not supported; supported: qwen3next"),
        ("qwen35moe", "architecture 'qwen35moe' is not supported; supported: qwen3next"),
        (7, "architecture 7 is not supported"),
        ("a\nb" * 100, "architecture 'a"),
    ],
)
def test_architecture(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(Error, match=message) as caught:
        config_of(tmp_path, changes={"general.architecture": value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200 + len(str(tmp_path))


def test_interval_is_4_where_missing(tmp_path: Path) -> None:
    config = config_of(tmp_path, Shape(layers=9, interval=None))
    assert config.recurrent == (True, True, True, False) * 2 + (True,)


@pytest.mark.parametrize("interval", [1, 3, 1024])
def test_interval(interval: int, tmp_path: Path) -> None:
    config = config_of(tmp_path, Shape(layers=6, interval=interval))
    assert config.recurrent == tuple((layer + 1) % interval != 0 for layer in range(6))


@pytest.mark.parametrize("listed", [[False, True, False, True], [False, True, False, True, False]])
def test_listed_layers_take_precedence(listed: list[bool], tmp_path: Path) -> None:
    config = changed(tmp_path, "attention.recurrent_layers", Array(BOOL, listed))
    assert config.recurrent == (False, True, False, True)


def test_without_prediction_block(tmp_path: Path) -> None:
    config = config_of(tmp_path, Shape(mtp_layers=0))
    assert (config.layers, config.mtp_layers) == (4, 0)


def test_optional_keys(tmp_path: Path) -> None:
    assert changed(tmp_path, "expert_feed_forward_length", Array(U32, [24] * 5)).expert_width == 24
    assert changed(tmp_path, "expert_shared_feed_forward_length", None).shared_width == 32
    assert changed(tmp_path, "expert_feed_forward_length", None).expert_width == 48 // 3
    assert changed(tmp_path, "context_length", 2**32 - 1).context_length == 2**32 - 1
    assert changed(tmp_path, "rope.freq_base", 10_000_000).rope_base == 1e7
    assert changed(tmp_path, "vocab_size", 261).vocabulary == 261
    changed(tmp_path, "rope.scaling.type", "none")
    changed(tmp_path, "rope.scaling.factor", 1.0)
    changed(tmp_path, "expert_gating_func", 1)
    changed(tmp_path, "expert_weights_norm", True)
    changed(tmp_path, "expert_weights_scale", 0.0)
    changed(tmp_path, "expert_weights_scale", 1.0)


def test_linear_scaling_by_1(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"qwen3next.rope.scaling.type": "linear"}
    for factor in (None, 1.0):
        assert config_of(tmp_path, changes={**keys, FACTOR: factor}).rope_base == 1e6
    with pytest.raises(Error, match=r"rope\.scaling\.factor is 2\.0"):
        config_of(tmp_path, changes={**keys, FACTOR: 2.0})


def test_vocabulary(tmp_path: Path) -> None:
    assert config_of(tmp_path, changes={TOKENS: None, "qwen3next.vocab_size": 77}).vocabulary == 77
    with pytest.raises(Error, match=r"qwen3next\.vocab_size is missing"):
        config_of(tmp_path, changes={TOKENS: None})
    for tokens in (Array(STRING, []), Array(U32, [1, 2]), 5):
        with pytest.raises(Error, match=r"tokenizer\.ggml\.tokens is .*; needed a list of tokens"):
            config_of(tmp_path, changes={TOKENS: tokens})


def test_name_is_fit_to_print(tmp_path: Path) -> None:
    assert config_of(
        tmp_path, changes={"general.name": "a\x1b[2Jb\n" + "c" * 999}
    ).name.isprintable()
    assert config_of(tmp_path, changes={"general.name": 5}).name == ""
