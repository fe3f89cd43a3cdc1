"""Checkpoints that transformers itself saves, in both of its layouts for experts."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert import convert

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("original_format", [True, False])
def test_saved_by_transformers(pristine: Path, tmp_path: Path, original_format: bool) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=384,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=64,
    )
    model = transformers.Qwen3NextForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path / "saved"
    model.save_pretrained(folder, save_original_format=original_format)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pristine / name, folder)
    convert(folder, tmp_path / "out.gguf", "F32")
    found = {
        item.name: np.array(item.data) for item in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    layer = model.model.layers[0]
    experts = layer.mlp.experts
    for name, tensor in {
        "blk.0.ffn_gate_exps.weight": experts.gate_up_proj[:, :32],
        "blk.0.ffn_up_exps.weight": experts.gate_up_proj[:, 32:],
        "blk.0.ffn_down_exps.weight": experts.down_proj,
        "blk.0.attn_norm.weight": 1 + layer.input_layernorm.weight.float(),
        "blk.0.ssm_conv1d.weight": layer.linear_attn.conv1d.weight[:, 0],
        "blk.3.attn_q.weight": model.model.layers[3].self_attn.q_proj.weight,
        "output.weight": model.lm_head.weight,
    }.items():
        np.testing.assert_array_equal(found[name], tensor.detach().float().numpy(), err_msg=name)
