"""Calls of functions by their address inside compiled kernels."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import I64, element_type


def function_call(count: int, result: types.Type = types.none) -> Any:
    """An intrinsic calling the C function at an address: (address, `count` x int64) -> result."""
    integers = [types.int64] * count

    @intrinsic
    def call_address(typing: Any, address: Any, args: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            returned = ir.VoidType() if result is types.none else element_type(result)
            kind = ir.FunctionType(returned, [I64] * count)
            function = builder.inttoptr(values[0], kind.as_pointer())
            unpacked = [builder.extract_value(values[1], i) for i in range(count)]
            outcome = builder.call(function, unpacked)
            return context.get_dummy_value() if result is types.none else outcome

        return result(types.intp, types.UniTuple(types.int64, len(integers))), lower

    return call_address
