"""Several rows at once: ROWS vectors held in registers, one for each row of a small matrix product.

What is loaded once meets every row: `fma_rows(sums, x, address, stride)` adds to row r the vector
x times the number at address + r * stride. Rows are LLVM arrays of f32x16; ROWS is as many as leave
the sums of two vectors per row in the registers of this machine.
"""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import (
    F32,
    FEATURES,
    I64,
    broadcast,
    call,
    constant,
    f32x16,
    llvm_type,
    load_from,
    store_to,
)

ROWS = 8 if "avx512f" in FEATURES else 4
ROWS_TYPE = types.UniTuple(f32x16, ROWS)


def _at(builder: ir.IRBuilder, address: Any, stride: Any, row: int) -> Any:
    return builder.add(address, builder.mul(stride, constant(I64, row)))


def _number(builder: ir.IRBuilder, address: Any) -> Any:
    """The float at address in all lanes."""
    return broadcast(builder, load_from(builder, address, F32), 16)


@intrinsic
def zero_rows(typing: Any) -> Any:
    """Rows of zeros."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(context.get_value_type(ROWS_TYPE), None)

    return ROWS_TYPE(), lower


@intrinsic
def load_rows(typing: Any, address: Any, stride: Any) -> Any:
    """16 floats of each row."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = constant(context.get_value_type(ROWS_TYPE), ir.Undefined)
        for row in range(ROWS):
            at = _at(builder, *args, row)
            result = builder.insert_value(result, load_from(builder, at, llvm_type(f32x16)), row)
        return result

    return ROWS_TYPE(types.int64, types.int64), lower


@intrinsic
def store_rows(typing: Any, address: Any, stride: Any, rows: Any) -> Any:
    """Store the 16 floats of each row."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for row in range(ROWS):
            at = _at(builder, args[0], args[1], row)
            store_to(builder, at, builder.extract_value(args[2], row))
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, ROWS_TYPE), lower


@intrinsic
def fma_rows(typing: Any, rows: Any, x: Any, address: Any, stride: Any) -> Any:
    """Each row + x times the row's number, the floats at address, address + stride, ..."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = args[0]
        for row in range(ROWS):
            number = _number(builder, _at(builder, args[2], args[3], row))
            operands = [args[1], number, builder.extract_value(args[0], row)]
            total = call(builder, "llvm.fma.v16f32", llvm_type(f32x16), operands)
            result = builder.insert_value(result, total, row)
        return result

    return ROWS_TYPE(ROWS_TYPE, f32x16, types.int64, types.int64), lower


@intrinsic
def scale_rows(typing: Any, rows: Any, address: Any, stride: Any) -> Any:
    """Each row times its number."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = args[0]
        for row in range(ROWS):
            number = _number(builder, _at(builder, args[1], args[2], row))
            product = builder.fmul(builder.extract_value(args[0], row), number)
            result = builder.insert_value(result, product, row)
        return result

    return ROWS_TYPE(ROWS_TYPE, types.int64, types.int64), lower
