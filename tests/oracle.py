"""Qwen3-Next in float64 NumPy, written from its equations: the judge of the runtime's numbers.

It shares no code with the runtime, knows no file format but the two it reads weights from, and
does everything in the plainest order. Sources: "Gated Delta Networks" (arXiv 2412.06464) for the
recurrence, the transformers modelling file of `qwen3_next` as the numeric standard.

One layer, x (n, hidden):
    x = x + mixer(norm(x)),  x = x + moe(norm(x)),  norm(x) = x / sqrt(mean(x^2) + eps) * (1 + w)

Gated DeltaNet mixer, value head h, its key head k = h // (value_heads / key_heads), state S (d, d):
    q, k, v = silu(conv(x W_qkv)),  z = x W_z,  beta = sigmoid(x W_b)
    g = -exp(A_log) softplus(x W_a + dt_bias)
    q = l2(q) / sqrt(d),  k = l2(k)
    S <- exp(g) S,  S <- S + k (beta (v - S^T k))^T,  o = S^T q
    out = W_o (rms_norm(o) * w * silu(z))

Gated attention mixer: q, gate = x W_q per head; q, k = rope(norm(q)), rope(norm(k));
    out = W_o (softmax(q k^T / sqrt(d), causal) v * sigmoid(gate))

Mixture: p = softmax(x W_g), the k best renormalised to 1;
    out = sum_e p_e down_e(silu(gate_e x) * up_e x) + sigmoid(x w_s) shared(x)

Multi-token head: u_t = fc [norm_e(embed(token_t+1)), norm_h(h_t)], one attention layer with its own
keys and values, norm; h_t is the trunk's output after its final norm. Its logits predict token t+2.

Weights go by their Hugging Face names. Only a batch of one, only text positions, no rope scaling.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray

ATTENTION_BLOCK = 256  # query rows per block, so that 4,000 tokens need no (n, n) matrix per head


# --- the equations, one function each -------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """x * sigmoid(x), elementwise."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), elementwise, without overflow."""
    return np.logaddexp(0.0, x)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight has its 1 added already."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def gated_norm(x: Array, weight: Array, gate: Array, epsilon: float) -> Array:
    """rms_norm(x) * weight * silu(gate); x and gate (..., d), weight (d,), no 1 added."""
    return rms_norm(x, weight, epsilon) * silu(gate)


def l2_norm(x: Array, epsilon: float) -> Array:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + epsilon)


def conv_step(window: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """One token of the causal depthwise convolution, then SiLU.

    window (channels, kernel-1) holds the latest inputs, oldest first; x (channels,);
    weight (channels, kernel). Returns the output (channels,) and the next window.
    """
    inputs = np.concatenate([window, x[:, None]], axis=1)
    return silu(np.sum(inputs * weight, axis=1)), inputs[:, 1:]


def delta_rule_step(
    state: Array, q: Array, k: Array, v: Array, g: Array, beta: Array
) -> tuple[Array, Array]:
    """One token of the gated delta rule for every value head.

    state (heads, d_key, d_value); q, k (heads, d_key), already normalised and q scaled;
    v (heads, d_value); g, beta (heads,). Returns the output (heads, d_value) and the next state.
    """
    state = state * np.exp(g)[:, None, None]
    predicted = np.einsum("hkv,hk->hv", state, k)
    delta = beta[:, None] * (v - predicted)
    state = state + k[:, :, None] * delta[:, None, :]
    return np.einsum("hkv,hk->hv", state, q), state


def rope(x: Array, positions: Array, dimensions: int, base: float) -> Array:
    """Rotate the first `dimensions` of each head: pairs are (i, i + dimensions/2), the rest stays.

    x (n, heads, head_dim), positions (n,).
    """
    half = dimensions // 2
    frequency = base ** (-np.arange(half) * 2.0 / dimensions)
    angle = positions[:, None, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    first, second, rest = x[..., :half], x[..., half:dimensions], x[..., dimensions:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attention(q: Array, k: Array, v: Array, start: int = 0) -> Array:
    """Causal softmax attention; query row i stands at position start + i.

    q (n, heads, d); k, v (start + n, kv_heads, d). Returns (n, heads, d).
    """
    n, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    for first in range(0, n, ATTENTION_BLOCK):
        last = min(first + ATTENTION_BLOCK, n)
        seen = start + last
        hidden = np.arange(seen)[None, :] > start + np.arange(first, last)[:, None]
        for head in range(heads):
            keys, values = k[:seen, head // group], v[:seen, head // group]
            scores = q[first:last, head] @ keys.T / np.sqrt(head_dim)
            out[first:last, head] = softmax(np.where(hidden, -np.inf, scores)) @ values
    return out


def router(logits: Array, used: int) -> tuple[Array, Array]:
    """Softmax over all experts, the `used` best, renormalised to sum 1.

    logits (n, experts). Returns expert numbers and weights, both (n, used), best first; of equal
    logits the lower number wins.
    """
    probability = softmax(logits)
    chosen = np.argsort(-probability, axis=-1, kind="stable")[:, :used]
    weight = np.take_along_axis(probability, chosen, axis=-1)
    return chosen, weight / weight.sum(axis=-1, keepdims=True)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down (silu(gate x) * (up x)).

    x (n, hidden); gate, up (width, hidden); down (hidden, width). Returns (n, hidden).
    """
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def experts(x: Array, chosen: Array, weight: Array, gate: Array, up: Array, down: Array) -> Array:
    """Weighted sum of each row's chosen experts.

    x (n, hidden); chosen, weight (n, used); gate, up (experts, width, hidden);
    down (experts, hidden, width). Returns (n, hidden).
    """
    out = np.zeros_like(x)
    for expert in np.unique(chosen):
        rows, slots = np.nonzero(chosen == expert)
        y = swiglu(x[rows], gate[expert], up[expert], down[expert])
        out[rows] += weight[rows, slots, None] * y
    return out


# --- the model ------------------------------------------------------------------------------------


@dataclass
class State:
    """What a sequence leaves behind, per layer number; "mtp" is the multi-token head's layer."""

    position: int = 0
    window: dict[Any, Array] = field(default_factory=dict)  # (channels, kernel-1)
    memory: dict[Any, Array] = field(default_factory=dict)  # (value_heads, d, d)
    keys: dict[Any, Array] = field(default_factory=dict)  # (tokens, kv_heads, head_dim)
    values: dict[Any, Array] = field(default_factory=dict)  # (tokens, kv_heads, head_dim)


class Oracle:
    """The whole model over named float64 weights and the checkpoint's `config.json` as a dict."""

    def __init__(self, weights: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.config = dict(config)
        self.layers = int(config["num_hidden_layers"])
        self.epsilon = float(config["rms_norm_eps"])
        interval = int(config.get("full_attention_interval") or 4)
        kinds = config.get("layer_types")
        self.recurrent = (
            [kind == "linear_attention" for kind in kinds]
            if kinds
            else [(layer + 1) % interval != 0 for layer in range(self.layers)]
        )

    @classmethod
    def open(cls, folder: Path) -> "Oracle":
        """Read a Hugging Face checkpoint folder."""
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return cls(read_safetensors(Path(folder)), config)

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint brings a multi-token head."""
        return "mtp.fc.weight" in self.weights

    def forward(self, ids: Any, state: State | None = None) -> Array:
        """Logits (n, vocabulary) of the tokens ids (n,), after those already in `state`."""
        return self.logits(self.hidden(ids, state))

    def hidden(self, ids: Any, state: State | None = None) -> Array:
        """The trunk's output after its final norm, (n, hidden); moves `state` n tokens on."""
        state = State() if state is None else state
        x = self.weights["model.embed_tokens.weight"][np.asarray(ids, np.int64)]
        for layer in range(self.layers):
            x = self._layer(x, f"model.layers.{layer}.", layer, self.recurrent[layer], state)
        state.position += len(x)
        return self._norm(x, "model.norm.weight")

    def logits(self, hidden: Array) -> Array:
        """The head: (n, hidden) -> (n, vocabulary)."""
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return hidden @ head.T

    def mtp(self, hidden: Array, following: Any, state: State | None = None) -> tuple[Array, Array]:
        """The multi-token head over hidden (n, hidden) and the token that follows each, (n,).

        Returns the logits (n, vocabulary) of the token after that, and the normed hidden state
        (n, hidden) that takes the trunk's place in a next draft step.
        """
        state = State() if state is None else state
        embedded = self.weights["model.embed_tokens.weight"][np.asarray(following, np.int64)]
        both = [
            self._norm(embedded, "mtp.pre_fc_norm_embedding.weight"),
            self._norm(hidden, "mtp.pre_fc_norm_hidden.weight"),
        ]
        x = np.concatenate(both, axis=-1) @ self.weights["mtp.fc.weight"].T
        x = self._layer(x, "mtp.layers.0.", "mtp", False, state)
        state.position += len(x)
        x = self._norm(x, "mtp.norm.weight")
        return self.logits(x), x

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, 1.0 + self.weights[name], self.epsilon)

    def _layer(self, x: Array, prefix: str, key: Any, recurrent: bool, state: State) -> Array:
        mixer = self.delta_net if recurrent else self.gated_attention
        x = x + mixer(self._norm(x, prefix + "input_layernorm.weight"), prefix, key, state)
        return x + self.mixture(self._norm(x, prefix + "post_attention_layernorm.weight"), prefix)

    def delta_net(self, x: Array, prefix: str, key: Any, state: State) -> Array:
        """The gated DeltaNet mixer, (n, hidden) -> (n, hidden)."""
        c, w = self.config, self.weights
        key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
        d_key, d_value = c["linear_key_head_dim"], c["linear_value_head_dim"]
        share, n = value_heads // key_heads, len(x)
        prefix += "linear_attn."

        # The projection's rows come per key head: its q, its k, its values, its gates.
        grouped = (x @ w[prefix + "in_proj_qkvz.weight"].T).reshape(n, key_heads, -1)
        ends = np.cumsum([d_key, d_key, share * d_value])
        q, k, v, z = (part.reshape(n, -1) for part in np.split(grouped, ends, axis=-1))
        ba = (x @ w[prefix + "in_proj_ba.weight"].T).reshape(n, key_heads, 2, share)
        beta = sigmoid(ba[:, :, 0].reshape(n, value_heads))
        a = ba[:, :, 1].reshape(n, value_heads)
        g = -np.exp(w[prefix + "A_log"]) * softplus(a + w[prefix + "dt_bias"])

        conv = w[prefix + "conv1d.weight"]
        conv = conv.reshape(conv.shape[0], conv.shape[-1])
        mixed = np.concatenate([q, k, v], axis=-1)
        window = state.window.get(key, np.zeros((conv.shape[0], conv.shape[1] - 1)))
        memory = state.memory.get(key, np.zeros((value_heads, d_key, d_value)))
        out = np.empty((n, value_heads, d_value))
        for t in range(n):
            y, window = conv_step(window, mixed[t], conv)
            q_t, k_t, v_t = np.split(y, [key_heads * d_key, 2 * key_heads * d_key])
            q_t = l2_norm(q_t.reshape(key_heads, d_key), 1e-6) / np.sqrt(d_key)
            k_t = l2_norm(k_t.reshape(key_heads, d_key), 1e-6)
            out[t], memory = delta_rule_step(
                memory,
                np.repeat(q_t, share, axis=0),
                np.repeat(k_t, share, axis=0),
                v_t.reshape(value_heads, d_value),
                g[t],
                beta[t],
            )
        state.window[key], state.memory[key] = window, memory
        z = z.reshape(n, value_heads, d_value)
        normed = gated_norm(out, w[prefix + "norm.weight"], z, self.epsilon)
        return normed.reshape(n, -1) @ w[prefix + "out_proj.weight"].T

    def gated_attention(self, x: Array, prefix: str, key: Any, state: State) -> Array:
        """The gated attention mixer, (n, hidden) -> (n, hidden)."""
        c, w = self.config, self.weights
        heads, kv_heads, head_dim = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        n, start = len(x), state.position
        prefix += "self_attn."
        q, gate = np.split((x @ w[prefix + "q_proj.weight"].T).reshape(n, heads, -1), 2, axis=-1)
        k = (x @ w[prefix + "k_proj.weight"].T).reshape(n, kv_heads, head_dim)
        v = (x @ w[prefix + "v_proj.weight"].T).reshape(n, kv_heads, head_dim)
        positions = np.arange(start, start + n)
        dimensions = int(head_dim * c.get("partial_rotary_factor", 0.25))
        base = float(c["rope_theta"])
        q = rope(self._norm(q, prefix + "q_norm.weight"), positions, dimensions, base)
        k = rope(self._norm(k, prefix + "k_norm.weight"), positions, dimensions, base)
        if start:
            k = np.concatenate([state.keys[key], k])
            v = np.concatenate([state.values[key], v])
        state.keys[key], state.values[key] = k, v
        out = attention(q, k, v, start) * sigmoid(gate)
        return out.reshape(n, -1) @ w[prefix + "o_proj.weight"].T

    def mixture(self, x: Array, prefix: str) -> Array:
        """Routed experts and the shared expert, (n, hidden) -> (n, hidden)."""
        w, prefix = self.weights, prefix + "mlp."
        chosen, weight = router(x @ w[prefix + "gate.weight"].T, self.config["num_experts_per_tok"])
        shared = swiglu(
            x,
            w[prefix + "shared_expert.gate_proj.weight"],
            w[prefix + "shared_expert.up_proj.weight"],
            w[prefix + "shared_expert.down_proj.weight"],
        )
        shared_weight = sigmoid(x @ w[prefix + "shared_expert_gate.weight"].reshape(-1, 1))
        return experts(x, chosen, weight, *self._experts(prefix)) + shared_weight * shared

    def _experts(self, prefix: str) -> tuple[Array, Array, Array]:
        """The stacks gate, up (experts, width, hidden) and down; stacked once, then kept."""
        w, fused = self.weights, prefix + "experts.gate_up_proj"
        if fused not in w:
            names = range(self.config["num_experts"])
            gate, up, w[prefix + "experts.down_proj"] = (
                np.stack([w.pop(f"{prefix}experts.{e}.{part}_proj.weight") for e in names])
                for part in ("gate", "up", "down")
            )
            w[fused] = np.concatenate([gate, up], axis=1)
        gate, up = np.split(w[fused], 2, axis=1)
        return gate, up, w[prefix + "experts.down_proj"]


# --- weights --------------------------------------------------------------------------------------


def read_safetensors(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder's safetensors files as float32, read from the bytes themselves."""
    tensors: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            data = raw[8 + length + first : 8 + length + last]
            if entry["dtype"] == "BF16":
                wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
                values = wide.view(np.float32)
            else:
                kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[entry["dtype"]]
                values = np.frombuffer(data, kind).astype(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors
