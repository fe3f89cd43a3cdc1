"""What a block format is: a name, the bytes of one block, and the way to floats and back.

A row of `columns` weights is stored as columns / length blocks, one after the other; blocks never
cross rows. `quant.registry` lists the formats, each in a file of its own.

Encoders take finite float32. They are deterministic, release the GIL, and give the same bytes
however the rows are cut into calls. A value beyond the largest one a format can hold is stored as
that largest value: a finite weight never becomes infinite.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant.errors import Error

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Format:
    """One way to store weights."""

    name: str
    """As GGUF spells it: "Q4_K"."""
    type_id: int
    """The ggml type number that stands in GGUF files."""
    block: np.dtype[Any]
    """The bytes of one block."""
    length: int
    """Weights per block."""
    dequantize: Callable[[Array], Array]
    """(..., n) blocks -> (..., n * length) float32, a new array."""
    quantize: Callable[[Array], Array] | None
    """(..., n * length) float32 -> (..., n) blocks, a new array; None: the format is read-only."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; Error unless they fill whole blocks."""
        if columns % self.length:
            raise Error(
                f"a row of {columns} weights cannot be {self.name}: "
                f"that needs a multiple of {self.length}"
            )
        return columns // self.length * self.block.itemsize

    def blocks(self, raw: Array) -> Array:
        """(..., nbytes) uint8 -> (..., n) blocks, a view; Error unless they are whole blocks."""
        if raw.shape[-1] % self.block.itemsize:
            raise Error(
                f"{raw.shape[-1]} bytes per row cannot be {self.name}: "
                f"that needs a multiple of {self.block.itemsize}"
            )
        return raw.view(self.block)


def encode(
    kernel: Callable[[Array, Array], None], values: Array, block: np.dtype[Any], length: int
) -> Array:
    """Run an encoder of `quant.encoders`: values (..., n * length) float32 -> (..., n) blocks."""
    if values.shape[-1] % length:
        raise Error(f"a row of {values.shape[-1]} weights does not fill blocks of {length}")
    source = np.ascontiguousarray(values, np.float32).reshape(-1, length).view()
    source.flags.writeable = False  # one compiled version serves mapped and private input
    out = np.empty((len(source), block.itemsize), np.uint8)
    kernel(source, out)
    return out.view(block).reshape(*values.shape[:-1], values.shape[-1] // length)
