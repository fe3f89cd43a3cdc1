"""The demo model: Qwen3-Next in miniature, with its multi-token-prediction head.

Trunk: embedding, gated DeltaNet and gated attention 3:1 with a mixture of experts in every layer,
final norm, output matrix of its own.

Multi-token prediction: at position t the head reads the embedding of token t+1 and the trunk's
final normed hidden state of t, and predicts token t+2 through the shared output matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.demo_layers import DeltaNet, Dimensions, Layer, Mixture, Norm


class Trunk(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, d: Dimensions, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(d.vocabulary, d.hidden)
        self.layers = nn.ModuleList(
            Layer(d, (index + 1) % d.interval != 0, dropout) for index in range(d.layers)
        )
        self.norm = Norm(d.hidden, d.epsilon)


class Prediction(nn.Module):
    """The multi-token-prediction head without its (shared) embedding and output matrices."""

    def __init__(self, d: Dimensions, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * d.hidden, d.hidden, bias=False)
        self.pre_fc_norm_embedding = Norm(d.hidden, d.epsilon)
        self.pre_fc_norm_hidden = Norm(d.hidden, d.epsilon)
        self.layers = nn.ModuleList([Layer(d, False, dropout)])
        self.norm = Norm(d.hidden, d.epsilon)


class DemoModel(nn.Module):
    """Trunk, output matrix and multi-token-prediction head."""

    def __init__(self, d: Dimensions, dropout: float = 0.0) -> None:
        super().__init__()
        self.d = d
        self.model = Trunk(d, dropout)
        self.lm_head = nn.Linear(d.hidden, d.vocabulary, bias=False)
        self.mtp = Prediction(d, dropout)
        frequency = d.rope_base ** (-torch.arange(0, d.rotary, 2, dtype=torch.float64) / d.rotary)
        angle = torch.arange(d.positions, dtype=torch.float64).unsqueeze(1) * frequency
        self.register_buffer("cosine", angle.cos().float(), persistent=False)
        self.register_buffer("sine", angle.sin().float(), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights; the DeltaNet heads forget at rates spread over three decades."""
        depth = (2 * (self.d.layers + 1)) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_(0.0, 0.02)
            elif "conv1d" in name:
                parameter.uniform_(-0.5, 0.5)
            elif name.endswith(
                ("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")
            ):
                parameter.normal_(0.0, depth * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5)
        for module in self.modules():
            if isinstance(module, DeltaNet):
                heads = module.A_log.shape[0]
                module.A_log.copy_(torch.empty(heads).uniform_(1.0, 16.0).log())
                step = torch.logspace(-3.5, -1.0, heads)[torch.randperm(heads)]
                module.dt_bias.copy_(step.expm1().log())

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0..length-1."""
        return self.cosine[:length], self.sine[:length]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final normed hidden states (B, T, hidden) of tokens (B, T)."""
        rotation = self.rotation(tokens.shape[1])
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, rotation)
        return self.model.norm(x)

    def draft_hidden(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Hidden states for token t+2 from the trunk's at t and the token t+1, both (B, T, ...)."""
        embedded = self.mtp.pre_fc_norm_embedding(self.model.embed_tokens(following))
        x = self.mtp.fc(torch.cat([embedded, self.mtp.pre_fc_norm_hidden(hidden)], dim=-1))
        x = self.mtp.layers[0](x, self.rotation(x.shape[1]))
        return self.mtp.norm(x)

    def balance(self) -> Tensor:
        """Mean load-balancing loss of the last forward pass (1 when perfectly even)."""
        losses = [m.balance for m in self.modules() if isinstance(m, Mixture)]
        return torch.stack(losses).mean()
