"""The keys of the GGUF file: `general.*` and `qwen3next.*` as llama.cpp's converter writes them.

`block_count` includes the MTP block; `feed_forward_length` describes no tensor of this model but
llama.cpp reads it. Sampling defaults of generation_config.json become `general.sampling.*`.
"""

import math
from pathlib import Path
from typing import Any

from convert import header
from convert.header import Value
from convert.hparams import HParams
from convert.recipe import FileType
from quant.errors import Error

ARCHITECTURE = "qwen3next"
QUANTIZATION_VERSION = 2

_SAMPLING: dict[str, tuple[str, bool, float, float]] = {
    "temperature": ("temp", False, 0.0, 1000.0),
    "top_k": ("top_k", True, 0, 1 << 24),
    "top_p": ("top_p", False, 0.0, 1.0),
    "min_p": ("min_p", False, 0.0, 1.0),
    "repetition_penalty": ("penalty_repeat", False, 0.001, 1000.0),
}
"""generation_config.json -> general.sampling.*, whole number or not, range."""


def model_name(folder: Path) -> str:
    """What to call the model: its folder, in a Hugging Face cache the repository."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        name = folder.parent.parent.name.rpartition("--")[2]
    else:
        name = folder.name
    return name.replace("-", " ").encode("utf-8", "replace").decode("utf-8")


def general(folder: Path, kind: FileType) -> dict[str, Value]:
    """`general.*` without the sampling defaults."""
    return {
        "general.architecture": header.string(ARCHITECTURE),
        "general.type": header.string("model"),
        "general.name": header.string(model_name(folder)),
        "general.file_type": header.uint32(kind.number),
        "general.quantization_version": header.uint32(QUANTIZATION_VERSION),
        "general.alignment": header.uint32(header.ALIGNMENT),
    }


def sampling(settings: dict[str, Any]) -> dict[str, Value]:
    """`general.sampling.*` from generation_config.json; greedy decoding is temperature 0."""
    result = {}
    for key, (name, whole, low, high) in _SAMPLING.items():
        value = settings.get(key)
        if key == "temperature" and settings.get("do_sample") is False:
            value = 0.0
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int if whole else int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            raise Error(
                f"generation_config.json: {key} is {str(value)[:40]}, {low:g} to {high:g} is needed"
            )
        encode = header.int32 if whole else header.float32
        result[f"general.sampling.{name}"] = encode(value)
    return result


def architecture(hparams: HParams, mtp: bool) -> dict[str, Value]:
    """`qwen3next.*`."""
    recurrent = [*hparams.recurrent, *([False] if mtp else [])]
    numbers = {
        "block_count": len(recurrent),
        "context_length": hparams.context_length,
        "embedding_length": hparams.hidden,
        "feed_forward_length": hparams.feed_forward,
        "attention.head_count": hparams.heads,
        "attention.head_count_kv": hparams.kv_heads,
        "attention.key_length": hparams.head_dim,
        "attention.value_length": hparams.head_dim,
        "rope.dimension_count": hparams.rope_dimensions,
        "expert_count": hparams.experts,
        "expert_used_count": hparams.experts_used,
        "expert_feed_forward_length": hparams.expert_width,
        "expert_shared_feed_forward_length": hparams.shared_width,
        "ssm.conv_kernel": hparams.conv_kernel,
        "ssm.state_size": hparams.state_size,
        "ssm.group_count": hparams.key_heads,
        "ssm.time_step_rank": hparams.value_heads,
        "ssm.inner_size": hparams.value_dim,
        "full_attention_interval": hparams.full_attention_interval,
        "nextn_predict_layers": 1 if mtp else None,
        "vocab_size": hparams.vocabulary,
    }
    result = {
        f"{ARCHITECTURE}.{key}": header.uint32(number)
        for key, number in numbers.items()
        if number is not None
    }
    return result | {
        f"{ARCHITECTURE}.rope.freq_base": header.float32(hparams.rope_base),
        f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon": header.float32(hparams.norm_epsilon),
        f"{ARCHITECTURE}.attention.recurrent_layers": header.booleans(recurrent),
    }
