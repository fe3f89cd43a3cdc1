"""A `qwen3next` GGUF file as the oracle's weights: names and transforms of the format undone.

The file is read by the gguf library and its blocks expanded by that library's own dequantizer, so
a converted file is judged against its checkpoint, and a quantised one by what its bytes mean,
without a line of ours. Both DeltaNet layouts and both expert layouts are understood.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.oracle import Array


def read_gguf(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Weights and config of the file, under their Hugging Face names."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    arch = keys["general.architecture"]
    get = {name.removeprefix(f"{arch}."): value for name, value in keys.items()}
    mtp = int(get.get("nextn_predict_layers", 0))
    layers = int(get["block_count"]) - mtp
    config = {
        "num_hidden_layers": layers,
        "rms_norm_eps": get["attention.layer_norm_rms_epsilon"],
        "full_attention_interval": get.get("full_attention_interval", 4),
        "num_attention_heads": get["attention.head_count"],
        "num_key_value_heads": get["attention.head_count_kv"],
        "head_dim": get["attention.key_length"],
        "partial_rotary_factor": get["rope.dimension_count"] / get["attention.key_length"],
        "rope_theta": get["rope.freq_base"],
        "linear_num_key_heads": get["ssm.group_count"],
        "linear_num_value_heads": get["ssm.time_step_rank"],
        "linear_key_head_dim": get["ssm.state_size"],
        "linear_value_head_dim": get["ssm.inner_size"] // get["ssm.time_step_rank"],
        "num_experts": get["expert_count"],
        "num_experts_per_tok": get["expert_used_count"],
    }
    found = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        for t in reader.tensors
    }
    weights: dict[str, Array] = {"model.embed_tokens.weight": found.pop("token_embd.weight")}
    if "output.weight" in found:
        weights["lm_head.weight"] = found.pop("output.weight")
    weights["model.norm.weight"] = found.pop("output_norm.weight") - 1
    for name, value in found.items():
        _, number, rest = name.split(".", 2)
        prefix = f"model.layers.{number}." if int(number) < layers else "mtp.layers.0."
        weights[_hugging_face_name(prefix, rest)] = _undo(rest, value)
    for layer in range(layers):
        _join_delta_input(weights, f"model.layers.{layer}.linear_attn.", config)
    for prefix in [name[: -len("gate")] for name in weights if name.endswith(".experts.gate")]:
        parts = [weights.pop(prefix + "gate"), weights.pop(prefix + "up")]
        weights[prefix + "gate_up_proj"] = np.concatenate(parts, axis=1)
    return weights, config


_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "linear_attn.qkv",
    "attn_gate.weight": "linear_attn.z",
    "ssm_in.weight": "linear_attn.in_proj_qkvz.weight",
    "ssm_ba.weight": "linear_attn.in_proj_ba.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_exps.weight": "mlp.experts.gate",
    "ffn_up_exps.weight": "mlp.experts.up",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
_MTP_NAMES = {
    "nextn.eh_proj.weight": "mtp.fc.weight",
    "nextn.enorm.weight": "mtp.pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "mtp.pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "mtp.norm.weight",
}


def _hugging_face_name(prefix: str, rest: str) -> str:
    return _MTP_NAMES[rest] if rest in _MTP_NAMES else prefix + _NAMES[rest]


def _undo(rest: str, value: Array) -> Array:
    """The stored value turned back: norms lose their 1 (not the gated norm), ssm_a its -exp."""
    if rest == "ssm_a":
        return np.log(-value)
    if rest.endswith("norm.weight") and rest != "ssm_norm.weight":
        return value - 1
    return value


def _join_delta_input(weights: dict[str, Array], prefix: str, config: Mapping[str, Any]) -> None:
    """Rows q | k | v and z back to q, k, v, z per key head."""
    if prefix + "qkv" not in weights:
        return
    key_heads, d_key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    qkv, z = weights.pop(prefix + "qkv"), weights.pop(prefix + "z")
    keys, columns = key_heads * d_key, qkv.shape[1]
    parts = [qkv[:keys], qkv[keys : 2 * keys], qkv[2 * keys :], z]
    grouped = [part.reshape(key_heads, -1, columns) for part in parts]
    weights[prefix + "in_proj_qkvz.weight"] = np.concatenate(grouped, axis=1).reshape(-1, columns)
