"""The named tensors of a Qwen3-Next file, with their shapes checked; matrices stay in the mapping.

A matrix is (rows, columns) with the columns of one row in consecutive blocks; a stack of experts
is matrices one after the other. Shapes, per block `blk.N.`, H hidden, E experts, W expert width:

    attn_norm, post_attention_norm      (H,)
    attention   attn_q (heads * 2 * head_dim, H), per head [query | gate]
                attn_k, attn_v (kv_heads * head_dim, H), attn_output (H, heads * head_dim)
                attn_q_norm, attn_k_norm (head_dim,)
    DeltaNet    attn_qkv (2 * key_dim + value_dim, H), rows [q | k | v], each by head
                attn_gate (value_dim, H), the rows of z
                or, in older files, both as ssm_in, rows per key head [q | k | v ... | z ...]
                ssm_ba (2 * value_heads, H), rows per key head [b ... | a ...]
                ssm_conv1d (2 * key_dim + value_dim, kernel), ssm_out (H, value_dim)
                ssm_norm (state,), ssm_dt.bias, ssm_a (value_heads,)
    experts     ffn_gate_inp (E, H), ffn_gate_exps, ffn_up_exps (E, W, H), ffn_down_exps (E, H, W)
                or gate and up as ffn_gate_up_exps (E, 2 W, H), per expert [gate | up]
                ffn_gate_inp_shexp (H,), ffn_{gate,up}_shexp (shared, H), ffn_down_shexp (H, shared)

The multi-token-prediction block is an attention block with nextn.eh_proj (H, 2 H) and nextn.enorm,
nextn.hnorm, nextn.shared_head_norm (H,). Rows of `ssm_in` are put into the newer order in private
memory, whatever their format: blocks run along a row, so whole rows can move without loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ondevice.config import Config
from ondevice.gguf_file import GGUFFile, Tensor
from quant.errors import Error
from quant.format import Array, Format
from quant.registry import FORMATS

LISTED = 5  # missing tensors named in one message
CACHE_LINE = 64


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """What a kernel needs to read a matrix, or a stack with one matrix per expert."""

    name: str
    address: int
    rows: int
    columns: int
    row_bytes: int
    format: Format
    experts: int = 1
    owner: object = field(default=None, repr=False)
    """Keeps the memory at `address` alive."""
    stride: int = 0
    """Bytes from one expert's matrix to the next; 0: they follow each other without a gap."""

    def __post_init__(self) -> None:
        if not self.stride:
            object.__setattr__(self, "stride", self.rows * self.row_bytes)


class Weights:
    """The tensors of `file` by name, each checked against the shape the model needs.

    With `read`, matrices outside expert stacks are what it gives for a tensor: private memory.
    """

    def __init__(
        self, file: GGUFFile, config: Config, read: Callable[[Tensor], Array] | None = None
    ) -> None:
        self.path = file.path
        self.tensors = file.tensors
        self.config = config
        self._read = read
        self._private: dict[str, Array] = {}

    def has(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name; Error if it is missing or has another shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise Error(f"{self.path}: tensor {name} is missing; needed with shape {_spell(shape)}")
        if _without_ones(tensor.shape) != _without_ones(shape):
            raise Error(
                f"{tensor.path}: tensor {name} has shape {_spell(tensor.shape)}; "
                f"needed {_spell(shape)}"
            )
        return tensor

    def matrix(self, name: str, rows: int, columns: int, experts: int | None = None) -> Matrix:
        """A (rows, columns) matrix in the mapping, or a stack of `experts` of them."""
        shape = (rows, columns) if experts is None else (experts, rows, columns)
        tensor = self.tensor(name, shape)
        row_bytes = tensor.format.row_bytes(columns)
        data = tensor.data
        if self._read is not None and experts is None:
            if name not in self._private:
                self._private[name] = self._read(tensor)
            data = self._private[name]
        return Matrix(
            name=name,
            address=int(data.__array_interface__["data"][0]),
            rows=rows,
            columns=columns,
            row_bytes=row_bytes,
            format=tensor.format,
            experts=experts or 1,
            owner=data,
        )

    def likely_router(self, layer: int) -> Matrix:
        """(experts, hidden), good enough to guess by: the layer's router in a quarter of its bytes.

        Where rows of the hidden size do not fill blocks, the router itself.
        """
        config = self.config
        router = self.matrix(f"blk.{layer}.ffn_gate_inp.weight", config.experts, config.hidden)
        small = FORMATS["Q8_0"]
        if config.hidden % small.length or small.quantize is None:
            return router
        raw = np.asarray(router.owner)
        values = router.format.dequantize(router.format.blocks(raw)).reshape(-1, config.hidden)
        owner = _private(config.experts * small.row_bytes(config.hidden))
        owner[:] = small.quantize(values).view(np.uint8).reshape(-1)
        return Matrix(
            name=router.name,
            address=int(owner.__array_interface__["data"][0]),
            rows=router.rows,
            columns=router.columns,
            row_bytes=small.row_bytes(config.hidden),
            format=small,
            owner=owner,
        )

    @property
    def likely_router_bytes(self) -> int:
        """Bytes of what `likely_router` makes for every layer but the first."""
        config, small = self.config, FORMATS["Q8_0"]
        if config.hidden % small.length:
            return 0
        return (config.layers - 1) * config.experts * small.row_bytes(config.hidden)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the matrices outside expert stacks that a forward pass reads."""
        blocks = tuple(f"blk.{layer}." for layer in range(self.config.layers))
        return sum(
            self.tensors[name].nbytes
            for name, shape in self.needed()
            if len(shape) == 2 and name.startswith((*blocks, "token_embd", "output"))
        )

    @property
    def prediction_bytes(self) -> int:
        """Bytes of the multi-token-prediction block's matrices outside expert stacks."""
        return sum(
            self.tensors[name].nbytes
            for name, shape in self.needed()
            if len(shape) == 2 and name.startswith(f"blk.{self.config.layers}.")
        )

    def mapped(self, prediction: bool) -> list[Array]:
        """The bytes of every tensor the model reads: first what every token needs, then stacks of
        experts, each in the order of the file, which is about that of a forward pass. With those of
        the multi-token-prediction block, or without them."""
        blocks = range(self.config.layers + self.config.mtp_layers)
        unused = tuple(f"blk.{n}." for n in blocks[self.config.layers + prediction :])
        tensors = [self.tensors[name] for name, _ in self.needed() if not name.startswith(unused)]
        tensors.sort(key=lambda t: (len(t.shape) == 3, t.path, t.offset))
        return [tensor.data for tensor in tensors]

    def array(self, name: str, *shape: int) -> Array:
        """A small tensor as a private float32 array; Error if a value is not finite."""
        tensor = self.tensor(name, shape)
        values = tensor.format.dequantize(tensor.format.blocks(tensor.data)).reshape(shape)
        broken = ~np.isfinite(values)
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            raise Error(
                f"{tensor.path}: tensor {name} holds {np.count_nonzero(broken):,} values that are "
                f"not finite, the first at index {first}; needed finite numbers"
            )
        return np.ascontiguousarray(values, np.float32)

    def vector(self, name: str, length: int) -> Array:
        """A (length,) tensor as a private float32 array; Error if a value is not finite."""
        return self.array(name, length)

    def embedding(self) -> Matrix:
        """(vocabulary, hidden)."""
        return self.matrix("token_embd.weight", self.config.vocabulary, self.config.hidden)

    def output(self) -> Matrix:
        """(vocabulary, hidden); the embedding where the file ties them."""
        if not self.has("output.weight"):
            return self.embedding()
        return self.matrix("output.weight", self.config.vocabulary, self.config.hidden)

    def delta_input(self, layer: int) -> tuple[Matrix, Matrix]:
        """qkv (conv_channels, hidden), rows [q | k | v], and z (value_dim, hidden)."""
        config = self.config
        block = f"blk.{layer}"
        if not self.has(f"{block}.ssm_in.weight") or self.has(f"{block}.attn_qkv.weight"):
            return (
                self.matrix(f"{block}.attn_qkv.weight", config.conv_channels, config.hidden),
                self.matrix(f"{block}.attn_gate.weight", config.value_dim, config.hidden),
            )
        name = f"{block}.ssm_in.weight"
        tensor = self.tensor(name, (config.conv_channels + config.value_dim, config.hidden))
        row_bytes = tensor.format.row_bytes(config.hidden)
        by_head = tensor.data.reshape(config.key_heads, -1, row_bytes)
        values = config.value_dim // config.key_heads  # rows of v, and of z, per key head
        sizes = (config.state_size, config.state_size, values, values)
        q, k, v, z = np.split(by_head, np.cumsum(sizes)[:-1], axis=1)
        parts = []
        for rows, pieces in ((config.conv_channels, (q, k, v)), (config.value_dim, (z,))):
            owner = _private(rows * row_bytes)
            np.concatenate([piece.reshape(-1) for piece in pieces], out=owner)
            address = int(owner.__array_interface__["data"][0])
            parts.append(
                Matrix(name, address, rows, config.hidden, row_bytes, tensor.format, owner=owner)
            )
        return parts[0], parts[1]

    def expert_gate_up(self, layer: int) -> tuple[Matrix, Matrix, int]:
        """Gate and up stacks, (experts, width, hidden) each, and the gate's stride in bytes.

        Each matrix has its own `stride`; they differ where the two are of different formats.
        """
        config = self.config
        width, experts = config.expert_width, config.experts
        name = f"blk.{layer}.ffn_gate_up_exps.weight"
        if not self.has(name):
            gate, up = (
                self.matrix(f"blk.{layer}.ffn_{part}_exps.weight", width, config.hidden, experts)
                for part in ("gate", "up")
            )
            return gate, up, gate.stride
        both = self.matrix(name, 2 * width, config.hidden, experts)
        gate, up = (
            Matrix(
                name=name,
                address=both.address + offset,
                rows=width,
                columns=both.columns,
                row_bytes=both.row_bytes,
                format=both.format,
                experts=experts,
                owner=both.owner,
                stride=both.stride,
            )
            for offset in (0, width * both.row_bytes)
        )
        return gate, up, both.stride

    def check(self) -> None:
        """Error unless every tensor the model needs is there with its shape; others are ignored."""
        needed = dict(self.needed())
        missing = [name for name in needed if name not in self.tensors]
        if missing:
            listed = ", ".join(missing[:LISTED])
            more = f" and {len(missing) - LISTED:,} more" if len(missing) > LISTED else ""
            raise Error(
                f"{self.path}: {len(missing):,} of {len(needed):,} tensors are missing: "
                f"{listed}{more}"
            )
        for name, shape in needed.items():
            self.tensor(name, shape)

    def needed(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor the model reads, in the layout this file uses."""
        config = self.config
        yield "token_embd.weight", (config.vocabulary, config.hidden)
        yield "output_norm.weight", (config.hidden,)
        if self.has("output.weight"):
            yield "output.weight", (config.vocabulary, config.hidden)
        for layer in range(config.layers + config.mtp_layers):
            block = f"blk.{layer}"
            yield f"{block}.attn_norm.weight", (config.hidden,)
            yield f"{block}.post_attention_norm.weight", (config.hidden,)
            if layer < config.layers and config.recurrent[layer]:
                yield from self._delta(block)
            else:
                yield from self._attention(block)
            yield from self._experts(block)
            if layer >= config.layers:
                yield from self._prediction(block)

    def _attention(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self.config
        yield f"{block}.attn_q.weight", (config.heads * 2 * config.head_dim, config.hidden)
        for part in ("k", "v"):
            yield f"{block}.attn_{part}.weight", (config.kv_heads * config.head_dim, config.hidden)
        yield f"{block}.attn_q_norm.weight", (config.head_dim,)
        yield f"{block}.attn_k_norm.weight", (config.head_dim,)
        yield f"{block}.attn_output.weight", (config.hidden, config.heads * config.head_dim)

    def _delta(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self.config
        if self.has(f"{block}.ssm_in.weight") and not self.has(f"{block}.attn_qkv.weight"):
            rows = config.conv_channels + config.value_dim
            yield f"{block}.ssm_in.weight", (rows, config.hidden)
        else:
            yield f"{block}.attn_qkv.weight", (config.conv_channels, config.hidden)
            yield f"{block}.attn_gate.weight", (config.value_dim, config.hidden)
        yield f"{block}.ssm_ba.weight", (2 * config.value_heads, config.hidden)
        yield f"{block}.ssm_conv1d.weight", (config.conv_channels, config.conv_kernel)
        yield f"{block}.ssm_dt.bias", (config.value_heads,)
        yield f"{block}.ssm_a", (config.value_heads,)
        yield f"{block}.ssm_norm.weight", (config.state_size,)
        yield f"{block}.ssm_out.weight", (config.hidden, config.value_dim)

    def _experts(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self.config
        experts, width, shared = config.experts, config.expert_width, config.shared_width
        yield f"{block}.ffn_gate_inp.weight", (experts, config.hidden)
        if self.has(f"{block}.ffn_gate_up_exps.weight"):
            yield f"{block}.ffn_gate_up_exps.weight", (experts, 2 * width, config.hidden)
        else:
            yield f"{block}.ffn_gate_exps.weight", (experts, width, config.hidden)
            yield f"{block}.ffn_up_exps.weight", (experts, width, config.hidden)
        yield f"{block}.ffn_down_exps.weight", (experts, config.hidden, width)
        yield f"{block}.ffn_gate_inp_shexp.weight", (config.hidden,)
        yield f"{block}.ffn_gate_shexp.weight", (shared, config.hidden)
        yield f"{block}.ffn_up_shexp.weight", (shared, config.hidden)
        yield f"{block}.ffn_down_shexp.weight", (config.hidden, shared)

    def _prediction(self, block: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden = self.config.hidden
        yield f"{block}.nextn.eh_proj.weight", (hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            yield f"{block}.nextn.{norm}.weight", (hidden,)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without its sizes of 1, which do not change where anything lies."""
    return tuple(size for size in shape if size != 1)


def _spell(shape: tuple[int, ...]) -> str:
    return "(" + " x ".join(f"{size:,}" for size in shape) + ")"


def _private(nbytes: int) -> Array:
    """(nbytes,) uint8 of our own, aligned for vector loads."""
    memory = np.empty(nbytes + CACHE_LINE, np.uint8)
    begin = -int(memory.__array_interface__["data"][0]) % CACHE_LINE
    return memory[begin : begin + nbytes]
