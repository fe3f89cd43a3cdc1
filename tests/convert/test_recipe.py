"""Which format each tensor gets: the published counts of the 80B model, and the fall-backs."""

from collections import Counter

import pytest

from convert.hparams import HParams
from convert.names import outputs
from convert.recipe import FILE_TYPES, choose, file_type, is_quantized, more_bits
from quant.errors import UsageError

NEXT_80B = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "max_position_embeddings": 262144,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "vocab_size": 151936,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rms_norm_eps": 1e-6,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def tensors() -> list[tuple[str, tuple[int, ...]]]:
    hparams = HParams.from_config(NEXT_80B, "config.json")
    available = {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(48)}
    return [(item.name, item.shape) for item in outputs(hparams, available, None)]


def test_the_80b_model(tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """Counts of the published Q4_K_M files: 843 tensors, 409 Q4_K, 73 Q6_K, 361 F32."""
    formats = choose(FILE_TYPES["Q4_K_M"], tensors, 48, 512, 8)
    assert Counter(formats.values()) == {"Q4_K": 409, "Q6_K": 73, "F32": 361}
    assert formats["output.weight"] == "Q6_K"
    assert formats["token_embd.weight"] == "Q4_K"
    assert formats["blk.0.attn_qkv.weight"] == formats["blk.47.attn_v.weight"] == "Q6_K"
    assert formats["blk.6.ffn_down_exps.weight"] == "Q4_K"
    assert formats["blk.8.ffn_down_exps.weight"] == "Q6_K"


def test_experts_in_mxfp4(tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    formats = choose(FILE_TYPES["MXFP4_MOE"], tensors, 48, 512, 8)
    assert Counter(formats.values()) == {"MXFP4": 144, "Q8_0": 338, "F32": 361}
    for name, chosen in formats.items():
        assert (chosen == "MXFP4") == name.endswith("_exps.weight"), name


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS"])
def test_values_that_many_queries_share(
    kind: str, tensors: list[tuple[str, tuple[int, ...]]]
) -> None:
    shared = choose(FILE_TYPES[kind], tensors, 48, 512, 4)
    assert shared["blk.0.attn_qkv.weight"] == shared["blk.47.attn_v.weight"] == "Q5_K"
    assert shared["blk.5.ffn_down_exps.weight"] == "Q5_K"
    assert shared["blk.6.ffn_down_exps.weight"] == kind
    alone = choose(FILE_TYPES[kind], tensors, 48, 512, 3)
    assert alone["blk.0.attn_qkv.weight"] == alone["blk.47.attn_v.weight"] == kind


def test_half_the_blocks_get_more_bits() -> None:
    chosen = [index for index in range(48) if more_bits(index, 48)]
    assert len(chosen) == 24
    assert chosen[:8] == [0, 1, 2, 3, 4, 5, 8, 11]


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_small_tensors_stay_f32(kind: str, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    formats = choose(FILE_TYPES[kind], tensors, 48, 512, 8)
    for name, shape in tensors:
        small = len(shape) == 1 or name.endswith(("ffn_gate_inp.weight", "ssm_conv1d.weight"))
        assert (formats[name] == "F32") == (small or kind == "F32"), name


@pytest.mark.parametrize(
    ("kind", "columns", "needed"),
    [
        ("Q4_K_M", 512, "Q4_K"),
        ("Q4_K_M", 96, "Q5_0"),
        ("Q5_K_M", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q4_K_M", 48, "F16"),
        ("IQ4_XS", 512, "IQ4_XS"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("IQ4_XS", 48, "F16"),
        ("IQ4_NL", 96, "IQ4_NL"),
        ("MXFP4_MOE", 96, "Q8_0"),
        ("Q4_0", 96, "Q4_0"),
        ("Q4_0", 48, "F16"),
        ("Q8_0", 48, "F16"),
        ("BF16", 48, "BF16"),
    ],
)
def test_rows_that_do_not_fill_blocks(kind: str, columns: int, needed: str) -> None:
    name = "blk.9.attn_gate.weight"
    assert choose(FILE_TYPES[kind], [(name, (64, columns))], 48, 512, 8)[name] == needed


@pytest.mark.parametrize(
    ("kind", "columns", "needed"),
    [("Q4_K_M", 256, "Q6_K"), ("Q4_0", 256, "Q6_K"), ("Q8_0", 256, "Q8_0"), ("Q4_K_M", 96, "Q8_0"),
     ("Q4_0", 96, "Q8_0"), ("Q4_K_M", 48, "F16"), ("F16", 256, "F16"), ("IQ4_XS", 256, "Q6_K"),
     ("IQ4_NL", 96, "Q8_0"), ("IQ4_XS", 96, "Q8_0"), ("MXFP4_MOE", 256, "Q8_0")],
)  # fmt: skip
def test_a_tied_embedding_is_an_output_matrix(kind: str, columns: int, needed: str) -> None:
    name = "token_embd.weight"
    assert choose(FILE_TYPES[kind], [(name, (512, columns))], 4, 16, 2)[name] == needed


def test_one_row_is_not_a_matrix() -> None:
    assert not is_quantized("blk.0.ffn_up_shexp.weight", (1, 256))
    assert is_quantized("blk.0.ffn_up_exps.weight", (4, 1, 256))


def test_names() -> None:
    assert file_type("q4_k").name == "Q4_K_M"
    assert file_type("Q5_K").name == "Q5_K_M"
    assert file_type("mxfp4").name == "MXFP4_MOE"
    with pytest.raises(UsageError, match="'Q3_K_M' is unknown; choose one of F32, F16"):
        file_type("Q3_K_M")
