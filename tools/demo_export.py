"""Write the demo model in the published layout: config, tokenizer files, BF16 shards.

Tensor names follow Qwen3-Next's published checkpoints: every routed expert is three tensors
(`mlp.experts.E.gate_proj/up_proj/down_proj.weight`), the prediction head lives under `mtp.`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_data import CONTROL_TOKENS, END_OF_TEXT, MARKUP_TOKENS, TURN_END
from tools.demo_layers import Dimensions
from tools.demo_model import DemoModel

SHARDS = 2
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def published_tensors(model: DemoModel) -> dict[str, Tensor]:
    """BF16 tensors by published name, routed experts split."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().to(torch.bfloat16)
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for expert, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                tensors[f"{base}{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{base}{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            for expert, matrix in enumerate(value):
                tensors[f"{base}{expert}.down_proj.weight"] = matrix.clone()
        else:
            tensors[name] = value.contiguous().clone()
    return tensors


def load_published(model: DemoModel, tensors: dict[str, Tensor]) -> None:
    """Inverse of `published_tensors`."""
    state = {}
    for name in model.state_dict():
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat(
                        [
                            tensors[f"{base}{expert}.gate_proj.weight"],
                            tensors[f"{base}{expert}.up_proj.weight"],
                        ]
                    )
                    for expert in range(model.d.experts)
                ]
            )
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            state[name] = torch.stack(
                [tensors[f"{base}{expert}.down_proj.weight"] for expert in range(model.d.experts)]
            )
        else:
            state[name] = tensors[name]
    model.load_state_dict({name: value.float() for name, value in state.items()})


def configuration(d: Dimensions, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json in the words of the published Qwen3-Next configuration."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "decoder_sparse_step": 1,
        "eos_token_id": tokenizer.token_to_id(TURN_END),
        "full_attention_interval": d.interval,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * d.hidden,
        "linear_conv_kernel_dim": d.conv_kernel,
        "linear_key_head_dim": d.state,
        "linear_num_key_heads": d.key_heads,
        "linear_num_value_heads": d.value_heads,
        "linear_value_head_dim": d.state,
        "max_position_embeddings": d.positions,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": d.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": d.heads,
        "num_experts": d.experts,
        "num_experts_per_tok": d.experts_used,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "output_router_logits": False,
        "partial_rotary_factor": d.rotary / d.head_dim,
        "rms_norm_eps": d.epsilon,
        "rope_scaling": None,
        "rope_theta": int(d.rope_base),
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": d.shared_width,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": d.vocabulary,
    }


def tokenizer_configuration(d: Dimensions, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json as Qwen's tokenizers have it, with a plain ChatML template."""
    added = {}
    for token in (*CONTROL_TOKENS, *MARKUP_TOKENS):
        added[str(tokenizer.token_to_id(token))] = {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in CONTROL_TOKENS,
        }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": d.positions,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def generation_configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json with the published sampling settings."""
    end, turn_end = (tokenizer.token_to_id(token) for token in (END_OF_TEXT, TURN_END))
    return {
        "bos_token_id": end,
        "do_sample": True,
        "eos_token_id": [turn_end, end],
        "pad_token_id": end,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }


def export(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write every file of the checkpoint; each replaces its predecessor whole."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(model)
    total = sum(value.nbytes for value in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    written = 0
    for name, value in tensors.items():
        shards[min(written * SHARDS // total, SHARDS - 1)][name] = value
        written += value.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05d}-of-{SHARDS:05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file_name))
        partial = folder / f".{file_name}.partial"
        save_file(shard, partial, metadata={"format": "pt"})
        partial.chmod(0o644)
        partial.replace(folder / file_name)
    documents = {
        "model.safetensors.index.json": {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        },
        "config.json": configuration(model.d, tokenizer),
        "generation_config.json": generation_configuration(tokenizer),
        "tokenizer_config.json": tokenizer_configuration(model.d, tokenizer),
    }
    for file_name, document in documents.items():
        partial = folder / f".{file_name}.partial"
        partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(folder / file_name)
    partial = folder / ".tokenizer.json.partial"
    tokenizer.save(str(partial))
    partial.replace(folder / "tokenizer.json")
