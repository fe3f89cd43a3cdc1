"""Which block format each tensor gets, the same as llama.cpp's quantizer chooses.

Established from llama.cpp's published behaviour (llama-quantize, October 2026) and held to it by a
test that runs the real one. In its words:

* Only matrices whose name ends in `weight` are quantized; norms, routers and ssm_conv1d stay F32.
* A file type has a base format. `more_bits(i, n)` picks the first eighth, the last eighth and every
  third block between; there ffn_down and the attn_v-like tensors (attn_v, and DeltaNet's attn_qkv)
  of Q4_K_M and Q5_K_M get Q6_K. i counts attn_v-like tensors in file order; for ffn_down it is the
  block number. n includes the MTP block.
* Q4_K_S: Q5_K for the first four attn_v-like tensors and the first eighth of ffn_down.
* IQ4_NL and IQ4_XS: Q5_K for the attn_v-like tensors where four or more query heads share a key
  head, and for the first eighth of ffn_down.
* MXFP4_MOE: MXFP4 for the stacks of experts, Q8_0 for the rest.
* The output matrix (token_embd when it is tied) gets Q6_K, in a Q8_0 or MXFP4_MOE file Q8_0.
* Models with exactly 8 experts: attn_v and attn_k Q8_0; attn_output Q5_K where the base format is
  Q4_K, IQ4_NL or IQ4_XS.
* A row that is not a whole number of 256-blocks falls back to a format of 32: Q4_K -> Q5_0,
  Q5_K -> Q5_1, Q6_K -> Q8_0, IQ4_XS -> IQ4_NL; one that is not a whole number of 32-blocks to F16.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quant.errors import UsageError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileType:
    """A whole file's mix: its number in `general.file_type` and its base format."""

    name: str
    number: int
    base: str

    @property
    def quantized(self) -> bool:
        return self.base not in ("F32", "F16", "BF16")


_TYPES = (
    FileType("F32", 0, "F32"),
    FileType("F16", 1, "F16"),
    FileType("BF16", 32, "BF16"),
    FileType("Q8_0", 7, "Q8_0"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("Q5_K_M", 17, "Q5_K"),
    FileType("Q4_K_M", 15, "Q4_K"),
    FileType("Q4_K_S", 14, "Q4_K"),
    FileType("IQ4_NL", 25, "IQ4_NL"),
    FileType("IQ4_XS", 30, "IQ4_XS"),
    FileType("MXFP4_MOE", 38, "Q8_0"),
    FileType("Q4_0", 2, "Q4_0"),
)
FILE_TYPES = {file_type.name: file_type for file_type in _TYPES}
_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_FOUR_BITS = ("Q4_K", "IQ4_NL", "IQ4_XS")
_NOT_QUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d")


def file_type(name: str) -> FileType:
    """The file type called `name`, in any case; Q4_K, Q5_K and MXFP4 mean the mixes of them."""
    upper = name.upper()
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise UsageError(f"type {name!r} is unknown; choose one of {', '.join(FILE_TYPES)}")
    return found


def more_bits(index: int, count: int) -> bool:
    """Whether block `index` of `count` is one of the sensitive half."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _block_number(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _is_value_like(name: str) -> bool:
    return "attn_qkv.weight" in name or "attn_v.weight" in name


def _axes(shape: Shape) -> int:
    """Axes as the file format counts them: leading axes of length 1 do not count."""
    return next((len(shape) - i for i, size in enumerate(shape) if size > 1), 1)


def is_quantized(name: str, shape: Shape) -> bool:
    """Whether a file type's base format applies to this tensor at all; if not it stays F32."""
    return (
        _axes(shape) >= 2
        and name.endswith("weight")
        and not any(part in name for part in _NOT_QUANTIZED)
    )


def _length(name: str) -> int:
    """Weights per block of a format."""
    return 256 if name.endswith(("_K", "_XS")) else 32


def _fallback(name: str, columns: int) -> str:
    length = _length(name)
    if columns % length == 0:
        return name
    name = _FALLBACK.get(name, name)
    return name if columns % 32 == 0 else "F16"


def choose(
    kind: FileType,
    tensors: Iterable[tuple[str, Shape]],
    blocks: int,
    experts: int,
    queries_per_key: int,
) -> dict[str, str]:
    """The format name of every tensor; `blocks` counts the MTP block too.

    `queries_per_key` is the number of query heads that share a key head.
    """
    ordered = sorted(tensors, key=lambda item: (_block_number(item[0]), item[0]))
    tied = all(name != "output.weight" for name, _ in ordered)
    values = sum(_is_value_like(name) for name, _ in ordered)
    seen = 0
    formats = {}
    for name, shape in ordered:
        if not is_quantized(name, shape):
            formats[name] = "F32"
        elif not kind.quantized:
            formats[name] = kind.base
        else:
            chosen = kind.base
            if name == "output.weight" or (tied and name == "token_embd.weight"):
                chosen = _output_format(kind, shape[-1])
            elif _is_value_like(name):
                chosen = _value_format(kind, seen, values, experts, queries_per_key)
                seen += 1
            elif kind.name == "MXFP4_MOE" and _axes(shape) == 3:
                chosen = "MXFP4"
            elif "ffn_down" in name:
                chosen = _down_format(kind, _block_number(name), blocks)
            elif experts == 8 and "attn_k.weight" in name:
                chosen = "Q8_0"
            elif experts == 8 and "attn_output.weight" in name and kind.base in _FOUR_BITS:
                chosen = "Q5_K"
            formats[name] = _fallback(chosen, shape[-1])
    return formats


def _output_format(kind: FileType, columns: int) -> str:
    return "Q8_0" if kind.base == "Q8_0" or columns % _length(kind.base) else "Q6_K"


def _value_format(
    kind: FileType, index: int, count: int, experts: int, queries_per_key: int
) -> str:
    if experts == 8:
        return "Q8_0"
    if kind.name in ("Q4_K_M", "Q5_K_M") and more_bits(index, count):
        return "Q6_K"
    if kind.name == "Q4_K_S" and index < 4:
        return "Q5_K"
    if kind.base in ("IQ4_NL", "IQ4_XS") and queries_per_key >= 4:
        return "Q5_K"
    return kind.base


def _down_format(kind: FileType, block: int, blocks: int) -> str:
    if kind.name in ("Q4_K_M", "Q5_K_M") and more_bits(block, blocks):
        return "Q6_K"
    if kind.name in ("Q4_K_S", "IQ4_NL", "IQ4_XS") and block < blocks // 8:
        return "Q5_K"
    return kind.base
