"""Functions that other processes can find by name and compile."""

from numba.core import types

from quant.jit import Compiled

SIGNATURE = types.int64(types.int64)


def _compiled(function):  # type: ignore[no-untyped-def]
    return Compiled(function, SIGNATURE)


@_compiled
def add_1(x: int) -> int:
    return x + 1


@_compiled
def add_2(x: int) -> int:
    return x + 2


@_compiled
def add_3(x: int) -> int:
    return x + 3


@_compiled
def add_4(x: int) -> int:
    return x + 4


@_compiled
def add_5(x: int) -> int:
    return x + 5


FUNCTIONS: list[Compiled] = [add_1, add_2, add_3, add_4, add_5]
SECOND: Compiled = add_2
