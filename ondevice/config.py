"""The hyper-parameters of a Qwen3-Next GGUF file, checked before anything is computed from them.

Every number has a range in one table below, wide enough for models well beyond the published
ones; then come the rules that tie numbers together. Keys are `qwen3next.*` as llama.cpp writes
them (its src/models/qwen3next.cpp). `block_count` includes the multi-token-prediction block, if
there is one, as the last block.

What the file format can express and this runtime does not do (scaled rotary positions, router
functions other than a renormalised softmax) is refused here by name, never ignored.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ondevice.gguf_file import GGUFFile
from ondevice.gguf_header import shown
from quant.errors import Error

ARCHITECTURE = "qwen3next"
NAME_LIMIT = 200  # letters of the model's name that are kept
DEFAULT_INTERVAL = 4  # of `full_attention_interval`, which older files omit

_INTEGERS = {
    "block_count": (1, 1024),
    "nextn_predict_layers": (0, 1),
    "context_length": (1, 2**32 - 1),
    "embedding_length": (1, 1 << 16),
    "vocab_size": (1, 1 << 21),
    "feed_forward_length": (0, 1 << 20),
    "full_attention_interval": (1, 1024),
    "attention.head_count": (1, 1024),
    "attention.head_count_kv": (1, 1024),
    "attention.key_length": (1, 1024),
    "attention.value_length": (1, 1024),
    "rope.dimension_count": (2, 1024),
    "expert_count": (1, 8192),
    "expert_used_count": (1, 256),
    "expert_feed_forward_length": (1, 1 << 16),
    "expert_shared_feed_forward_length": (1, 1 << 18),
    "expert_gating_func": (0, 1 << 16),
    "ssm.conv_kernel": (2, 64),
    "ssm.state_size": (1, 1024),
    "ssm.group_count": (1, 1024),
    "ssm.time_step_rank": (1, 4096),
    "ssm.inner_size": (1, 1 << 22),
}
_FLOATS = {  # the low end is excluded, the high end included
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    "rope.freq_base": (0.0, 1e12),
    "rope.scaling.factor": (0.0, 1e6),
    "expert_weights_scale": (-1.0, 1e6),
}
_GATING_FUNCTIONS = {0: "unset", 1: "softmax", 2: "sigmoid", 3: "softmax over the chosen experts"}
_SOFTMAX = (0, 1)
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that shape a model; counts unless stated."""

    architecture: str
    name: str
    layers: int
    """Trunk layers, without the multi-token-prediction block."""
    mtp_layers: int
    """0 or 1."""
    context_length: int
    hidden: int
    vocabulary: int
    recurrent: tuple[bool, ...]
    """Per trunk layer: True for gated DeltaNet, False for gated attention."""
    heads: int
    kv_heads: int
    head_dim: int
    rope_dimensions: int
    """The first dimensions of a head, which turn with the position."""
    rope_base: float
    norm_epsilon: float
    experts: int
    experts_used: int
    expert_width: int
    shared_width: int
    key_heads: int
    value_heads: int
    state_size: int
    """Dimension of a DeltaNet key head and of a value head."""
    conv_kernel: int

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
    def from_gguf(cls, file: GGUFFile) -> "Config":
        """The file's hyper-parameters; Error naming the key that is missing or out of range."""
        keys = _Keys(file)
        keys.check_architecture()
        blocks = keys.integer("block_count")
        mtp_layers = keys.integer("nextn_predict_layers", 0)
        if mtp_layers >= blocks:
            raise keys.fail("nextn_predict_layers", f"fewer than the {blocks} blocks")
        layers = blocks - mtp_layers
        experts_used = keys.integer("expert_used_count")
        expert_width = keys.expert_width(experts_used)
        config = cls(
            architecture=ARCHITECTURE,
            name=keys.name(),
            layers=layers,
            mtp_layers=mtp_layers,
            context_length=keys.integer("context_length"),
            hidden=keys.integer("embedding_length"),
            vocabulary=keys.vocabulary(),
            recurrent=keys.recurrent(layers, blocks),
            heads=keys.integer("attention.head_count"),
            kv_heads=keys.integer("attention.head_count_kv"),
            head_dim=keys.integer("attention.key_length"),
            rope_dimensions=keys.integer("rope.dimension_count"),
            rope_base=keys.real("rope.freq_base"),
            norm_epsilon=keys.real("attention.layer_norm_rms_epsilon"),
            experts=keys.integer("expert_count"),
            experts_used=experts_used,
            expert_width=expert_width,
            shared_width=keys.integer("expert_shared_feed_forward_length", expert_width),
            key_heads=keys.integer("ssm.group_count"),
            value_heads=keys.integer("ssm.time_step_rank"),
            state_size=keys.integer("ssm.state_size"),
            conv_kernel=keys.integer("ssm.conv_kernel"),
        )
        keys.check_relations(config)
        keys.check_rope_scaling()
        keys.check_router()
        return config


class _Keys:
    """The metadata of one file under the architecture's prefix."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self.metadata = file.metadata

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{ARCHITECTURE}.{key}")

    def fail(self, key: str, needed: str) -> Error:
        """The error of a key whose value will not do."""
        full = f"{ARCHITECTURE}.{key}"
        if full not in self.metadata:
            return Error(f"{self.path}: {full} is missing; needed {needed}")
        return Error(f"{self.path}: {full} is {shown(self.metadata[full])}; needed {needed}")

    def check_architecture(self) -> None:
        found = self.metadata.get("general.architecture")
        if found is None:
            raise Error(f"{self.path}: general.architecture is missing; supported: {ARCHITECTURE}")
        if found != ARCHITECTURE:
            raise Error(
                f"{self.path}: architecture {shown(found)} is not supported; "
                f"supported: {ARCHITECTURE}"
            )

    def name(self) -> str:
        name = self.metadata.get("general.name", "")
        if not isinstance(name, str):
            return ""
        return "".join(letter if letter.isprintable() else " " for letter in name[:NAME_LIMIT])

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number inside its range; Error when absent without a default."""
        value = self.get(key)
        low, high = _INTEGERS[key]
        needed = f"{low:,} to {high:,}"
        if value is None:
            if default is None:
                raise self.fail(key, needed)
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, needed)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number inside its range; Error when absent without a default."""
        value = self.get(key)
        low, high = _FLOATS[key]
        needed = f"a number above {low:g}, up to {high:g}"
        if value is None:
            if default is None:
                raise self.fail(key, needed)
            return default
        if type(value) not in (int, float) or not low < value <= high:  # NaN fails the comparison
            raise self.fail(key, needed)
        return float(value)

    def expert_width(self, experts_used: int) -> int:
        """`expert_feed_forward_length`: a number, or an array with the same number per layer."""
        key = "expert_feed_forward_length"
        value = self.get(key)
        if value is None:
            dense = self.integer("feed_forward_length", 0)
            if not dense or dense % experts_used:
                raise self.fail(key, "the width of an expert")
            return dense // experts_used
        if isinstance(value, np.ndarray):
            low, high = _INTEGERS[key]
            if (
                value.dtype.kind not in "iu"
                or not value.size
                or value.min() != value.max()
                or not low <= value[0] <= high
            ):
                raise self.fail(key, f"the same width for every layer, {low:,} to {high:,}")
            return int(value[0])
        return self.integer(key)

    def vocabulary(self) -> int:
        """The number of tokens; `vocab_size` and the token list agree where both are there."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            return self.integer("vocab_size")
        if not isinstance(tokens, list) or not tokens:
            raise Error(
                f"{self.path}: tokenizer.ggml.tokens is {shown(tokens)}; needed a list of tokens"
            )
        size = self.integer("vocab_size", len(tokens))
        if size != len(tokens):
            raise self.fail(
                "vocab_size", f"the number of tokenizer.ggml.tokens, which is {len(tokens):,}"
            )
        return size

    def recurrent(self, layers: int, blocks: int) -> tuple[bool, ...]:
        """Which trunk layers are DeltaNet: as listed, else from the interval."""
        listed = self.get("attention.recurrent_layers")
        if listed is None:
            interval = self.integer("full_attention_interval", DEFAULT_INTERVAL)
            return tuple((layer + 1) % interval != 0 for layer in range(layers))
        needed = f"{layers} or {blocks}" if blocks > layers else f"{layers}"
        if (
            not isinstance(listed, np.ndarray)
            or len(listed) not in (layers, blocks)
            or listed.dtype.kind not in "biu"
            or not np.isin(listed, (0, 1)).all()
        ):
            raise self.fail("attention.recurrent_layers", f"an array of {needed} bools")
        if listed[layers:].any():
            raise self.fail(
                "attention.recurrent_layers", "False for the multi-token-prediction block"
            )
        return tuple(bool(value) for value in listed[:layers])

    def check_relations(self, config: Config) -> None:
        """The rules between numbers, each of which is already in its range."""
        if self.integer("attention.value_length") != config.head_dim:
            raise self.fail(
                "attention.value_length", f"attention.key_length, which is {config.head_dim}"
            )
        if config.heads % config.kv_heads:
            raise self.fail("attention.head_count_kv", f"a divisor of {config.heads} heads")
        if config.rope_dimensions % 2 or config.rope_dimensions > config.head_dim:
            raise self.fail(
                "rope.dimension_count", f"an even number up to the head's {config.head_dim}"
            )
        if config.experts_used > config.experts:
            raise self.fail("expert_used_count", f"at most expert_count, which is {config.experts}")
        if config.value_heads % config.key_heads:
            raise self.fail(
                "ssm.time_step_rank", f"a multiple of ssm.group_count, which is {config.key_heads}"
            )
        if self.integer("ssm.inner_size") != config.value_dim:
            raise self.fail(
                "ssm.inner_size",
                f"ssm.time_step_rank times ssm.state_size, which is {config.value_dim:,}",
            )

    def check_rope_scaling(self) -> None:
        kind = self.get("rope.scaling.type")
        if kind is not None and kind not in _ROPE_SCALINGS:
            raise self.fail("rope.scaling.type", f"one of {', '.join(_ROPE_SCALINGS)}")
        if kind in (None, "none", "linear"):
            factor = self.real("rope.scaling.factor", 1.0)
            if kind == "none" or math.isclose(factor, 1.0):
                return
            raise self.fail("rope.scaling.factor", "1: scaled positions are not supported")
        raise self.fail("rope.scaling.type", "none: scaled positions are not supported")

    def check_router(self) -> None:
        gating = self.integer("expert_gating_func", 1)
        if gating not in _SOFTMAX:
            spelled = _GATING_FUNCTIONS.get(gating, "unknown")
            raise self.fail("expert_gating_func", f"1, softmax (the file's is {spelled})")
        normalised = self.get("expert_weights_norm")
        if normalised is not None and normalised is not True:
            raise self.fail(
                "expert_weights_norm", "true: the chosen experts' weights are renormalised"
            )
        if self.real("expert_weights_scale", 1.0) not in (0.0, 1.0):
            raise self.fail("expert_weights_scale", "0 or 1: scaled experts are not supported")
