"""config.json: both generations of keys, and one line for everything wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert import plan
from convert.hparams import HParams
from quant.errors import Error
from tests.convert.conftest import SHAPE
from tools.random_checkpoint import config

BASE = config(SHAPE)


def parse(**changes: Any) -> HParams:
    values = {**BASE, **changes}
    return HParams.from_config(
        {key: value for key, value in values.items() if value is not ...}, "config.json"
    )


def test_values() -> None:
    hparams = parse()
    assert (hparams.layers, hparams.hidden, hparams.experts) == (4, 64, 4)
    assert hparams.recurrent == (True, True, True, False)
    assert hparams.full_attention_interval == 4
    assert hparams.rope_dimensions == 8
    assert hparams.rope_base == 1e7


def test_both_generations_of_keys() -> None:
    old = parse(
        rope_parameters=...,
        layer_types=...,
        rope_theta=1e7,
        partial_rotary_factor=0.25,
        full_attention_interval=4,
    )
    new = parse(
        rope_theta=...,
        partial_rotary_factor=...,
        full_attention_interval=...,
        rope_parameters={
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "rope_type": "default",
        },
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )
    assert old == new == parse()


def test_irregular_layers_have_no_interval() -> None:
    kinds = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    hparams = parse(layer_types=kinds, full_attention_interval=...)
    assert hparams.recurrent == (False, True, True, False)
    assert hparams.full_attention_interval is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; convert reads 'qwen3_next'"),
        ({"model_type": ...}, "model_type is None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already (fp8)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "64"}, "hidden_size is 64, a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_experts": ...}, "num_experts is missing"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, at most num_experts (4)"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, a multiple of"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads is 4, a multiple of"),
        ({"linear_value_head_dim": 64}, "linear_value_head_dim is 64, the same as"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, True is needed"),
        ({"attention_bias": True}, "attention_bias is True, False is needed"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, 1 is needed"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, silu is needed"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is [0], an empty list"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is of type 'yarn'"),
        ({"rope_parameters": 3}, "rope_parameters is 3, an object"),
        ({"rope_parameters": ..., "rope_theta": ...}, "rope_theta is missing"),
        ({"rope_parameters": ..., "rope_theta": -1.0}, "rope_theta is -1.0"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.1}},
            "partial_rotary_factor is 0.1, an even number",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types is of 1, one entry for each of 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "holding 'sliding_attention'"),
        ({"layer_types": ..., "full_attention_interval": ...}, "layer_types or full_attention"),
        ({"layer_types": ..., "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is no, true or false"),
    ],
)
def test_refusals(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(Error) as caught:
        parse(**changes)
    assert part in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(Error, match=r"hidden_size is -1.*head_dim is missing"):
        parse(hidden_size=-1, head_dim=...)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "invalid JSON at line 1 column 2"),
        ("[1]", "a JSON object is needed, found list"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": Infinity}', "Infinity is not JSON"),
    ],
)
def test_broken_config_file(checkpoint: Path, text: str, part: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(Error) as caught:
        plan(checkpoint)
    assert "config.json" in str(caught.value)
    assert part in str(caught.value)


def test_no_config_file(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(Error, match=r"no config\.json"):
        plan(checkpoint)


def test_code_in_the_checkpoint_is_never_run(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    values["auto_map"] = {"AutoModel": "evil.Model"}
    (checkpoint / "config.json").write_text(json.dumps(values))
    (checkpoint / "evil.py").write_text("raise SystemExit('ran')")
    plan(checkpoint)
