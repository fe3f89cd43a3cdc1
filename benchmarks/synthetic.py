"""Write a Qwen3-Next GGUF file of the real width and any number of layers, with random weights.

For measuring speed: the widths, the tensor types, the routing and the size on disk are those of
Qwen3-Next-80B-A3B (hidden 2048, 512 experts of width 512, 10 of them used, 151,936 tokens); what it
says means nothing. Weights are cut at random places from pools of Gaussian weights that were really
quantized, so writing costs no more than the disk. Scales are those of `tools/random_checkpoint.py`.

With `--routing uniform` all experts are equally likely. With `--routing skewed` each layer prefers
some: embeddings share a direction, router rows hold random amounts of it, so that an expert's
logit gets a constant part of spread 2.35 beside the varying part of spread 2. A cache of the 64
least recently used of a layer's 512 experts then has 67 % of those that a token asks for, which is
what was reported for a model of this geometry. The preference is the same for every text; that of
a trained model is not.

    python -m benchmarks.synthetic synthetic.gguf --layers 8 --type Q4_K_M
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convert import header, metadata, names, recipe
from convert.hparams import HParams
from convert.partial import partial_file
from convert.tokens import TokenType, Vocabulary
from quant.format import Format
from quant.registry import FORMATS
from tools.random_checkpoint import MATRIX_GAIN, OUTPUT_GAIN, ROUTER_SPREAD
from tools.small_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, vocabulary

POOL_WEIGHTS = 1 << 23
PIECE = 8 << 20  # bytes written at a time
SKEWED_SPREAD = 2.35
SHARED_SHARE = 1.0
"""Size of the direction that skewed embeddings share, relative to what is their own."""
DIRECTION_LEFT = 0.62
"""About how much of the shared direction a layer's normalised input still holds."""
TO_STREAM = (
    "attn_output.weight",
    "ssm_out.weight",
    "ffn_down_exps.weight",
    "ffn_down_shexp.weight",
)


class _Everything:
    """A checkpoint that has any tensor it is asked for, expert stacks fused."""

    def __contains__(self, name: object) -> bool:
        return True


def hparams(layers: int, tokens: int = 151_936, experts: int = 512) -> HParams:
    """Those of Qwen3-Next-80B-A3B, but for the number of layers."""
    return HParams(
        layers=layers,
        context_length=262_144,
        hidden=2048,
        feed_forward=5120,
        vocabulary=tokens,
        tied=False,
        recurrent=tuple((layer + 1) % 4 != 0 for layer in range(layers)),
        full_attention_interval=4,
        heads=16,
        kv_heads=2,
        head_dim=256,
        rope_dimensions=64,
        rope_base=1e7,
        norm_epsilon=1e-6,
        experts=experts,
        experts_used=10,
        expert_width=512,
        shared_width=512,
        key_heads=16,
        value_heads=32,
        state_size=128,
        conv_kernel=4,
        mtp_layers=1,
    )


def tokenizer(size: int) -> dict[str, header.Value]:
    """Byte-level BPE of a few hundred tokens, filled up with ones that stand for nothing."""
    known, merges = vocabulary(512)
    tokens = [*known, *SPECIAL_TOKENS]
    types = [TokenType.NORMAL] * len(known) + [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    filler = size - len(tokens)
    tokens += [f"Ġ{number:06x}" for number in range(filler)]
    result = Vocabulary(
        "gpt2",
        "qwen2",
        tokens,
        [int(kind) for kind in types] + [int(TokenType.NORMAL)] * filler,
        merges=[f"{left} {right}" for left, right in merges],
        specials={"eos": tokens.index("<|im_end|>"), "padding": tokens.index("<|endoftext|>")},
    )
    return result.metadata() | {"tokenizer.chat_template": header.string(CHAT_TEMPLATE)}


def plan(shape: HParams, kind: str, mtp: bool) -> list[tuple[str, tuple[int, ...], Format]]:
    """(name, shape, format) of every tensor, in file order."""
    outputs = list(names.outputs(shape, _Everything(), "mtp." if mtp else None))
    blocks = shape.layers + mtp
    file_type = recipe.file_type(kind)
    sizes = [(output.name, output.shape) for output in outputs]
    queries_per_key = shape.heads // shape.kv_heads
    formats = recipe.choose(file_type, sizes, blocks, shape.experts, queries_per_key)
    return [(name, size, FORMATS[formats[name]]) for name, size in sizes]


class Writer:
    """Makes the bytes of each tensor."""

    def __init__(self, shape: HParams, skewed: bool, seed: int = 0) -> None:
        self.shape = shape
        self.skewed = skewed
        self.random = np.random.default_rng(seed)
        self._direction = self.random.choice(np.float32([-1, 1]), shape.hidden)
        self._pools: dict[tuple[str, int, float], np.ndarray] = {}

    def pieces(self, name: str, size: tuple[int, ...], format: Format) -> Iterator[bytes]:
        """The tensor's bytes, a piece at a time."""
        special = self._special(name)
        rows, columns = math.prod(size[:-1]), size[-1]
        if special is not None:
            yield _encode(format, special(rows, columns)).tobytes()
            return
        pool = (
            self._embeddings(format)
            if name == "token_embd.weight"
            else self._pool(
                format, columns, OUTPUT_GAIN if name.endswith(TO_STREAM) else MATRIX_GAIN
            )
        )
        row_bytes = pool.shape[1]
        at_once = max(1, PIECE // row_bytes)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            first = int(self.random.integers(len(pool)))
            while count > 0:
                part = pool[first : first + count]
                yield part.tobytes()
                count, first = count - len(part), 0

    def _pool(self, format: Format, columns: int, gain: float) -> np.ndarray:
        key = (format.name, columns, gain)
        if key not in self._pools:
            rows = max(1, POOL_WEIGHTS // columns)
            self._pools[key] = _encode(format, self._gaussian(rows, columns, gain / columns**0.5))
        return self._pools[key]

    def _embeddings(self, format: Format) -> np.ndarray:
        rows = self._gaussian(POOL_WEIGHTS // self.shape.hidden, self.shape.hidden, 1.0)
        if self.skewed:
            rows += np.float32(SHARED_SHARE) * self._direction
        return _encode(format, rows)

    def _gaussian(self, rows: int, columns: int, spread: float) -> np.ndarray:
        return self.random.standard_normal((rows, columns), np.float32) * np.float32(spread)

    def _special(self, name: str) -> Callable[[int, int], np.ndarray] | None:
        """How tensors that are not Gaussian matrices are made, by the end of the name."""
        if name.endswith("norm.weight"):
            return lambda rows, columns: 1 + self._gaussian(rows, columns, 0.1)
        if name.endswith("ffn_gate_inp.weight"):
            return self._router
        if name.endswith("ssm_a"):
            return lambda rows, columns: (
                -self.random.uniform(0.01, 16, (rows, columns)).astype(np.float32)
            )
        if name.endswith("ssm_dt.bias"):
            return self._time_step
        return None

    def _router(self, rows: int, columns: int) -> np.ndarray:
        router = self._gaussian(rows, columns, ROUTER_SPREAD / columns**0.5)
        if self.skewed:
            preference = self._gaussian(rows, 1, SKEWED_SPREAD / DIRECTION_LEFT / columns)
            router += preference * self._direction
        return router

    def _time_step(self, rows: int, columns: int) -> np.ndarray:
        step = np.exp(self.random.uniform(math.log(0.001), math.log(0.1), (rows, columns)))
        return np.log(np.expm1(step)).astype(np.float32)


def _encode(format: Format, values: np.ndarray) -> np.ndarray:
    """(rows, row bytes) uint8."""
    assert format.quantize is not None
    return format.quantize(values).view(np.uint8).reshape(len(values), -1)


def write(
    path: Path,
    layers: int = 8,
    kind: str = "Q4_K_M",
    mtp: bool = False,
    skewed: bool = False,
    shape: HParams | None = None,
    seed: int = 0,
) -> int:
    """Write the file; returns its size in bytes."""
    shape = shape or hparams(layers)
    tensors = plan(shape, kind, mtp)
    keys = (
        metadata.general(Path(f"Synthetic-{layers}-layers"), recipe.file_type(kind))
        | metadata.architecture(shape, mtp)
        | tokenizer(shape.vocabulary)
    )
    sizes = [
        (name, size, format.type_id, math.prod(size[:-1]) * format.row_bytes(size[-1]))
        for name, size, format in tensors
    ]
    writer = Writer(shape, skewed, seed)
    total = 0
    with partial_file(path, sum(nbytes for *_, nbytes in sizes)) as file:
        total += file.write(header.encode(keys, sizes))
        for (name, size, format), (_, _, _, nbytes) in zip(tensors, sizes, strict=True):
            written = sum(file.write(piece) for piece in writer.pieces(name, size, format))
            assert written == nbytes, name
            total += written + file.write(bytes(header.padding(nbytes)))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic model of the real width.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--type", dest="kind", default="Q4_K_M")
    parser.add_argument("--mtp", action="store_true", help="with the multi-token-prediction block")
    parser.add_argument("--routing", choices=("uniform", "skewed"), default="uniform")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    nbytes = write(
        arguments.output,
        arguments.layers,
        arguments.kind,
        arguments.mtp,
        arguments.routing == "skewed",
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - started
    rate = nbytes / seconds / 1e9
    print(f"{arguments.output}: {nbytes:,} bytes in {seconds:.1f} s ({rate:.2f} GB/s)")


if __name__ == "__main__":
    main()
