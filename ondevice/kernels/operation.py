"""Turning a Python function into a kernel that other machine code calls by address.

Every kernel of a program has the C signature

    void kernel(int64 operation, int64 step, int64 task, int64 scratch)

and is compiled when a program first uses it, so a model pays only for the kernels and block
formats that its file needs. Calls by address keep kernels out of each other's compilation units:
an interpreter over any number of kernels compiles in no time, and each is cached on its own.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba.core import types
from numba.core.ccallback import CFunc

from quant.jit import CodeCache, Compiled, Kernel


class CompiledFunction(Compiled):
    """A function of `count` int64 arguments with a C address; compiled on first use."""

    kind = "c"

    def __init__(self, function: Callable[..., Any], count: int) -> None:
        super().__init__(function, types.void(*[types.int64] * count))
        self.count = count

    @cached_property
    def code(self) -> Any:
        options = {name: value for name, value in self.options.items() if name != "nogil"}
        compiled: Any = CFunc(
            self.function, self.signature, locals={}, options=options, pipeline_class=Kernel
        )
        compiled._cache = CodeCache(self.function, self.kind)
        compiled.compile()
        return compiled

    @property
    def address(self) -> int:
        """Where the machine code begins."""
        return int(self.code.address)

    def __call__(self, *arguments: int) -> None:
        """Call it from Python, for tests: every argument an int."""
        self.code.ctypes(*arguments)


def operation(function: Callable[[int, int, int, int], None]) -> CompiledFunction:
    """A kernel that a program can hold: (operation record, step record, task, scratch)."""
    return CompiledFunction(function, 4)


def row_kernel(function: Callable[..., None]) -> CompiledFunction:
    """A per-format product of weight rows with tokens; arguments as in `dot`."""
    return CompiledFunction(function, 12)


def expand_kernel(function: Callable[[int, int, int], None]) -> CompiledFunction:
    """A per-format expansion of one row of blocks: (blocks, columns, f32 out)."""
    return CompiledFunction(function, 3)
