"""Layers of the demo model in PyTorch, written to train fast on a few CPU cores.

They compute what the published Qwen3-Next modules compute, and their parameters carry the published
names, except that the experts of a layer are two stacked tensors here (`demo_export` splits them).

Gated delta rule, per value head, with state S (key size x value size):
    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T
    o_t = S_t^T q_t / sqrt(key size)
evaluated in chunks of `CHUNK` positions: inside a chunk the corrections solve a unit lower
triangular system, between chunks only S is carried.

Routed experts: token slots are sorted by expert, one matrix product per expert writes into one
output, forward and backward; half the time of the training is matrix products.

Limits: no padding mask, no cache, float32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 32


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of the demo model, in the words of its config.json."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    interval: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 16
    rope_base: float = 10000.0
    experts: int = 64
    experts_used: int = 10
    expert_width: int = 32
    shared_width: int = 256
    key_heads: int = 4
    value_heads: int = 8
    state: int = 64
    conv_kernel: int = 4
    epsilon: float = 1e-6
    positions: int = 2048


class Norm(nn.Module):
    """RMS norm whose stored weight is the difference from one."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return x * scale * (1.0 + self.weight)


class GatedNorm(nn.Module):
    """RMS norm with a plain weight, multiplied by SiLU of a gate."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return x * scale * self.weight * F.silu(gate)


class RoutedExperts(torch.autograd.Function):
    """Weighted sum of each token's chosen experts."""

    @staticmethod
    def forward(ctx, x, weights, chosen, gate_up, down):  # type: ignore[no-untyped-def,override]
        slots = chosen.numel()
        order = torch.argsort(chosen.reshape(-1))
        counts = torch.bincount(chosen.reshape(-1), minlength=gate_up.shape[0]).tolist()
        token = order // chosen.shape[1]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(slots)
        inverse = inverse.view(chosen.shape)
        gathered = x.index_select(0, token)
        hidden = x.new_empty(slots, gate_up.shape[1])
        for rows, matrix, out in zip(
            gathered.split(counts), gate_up.unbind(0), hidden.split(counts), strict=True
        ):
            torch.mm(rows, matrix.t(), out=out)
        gate, up = hidden.chunk(2, dim=1)
        scale = weights.reshape(-1).index_select(0, order).unsqueeze(1)
        inner = F.silu(gate) * up
        scaled = inner * scale
        produced = torch.empty_like(gathered)
        for rows, matrix, out in zip(
            scaled.split(counts), down.unbind(0), produced.split(counts), strict=True
        ):
            torch.mm(rows, matrix.t(), out=out)
        ctx.save_for_backward(gathered, hidden, inner, scale, gate_up, down, order, token, inverse)
        ctx.counts = counts
        return F.embedding_bag(inverse, produced, mode="sum")

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
        gathered, hidden, inner, scale, gate_up, down, order, token, inverse = ctx.saved_tensors
        counts = ctx.counts
        outer = gradient.contiguous().index_select(0, token)
        scaled = inner * scale
        d_scaled = torch.empty_like(inner)
        d_down = torch.empty_like(down)
        parts = zip(
            outer.split(counts),
            scaled.split(counts),
            down.unbind(0),
            d_scaled.split(counts),
            d_down.unbind(0),
            strict=True,
        )
        for rows, left, matrix, out, d_matrix in parts:
            torch.mm(rows, matrix, out=out)
            torch.mm(rows.t(), left, out=d_matrix)
        d_weights = torch.empty_like(scale[:, 0])
        d_weights[order] = (d_scaled * inner).sum(1)
        d_inner = d_scaled * scale
        gate, up = hidden.chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        d_hidden = torch.cat(
            [d_inner * up * (sigmoid + silu * (1.0 - sigmoid)), d_inner * silu], dim=1
        )
        d_gathered = torch.empty_like(gathered)
        d_gate_up = torch.empty_like(gate_up)
        parts = zip(
            d_hidden.split(counts),
            gathered.split(counts),
            gate_up.unbind(0),
            d_gathered.split(counts),
            d_gate_up.unbind(0),
            strict=True,
        )
        for rows, left, matrix, out, d_matrix in parts:
            torch.mm(rows, matrix, out=out)
            torch.mm(rows.t(), left, out=d_matrix)
        d_x = F.embedding_bag(inverse, d_gathered, mode="sum")
        return d_x, d_weights.view(inverse.shape), None, d_gate_up, d_down


class Experts(nn.Module):
    """The routed experts of one layer, stacked."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(d.experts, 2 * d.expert_width, d.hidden))
        self.down_proj = nn.Parameter(torch.empty(d.experts, d.hidden, d.expert_width))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return RoutedExperts.apply(x, weights, chosen, self.gate_up_proj, self.down_proj)


class SharedExpert(nn.Module):
    """SwiGLU block that every token passes."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d.hidden, d.shared_width, bias=False)
        self.up_proj = nn.Linear(d.hidden, d.shared_width, bias=False)
        self.down_proj = nn.Linear(d.shared_width, d.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Router, routed experts and the gated shared expert; keeps its load-balancing loss."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.used = d.experts_used
        self.gate = nn.Linear(d.hidden, d.experts, bias=False)
        self.experts = Experts(d)
        self.shared_expert = SharedExpert(d)
        self.shared_expert_gate = nn.Linear(d.hidden, 1, bias=False)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        probabilities = F.softmax(self.gate(flat), dim=-1)
        weights, chosen = probabilities.topk(self.used, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            experts = probabilities.shape[1]
            load = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
            self.balance = experts * (load * probabilities.mean(0)).sum()
        routed = self.experts(flat, weights, chosen)
        shared = torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (routed + shared).view_as(x)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule of q, k (B, T, K, D), v (B, T, K, R, D), log_decay, beta (B, T, K, R)."""
    batch, length, key_heads, repeat, size = v.shape
    padding = -length % CHUNK
    if padding:
        q, k = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k))
        v = F.pad(v, (0, 0, 0, 0, 0, 0, 0, padding))
        log_decay, beta = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (log_decay, beta))
    chunks = (length + padding) // CHUNK
    q, k = (x.view(batch, chunks, CHUNK, key_heads, size).permute(1, 0, 3, 2, 4) for x in (q, k))
    v = v.view(batch, chunks, CHUNK, key_heads, repeat, size).permute(1, 0, 3, 4, 2, 5)
    shape = (batch, chunks, CHUNK, key_heads, repeat)
    log_decay, beta = (x.view(shape).permute(1, 0, 3, 4, 2) for x in (log_decay, beta))
    q, k = q.contiguous(), k.contiguous()  # (chunks, B, K, CHUNK, D)
    total = log_decay.cumsum(-1)  # (chunks, B, K, R, CHUNK)
    upper = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    pair = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(upper, float("-inf")).exp()
    keys = (k @ k.transpose(-1, -2)).unsqueeze(3)
    reads = (q @ k.transpose(-1, -2)).unsqueeze(3) * pair
    system = keys * pair * beta.unsqueeze(-1)
    grown = total.exp().unsqueeze(-1)
    k, q = k.unsqueeze(3), q.unsqueeze(3)
    right = torch.cat([v, k * grown], dim=-1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    queries = q * grown
    last = total[..., -1:]
    writes = (k * (last - total).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = last.exp().unsqueeze(-1)
    state: Tensor | None = None
    outputs = []
    parts = (solved, reads, queries, writes, kept)
    for solution, read, query, write, keep in zip(*(part.unbind(0) for part in parts), strict=True):
        value, key = solution.split(size, dim=-1)
        if state is None:
            outputs.append(read @ value)
            state = write @ value
        else:
            value = value - key @ state
            outputs.append(query @ state + read @ value)
            state = state * keep + write @ value
    out = torch.stack(outputs).permute(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, length + padding, key_heads, repeat, size)[:, :length]


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class DeltaNet(nn.Module):
    """Gated DeltaNet block; projections are stored grouped by key head, as published."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.d = d
        self.key_width = d.key_heads * d.state
        self.value_width = d.value_heads * d.state
        channels = 2 * self.key_width + self.value_width
        self.in_proj_qkvz = nn.Linear(d.hidden, channels + self.value_width, bias=False)
        self.in_proj_ba = nn.Linear(d.hidden, 2 * d.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d.conv_kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(d.value_heads))
        self.A_log = nn.Parameter(torch.zeros(d.value_heads))
        self.norm = GatedNorm(d.state, d.epsilon)
        self.out_proj = nn.Linear(self.value_width, d.hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        d = self.d
        batch, length, _ = x.shape
        repeat = d.value_heads // d.key_heads
        mixed = self.in_proj_qkvz(x).view(batch, length, d.key_heads, (2 + 2 * repeat) * d.state)
        q, k, v, z = mixed.split([d.state, d.state, repeat * d.state, repeat * d.state], dim=-1)
        flat = torch.cat([part.reshape(batch, length, -1) for part in (q, k, v)], dim=-1)
        padded = F.pad(flat, (0, 0, d.conv_kernel - 1, 0))
        taps = self.conv1d.weight.squeeze(1).t()
        flat = F.silu(sum(padded[:, i : i + length] * taps[i] for i in range(d.conv_kernel)))
        q, k, v = flat.split([self.key_width, self.key_width, self.value_width], dim=-1)
        q = unit(q.reshape(batch, length, d.key_heads, d.state)) * d.state**-0.5
        k = unit(k.reshape(batch, length, d.key_heads, d.state))
        v = v.reshape(batch, length, d.key_heads, repeat, d.state)
        b, a = self.in_proj_ba(x).view(batch, length, d.key_heads, 2 * repeat).chunk(2, dim=-1)
        heads = (d.key_heads, repeat)
        log_decay = -self.A_log.exp().view(heads) * F.softplus(a + self.dt_bias.view(heads))
        out = delta_rule(q, k, v, log_decay, torch.sigmoid(b))
        out = self.norm(out.reshape_as(v), z.reshape_as(v))
        return self.out_proj(out.reshape(batch, length, -1))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the first 2n channels of x (B, H, T, D); cosines and sines (T, n)."""
    cosine, sine = rotation
    half = cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention whose output is multiplied by a sigmoid gate."""

    def __init__(self, d: Dimensions) -> None:
        super().__init__()
        self.d = d
        self.q_proj = nn.Linear(d.hidden, 2 * d.heads * d.head_dim, bias=False)
        self.k_proj = nn.Linear(d.hidden, d.kv_heads * d.head_dim, bias=False)
        self.v_proj = nn.Linear(d.hidden, d.kv_heads * d.head_dim, bias=False)
        self.o_proj = nn.Linear(d.heads * d.head_dim, d.hidden, bias=False)
        self.q_norm = Norm(d.head_dim, d.epsilon)
        self.k_norm = Norm(d.head_dim, d.epsilon)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        d = self.d
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, d.heads, 2 * d.head_dim).chunk(2, dim=-1)
        k = self.k_proj(x).view(batch, length, d.kv_heads, d.head_dim)
        v = self.v_proj(x).view(batch, length, d.kv_heads, d.head_dim).transpose(1, 2)
        q = rotate(self.q_norm(q).transpose(1, 2), rotation)
        k = rotate(self.k_norm(k).transpose(1, 2), rotation)
        repeat = d.heads // d.kv_heads
        k, v = (part.repeat_interleave(repeat, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out = out.reshape(batch, length, -1) * torch.sigmoid(gate.reshape(batch, length, -1))
        return self.o_proj(out)


class Layer(nn.Module):
    """Pre-norm residual layer: a token mixer, then the mixture of experts."""

    def __init__(self, d: Dimensions, recurrent: bool, dropout: float) -> None:
        super().__init__()
        self.recurrent = recurrent
        if recurrent:
            self.linear_attn = DeltaNet(d)
        else:
            self.self_attn = Attention(d)
        self.mlp = Mixture(d)
        self.input_layernorm = Norm(d.hidden, d.epsilon)
        self.post_attention_layernorm = Norm(d.hidden, d.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        mixer = self.linear_attn if self.recurrent else self.self_attn
        x = x + self.dropout(mixer(self.input_layernorm(x), rotation))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
