"""config.json of a Qwen3-Next checkpoint -> HParams, every key checked before it is used.

Two generations of configuration are read: `rope_theta` and `partial_rotary_factor` at the top, or
inside `rope_parameters` (transformers 5); the layer kinds from `layer_types`, or from
`full_attention_interval`. What the qwen3next architecture of GGUF cannot say (dense layers, biased
attention, RoPE scaling, unequal DeltaNet head sizes) is refused by name.
"""

import math
from dataclasses import dataclass
from typing import Any

from convert.checkpoint import refuse
from quant.errors import Error

MODEL_TYPE = "qwen3_next"

_INTEGERS = {
    "num_hidden_layers": (1, 1024),
    "max_position_embeddings": (1, 1 << 30),
    "hidden_size": (1, 1 << 17),
    "vocab_size": (1, 1 << 24),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 4096),
    "num_experts": (1, 1 << 14),
    "num_experts_per_tok": (1, 1024),
    "moe_intermediate_size": (1, 1 << 17),
    "shared_expert_intermediate_size": (1, 1 << 17),
    "linear_num_key_heads": (1, 1024),
    "linear_num_value_heads": (1, 1024),
    "linear_key_head_dim": (1, 4096),
    "linear_value_head_dim": (1, 4096),
    "linear_conv_kernel_dim": (2, 64),
}
_FIXED: dict[str, Any] = {
    "norm_topk_prob": True,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
"""Settings that have one value in this architecture; absent means that value."""


@dataclass(frozen=True, slots=True)
class HParams:
    """The shape of the model; `recurrent` per trunk layer, True = gated DeltaNet."""

    layers: int
    context_length: int
    hidden: int
    feed_forward: int | None
    vocabulary: int
    tied: bool
    recurrent: tuple[bool, ...]
    full_attention_interval: int | None
    heads: int
    kv_heads: int
    head_dim: int
    rope_dimensions: int
    rope_base: float
    norm_epsilon: float
    experts: int
    experts_used: int
    expert_width: int
    shared_width: int
    key_heads: int
    value_heads: int
    state_size: int
    conv_kernel: int
    mtp_layers: int | None

    @property
    def key_dim(self) -> int:
        return self.key_heads * self.state_size

    @property
    def value_dim(self) -> int:
        return self.value_heads * self.state_size

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_dim + self.value_dim

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "HParams":
        """Check a parsed config.json; Error, starting with `where`, lists what is wrong with it."""
        if config.get("model_type") != MODEL_TYPE:
            raise Error(
                f"{where}: model_type is {config.get('model_type')!r}; convert reads {MODEL_TYPE!r}"
            )
        if (quantized := config.get("quantization_config")) is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise Error(
                f"{where}: the checkpoint is quantized already ({method}); "
                "convert its original BF16 checkpoint"
            )
        reader = _Reader(config)
        integers = {key: reader.integer(key, *bounds) for key, bounds in _INTEGERS.items()}
        for key, needed in _FIXED.items():
            reader.fixed(key, needed)
        if config.get("mlp_only_layers"):
            reader.problem("mlp_only_layers", config["mlp_only_layers"], "an empty list")
        epsilon = reader.number(config, "rms_norm_eps", 1e-12, 0.1)
        rope_base, rotary = reader.rope()
        tied = reader.boolean("tie_word_embeddings", False)
        feed_forward = reader.optional("intermediate_size", 1, 1 << 20)
        mtp_layers = reader.optional("mtp_num_hidden_layers", 0, 64)
        if mtp_layers is None:
            mtp_layers = reader.optional("num_nextn_predict_layers", 0, 64)
        refuse(reader.problems, where)
        recurrent, interval = reader.layer_kinds(integers["num_hidden_layers"])
        reader.relations(integers)
        dimensions = int(integers["head_dim"] * rotary)
        if dimensions < 2 or dimensions % 2 or dimensions > integers["head_dim"]:
            reader.problem("partial_rotary_factor", rotary, "an even number of rotated dimensions")
        refuse(reader.problems, where)
        return cls(
            layers=integers["num_hidden_layers"],
            context_length=integers["max_position_embeddings"],
            hidden=integers["hidden_size"],
            feed_forward=feed_forward,
            vocabulary=integers["vocab_size"],
            tied=tied,
            recurrent=recurrent,
            full_attention_interval=interval,
            heads=integers["num_attention_heads"],
            kv_heads=integers["num_key_value_heads"],
            head_dim=integers["head_dim"],
            rope_dimensions=dimensions,
            rope_base=rope_base,
            norm_epsilon=epsilon,
            experts=integers["num_experts"],
            experts_used=integers["num_experts_per_tok"],
            expert_width=integers["moe_intermediate_size"],
            shared_width=integers["shared_expert_intermediate_size"],
            key_heads=integers["linear_num_key_heads"],
            value_heads=integers["linear_num_value_heads"],
            state_size=integers["linear_key_head_dim"],
            conv_kernel=integers["linear_conv_kernel_dim"],
            mtp_layers=mtp_layers,
        )


class _Reader:
    """Takes keys out of a configuration and collects what is wrong with them."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def problem(self, key: str, found: Any, needed: str) -> None:
        self.problems.append(f"{key} is {str(found)[:60]!s}, {needed} is needed")

    def integer(self, key: str, low: int, high: int) -> int:
        if key not in self.config:
            self.problems.append(f"{key} is missing")
            return low
        value = self.config[key]
        if type(value) is not int or not low <= value <= high:
            self.problem(key, value, f"a whole number from {low} to {high}")
            return low
        return value

    def optional(self, key: str, low: int, high: int) -> int | None:
        return None if self.config.get(key) is None else self.integer(key, low, high)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, value, "true or false")
            return default
        return value

    def number(self, place: dict[str, Any], key: str, low: float, high: float) -> float:
        if key not in place:
            self.problems.append(f"{key} is missing")
            return low
        value = place[key]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or not low <= value <= high
        ):
            self.problem(key, value, f"a number from {low:g} to {high:g}")
            return low
        return float(value)

    def fixed(self, key: str, needed: Any) -> None:
        value = self.config.get(key)
        if value is not None and (value != needed or type(value) is not type(needed)):
            self.problem(key, value, f"{needed}")

    def rope(self) -> tuple[float, float]:
        """RoPE base and the rotated share of a head, from either generation of keys."""
        for key in ("rope_scaling", "rope_parameters"):
            value = self.config.get(key)
            if value is not None and not isinstance(value, dict):
                self.problem(key, value, "an object")
                return 1.0, 1.0
            kind = (value or {}).get("rope_type", (value or {}).get("type"))
            if kind not in (None, "default"):
                self.problem(key, f"of type {kind!r}", "RoPE without scaling ('default')")
        place = {
            key: self.config[key]
            for key in ("rope_theta", "partial_rotary_factor")
            if self.config.get(key) is not None
        }
        place |= self.config.get("rope_parameters") or {}
        place.setdefault("partial_rotary_factor", 0.25)  # the architecture's default
        return (
            self.number(place, "rope_theta", 1.0, 1e12),
            self.number(place, "partial_rotary_factor", 1e-4, 1.0),
        )

    def layer_kinds(self, layers: int) -> tuple[tuple[bool, ...], int | None]:
        """Which layers are recurrent, and the interval when they follow one."""
        interval = self.optional("full_attention_interval", 1, 1024)
        kinds = self.config.get("layer_types")
        if kinds is None:
            if interval is None:
                self.problems.append("layer_types or full_attention_interval is missing")
                return (), None
            return tuple((layer + 1) % interval != 0 for layer in range(layers)), interval
        known = ("linear_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != layers:
            count = len(kinds) if isinstance(kinds, list) else kinds
            self.problem("layer_types", f"of {count}", f"one entry for each of {layers} layers")
            return (), None
        if unknown := [kind for kind in kinds if kind not in known]:
            self.problem("layer_types", f"holding {unknown[0]!r}", " or ".join(known))
            return (), None
        recurrent = tuple(kind == "linear_attention" for kind in kinds)
        if interval is None:
            interval = recurrent.index(False) + 1 if False in recurrent else layers + 1
        regular = recurrent == tuple((layer + 1) % interval != 0 for layer in range(layers))
        return recurrent, interval if regular else None

    def relations(self, integers: dict[str, int]) -> None:
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if integers[whole] % integers[part]:
                self.problem(whole, integers[whole], f"a multiple of {part} ({integers[part]})")
        if integers["linear_key_head_dim"] != integers["linear_value_head_dim"]:
            self.problem(
                "linear_value_head_dim",
                integers["linear_value_head_dim"],
                f"the same as linear_key_head_dim ({integers['linear_key_head_dim']})",
            )
        if integers["num_experts_per_tok"] > integers["num_experts"]:
            self.problem(
                "num_experts_per_tok",
                integers["num_experts_per_tok"],
                f"at most num_experts ({integers['num_experts']})",
            )
