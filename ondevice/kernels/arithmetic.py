"""Vector values in float arithmetic, and the folding of their lanes.

Folds combine halves until one lane is left, so that a sum is the same on every machine.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import (
    F32,
    FEATURES,
    I32,
    Vec,
    broadcast,
    call,
    constant,
    f32x16,
    i32x16,
    lane_mask,
    llvm_type,
    part,
)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; vectors or float32 scalars, b may be a scalar beside vectors."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, y, z = args
        if not isinstance(a, Vec):
            return call(builder, "llvm.fma.f32", F32, [x, y, z])
        if not isinstance(b, Vec):
            y = broadcast(builder, y, a.lanes)
        return call(builder, f"llvm.fma.v{a.lanes}f32", llvm_type(a), [x, y, z])

    if isinstance(a, Vec):
        return a(a, b if isinstance(b, Vec) else a.element, a), lower
    return types.float32(types.float32, types.float32, types.float32), lower


def _unary(name: str) -> Any:
    @intrinsic
    def unary(typing: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = llvm_type(value)
            return call(builder, f"llvm.{name}.v{value.lanes}f32", kind, list(args))

        return value(value), lower

    return unary


absolute = _unary("fabs")
nearest = _unary("roundeven")


def _choice(comparison: str) -> Any:
    @intrinsic
    def choose(typing: Any, a: Any, b: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(comparison, *args), *args)

        return a(a, a), lower

    return choose


# where a lane of b is NaN, so is the result; a NaN in a does not count
maximum = _choice(">")
minimum = _choice("<")


def fold(builder: ir.IRBuilder, value: ir.Value, combine: Callable[[Any, Any], Any]) -> ir.Value:
    """Halve a vector until one lane is left: a fixed tree, so the result is reproducible."""
    while value.type.count > 1:
        half = value.type.count // 2
        value = combine(part(builder, value, 0, half), part(builder, value, half, half))
    return builder.extract_element(value, constant(I32, 0))


@intrinsic
def lane_sum(typing: Any, value: Any) -> Any:
    """The sum of all lanes, added in a fixed tree."""
    is_float = isinstance(value.element, types.Float)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return fold(builder, args[0], builder.fadd if is_float else builder.add)

    return value.element(value), lower


@intrinsic
def lane_maximum(typing: Any, value: Any) -> Any:
    """The greatest lane."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def greater(a: Any, b: Any) -> Any:
            if a.type.count == 1:
                first = [builder.extract_element(x, constant(I32, 0)) for x in (a, b)]
                single = call(builder, "llvm.maxnum.f32", F32, first)
                return broadcast(builder, single, 1)
            return call(builder, f"llvm.maxnum.v{a.type.count}f32", a.type, [a, b])

        return fold(builder, args[0], greater)

    return value.element(value), lower


@intrinsic
def first_lanes(typing: Any, value: Any, count: Any, rest: Any) -> Any:
    """The first `count` lanes of a float vector, the number `rest` in the others."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        mask = lane_mask(builder, args[1], value.lanes)
        return builder.select(mask, args[0], broadcast(builder, args[2], value.lanes))

    return value(value, types.intp, value.element), lower


def _power_of_two(builder: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    biased = builder.add(exponent, broadcast(builder, constant(I32, 127), 16))
    bits = builder.shl(biased, broadcast(builder, constant(I32, 23), 16))
    return builder.bitcast(bits, llvm_type(f32x16))


@intrinsic
def power_of_two(typing: Any, exponent: Any) -> Any:
    """2 ** exponent for an i32x16 of exponents in -126 .. 127, as f32x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _power_of_two(builder, args[0])

    return f32x16(i32x16), lower


@intrinsic
def scale_by_power(typing: Any, value: Any, exponent: Any) -> Any:
    """value * 2 ** exponent; both are f32x16, exponents whole numbers in -126 .. 127."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "avx512f" in FEATURES:
            # value, exponent, what masked lanes get, mask, rounding as usual
            operands = [*args, args[0], constant(ir.IntType(16), -1), constant(I32, 4)]
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return call(builder, name, llvm_type(f32x16), operands)
        whole = builder.fptosi(args[1], llvm_type(i32x16))
        return builder.fmul(args[0], _power_of_two(builder, whole))

    return f32x16(f32x16, f32x16), lower


@intrinsic
def nearest_integers(typing: Any, value: Any) -> Any:
    """The nearest whole numbers, to even, of an f32x16, as i32x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.lrint.v16i32.v16f32", llvm_type(i32x16), args)

    return i32x16(f32x16), lower
