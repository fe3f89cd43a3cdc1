"""What the products of all formats share: choosing a format's code, and where a token's rows are.

A loop nest is written once per family of formats and takes a `Layout` as its first argument. A
layout is a Numba type, so `unpack(layout, ...)` is resolved while compiling, and, unlike a
function passed as an argument, leaves machine code that can be kept on disk.
"""

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import overload

from ondevice.kernels.simd import load_i32
from quant.jit import inner

ROWS = 8
"""Weight rows unpacked together, so that each token's activations are used that often."""


class Layout(types.Type):
    """A block format as a compile-time constant."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"layout<{name}>")


class ByLayout:
    """Functions with one implementation for each layout, chosen while compiling."""

    def __init__(self, generic: Callable[..., None]) -> None:
        self._implementations: dict[Any, Callable[..., Any]] = {}

        def choose(layout: Any, *arguments: Any) -> Callable[..., Any] | None:
            return self._implementations.get(getattr(layout, "instance_type", None))

        overload(generic, strict=False, jit_options={"error_model": "numpy"})(choose)

    def register(self, layout: Layout) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate the implementation for `layout`."""

        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            self._implementations[layout] = function
            return function

        return keep


@inner
def row_at(base: int, row_bytes: int, index: int, token: int) -> int:
    """Address of token's row, looked up in `index` unless that is 0."""
    if index != 0:
        return base + load_i32(index + 4 * token) * row_bytes
    return base + token * row_bytes
