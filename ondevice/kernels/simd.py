"""Vector values inside compiled kernels.

LLVM's auto-vectoriser does not find int8 dot products, so kernels say what they mean: a `Vec` is
a Numba type for an LLVM vector (`u8x64` is 64 unsigned bytes), addresses are plain integers, and
intrinsics load, store and convert; shuffles.py and arithmetic.py combine and reduce. A vector wider
than the machine's registers is split by LLVM; only integer dot products choose instructions by
hand, see products.py.

Rules that every kernel relies on:
    loads and stores need no alignment
    float operations carry no fast-math flag: what is written is what is computed, in that order
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import errors, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from quant.processor import target

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

_TRIPLE, _, _features = target()
X86 = _TRIPLE.startswith(("x86_64", "i686"))
FEATURES = frozenset(name[1:] for name in _features.split(",") if name.startswith("+"))
"""What the compile target can do, in LLVM's names; honours NUMBA_CPU_FEATURES."""


class Vec(types.Type):
    """`lanes` values of Numba type `element` in one LLVM vector."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(name=f"vec<{element} x {lanes}>")


@register_model(Vec)
class VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend: Vec) -> None:
        super().__init__(manager, frontend, llvm_type(frontend))


def element_type(element: Any) -> ir.Type:
    """The LLVM type of a Numba number type."""
    bits = element.bitwidth
    if isinstance(element, types.Integer):
        return ir.IntType(bits)
    return {16: F16, 32: F32, 64: ir.DoubleType()}[bits]


def llvm_type(vec: Vec) -> ir.VectorType:
    return ir.VectorType(element_type(vec.element), vec.lanes)


u8x8, u8x16, u8x32, u8x64 = (Vec(types.uint8, n) for n in (8, 16, 32, 64))
i8x16, i8x32, i8x64 = (Vec(types.int8, n) for n in (16, 32, 64))
i16x8, i16x16, i16x32 = (Vec(types.int16, n) for n in (8, 16, 32))
u16x16 = Vec(types.uint16, 16)
u32x4, u32x8, u32x16 = (Vec(types.uint32, n) for n in (4, 8, 16))
i32x2, i32x4, i32x8, i32x16 = (Vec(types.int32, n) for n in (2, 4, 8, 16))
f32x4, f32x8, f32x16 = (Vec(types.float32, n) for n in (4, 8, 16))


# ---- building LLVM values ----


def constant(kind: ir.Type, value: Any) -> ir.Constant:
    return ir.Constant(kind, value)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """Call the LLVM intrinsic `name`, declaring it when this module does not know it yet."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [arg.type for arg in args])
        function = ir.Function(builder.module, kind, name)
    return builder.call(function, args)


def broadcast(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    undefined = constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, constant(I32, 0))
    return shuffle_lanes(builder, first, undefined, [0] * lanes)


def shuffle_lanes(
    builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: Sequence[int]
) -> ir.Value:
    return builder.shuffle_vector(
        a, b, constant(ir.VectorType(I32, len(lanes)), [constant(I32, lane) for lane in lanes])
    )


def part(builder: ir.IRBuilder, value: ir.Value, start: int, count: int) -> ir.Value:
    """Lanes start .. start + count of a vector."""
    return shuffle_lanes(builder, value, value, range(start, start + count))


def join(builder: ir.IRBuilder, pieces: Sequence[ir.Value]) -> ir.Value:
    """Equal vectors, a power of two of them, end to end."""
    values = list(pieces)
    while len(values) > 1:
        lanes = values[0].type.count * 2
        values = [
            shuffle_lanes(builder, values[i], values[i + 1], range(lanes))
            for i in range(0, len(values), 2)
        ]
    return values[0]


def load_from(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def store_to(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def vec_of(kind: types.Type) -> Vec:
    if isinstance(kind, types.TypeRef) and isinstance(kind.instance_type, Vec):
        return kind.instance_type
    raise errors.TypingError(f"a vector type is needed, not {kind}")


# ---- half floats ----

_HAS_HALVES = not X86 or "f16c" in FEATURES
"""Whether the machine converts halves; LLVM would call a function that Numba has not otherwise."""


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _filled(kind: ir.Type, value: Any) -> ir.Constant:
    if isinstance(kind, ir.VectorType):
        return constant(kind, [constant(kind.element, value)] * kind.count)
    return constant(kind, value)


def half_to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """float32 of the half (or vector of halves) whose bits are given as int16."""
    single = _like(bits.type, F32)
    if _HAS_HALVES:
        return builder.fpext(builder.bitcast(bits, _like(bits.type, F16)), single)
    words = _like(bits.type, I32)
    wide = builder.zext(bits, words)
    magnitude = builder.shl(builder.and_(wide, _filled(words, 0x7FFF)), _filled(words, 13))
    # the exponent is biased by 112 less; a product with a power of two also mends subnormals
    scaled = builder.fmul(builder.bitcast(magnitude, single), _filled(single, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, _filled(words, 0x7C00 << 13))
    infinite = builder.or_(magnitude, _filled(words, 0x7F800000))
    result = builder.select(special, infinite, builder.bitcast(scaled, words))
    sign = builder.shl(builder.and_(wide, _filled(words, 0x8000)), _filled(words, 16))
    return builder.bitcast(builder.or_(result, sign), single)


def float_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The bits, as int16, of the nearest half, to even, of a float32 or a vector of them."""
    short, words = _like(value.type, I16), _like(value.type, I32)
    if _HAS_HALVES:
        return builder.bitcast(builder.fptrunc(value, _like(value.type, F16)), short)
    bits = builder.bitcast(value, words)
    magnitude = builder.and_(bits, _filled(words, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _filled(words, 13)), _filled(words, 1))
    biased = builder.sub(magnitude, _filled(words, (112 << 23) - 0xFFF))
    normal = builder.lshr(builder.add(biased, odd), _filled(words, 13))
    # adding 0.5 leaves a subnormal half's bits at the low end, rounded
    moved = builder.fadd(builder.bitcast(magnitude, value.type), _filled(value.type, 0.5))
    subnormal = builder.sub(builder.bitcast(moved, words), _filled(words, 0x3F000000))
    is_nan = builder.icmp_unsigned(">", magnitude, _filled(words, 0x7F800000))
    large = builder.select(is_nan, _filled(words, 0x7E00), _filled(words, 0x7C00))
    small = builder.icmp_unsigned("<", magnitude, _filled(words, 113 << 23))
    result = builder.select(small, subnormal, normal)
    too_large = builder.icmp_unsigned(">=", magnitude, _filled(words, 0x47800000))
    result = builder.select(too_large, large, result)
    sign = builder.and_(builder.lshr(bits, _filled(words, 16)), _filled(words, 0x8000))
    return builder.trunc(builder.or_(result, sign), short)


# ---- operators ----

_INTEGER = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.and_: "and_",
    operator.or_: "or_",
    operator.xor: "xor",
}
_FLOAT = {
    operator.add: "fadd",
    operator.sub: "fsub",
    operator.mul: "fmul",
    operator.truediv: "fdiv",
}
_IN_PLACE = {
    operator.add: operator.iadd,
    operator.sub: operator.isub,
    operator.mul: operator.imul,
    operator.or_: operator.ior,
    operator.and_: operator.iand,
}


def _register_operator(spelling: Any, meaning: Any) -> None:
    @infer_global(spelling)
    class Template(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, Any]) -> Any:
            if len(args) == 2 and isinstance(args[0], Vec):
                if args[1] == args[0]:
                    return signature(args[0], args[0], args[0])
                if isinstance(args[1], types.Number):
                    return signature(args[0], args[0], args[0].element)
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vec, (a, b) = sig.args[0], args
        if not isinstance(sig.args[1], Vec):
            b = broadcast(builder, b, vec.lanes)
        table = _FLOAT if isinstance(vec.element, types.Float) else _INTEGER
        return getattr(builder, table[meaning])(a, b)

    lower_builtin(spelling, Vec, Vec)(lower)
    lower_builtin(spelling, Vec, types.Number)(lower)


for _meaning in _INTEGER | _FLOAT:
    _register_operator(_meaning, _meaning)
    if _meaning in _IN_PLACE:
        _register_operator(_IN_PLACE[_meaning], _meaning)


def _register_shift(spelling: Any) -> None:
    @infer_global(spelling)
    class Template(AbstractTemplate):
        def generic(self, args: tuple[types.Type, ...], kws: dict[str, Any]) -> Any:
            if len(args) == 2 and isinstance(args[0], Vec) and isinstance(args[1], types.Integer):
                return signature(args[0], args[0], args[0].element)
            return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        vec = sig.args[0]
        amount = broadcast(builder, args[1], vec.lanes)
        if spelling is operator.lshift:
            return builder.shl(args[0], amount)
        return (builder.ashr if vec.element.signed else builder.lshr)(args[0], amount)

    lower_builtin(spelling, Vec, types.Integer)(lower)


_register_shift(operator.lshift)
_register_shift(operator.rshift)


@intrinsic
def funnel(typing: Any, upper: Any, lower: Any, count: Any) -> Any:
    """The lower half of each element of `upper`, `lower` behind it, shifted right by `count`."""

    def lower_it(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        amount = builder.trunc(args[2], kind.element)
        name = f"llvm.fshr.v{kind.count}i{kind.element.width}"
        return call(builder, name, kind, [args[0], args[1], broadcast(builder, amount, kind.count)])

    return upper(upper, lower, types.int64), lower_it


# ---- memory ----


@intrinsic
def load(typing: Any, kind: Any, address: Any) -> Any:
    """load(u8x64, address): a vector from memory."""
    vec = vec_of(kind)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_from(builder, args[1], llvm_type(vec))

    return vec(kind, types.intp), lower


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """store(address, vector)."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        store_to(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.none(types.intp, value), lower


@intrinsic
def stream(typing: Any, address: Any, value: Any) -> Any:
    """store(address, vector) past the caches, on x86; address is a multiple of 64.

    Memory is then not read for what is overwritten. Other threads see it after `streams_end`.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], args[1].type.as_pointer())
        stored = builder.store(args[1], place, align=64)
        if X86:
            stored.set_metadata("nontemporal", builder.module.add_metadata([constant(I32, 1)]))
        return context.get_dummy_value()

    return types.none(types.intp, value), lower


def on_x86(name: str) -> Any:
    """An intrinsic without arguments: the LLVM intrinsic `name` on x86, nothing elsewhere."""

    @intrinsic
    def emit(typing: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if X86:
                call(builder, name, ir.VoidType(), [])
            return context.get_dummy_value()

        return types.none(), lower

    return emit


streams_end = on_x86("llvm.x86.sse.sfence")
"""What was streamed comes before all that is stored from here on."""


def lane_mask(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    numbers = constant(ir.VectorType(I64, lanes), [constant(I64, i) for i in range(lanes)])
    return builder.icmp_signed("<", numbers, broadcast(builder, count, lanes))


def _all_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    return builder.icmp_signed(">=", count, constant(I64, lanes))


@intrinsic
def load_some(typing: Any, address: Any, count: Any) -> Any:
    """The first min(count, 16) floats at address in an f32x16, zero in the other lanes."""
    kind = llvm_type(f32x16)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = []
        with builder.if_else(_all_lanes(builder, args[1], 16)) as (every, some):
            with every:
                values.append((load_from(builder, args[0], kind), builder.block))
            with some:
                pointer = builder.inttoptr(args[0], kind.as_pointer())
                mask = lane_mask(builder, args[1], 16)
                rest = [pointer, constant(I32, 1), mask, constant(kind, None)]
                value = call(builder, "llvm.masked.load.v16f32.p0", kind, rest)
                values.append((value, builder.block))
        result = builder.phi(kind)
        for value, block in values:
            result.add_incoming(value, block)
        return result

    return f32x16(types.intp, types.intp), lower


@intrinsic
def store_some(typing: Any, address: Any, value: Any, count: Any) -> Any:
    """Store the first min(count, 16) lanes of an f32x16.

    Whole vectors go by a store without mask. One with a mask takes AMD's processors with AVX2 a
    dozen cycles, and ARM's, which have none, over a hundred instructions.
    """
    kind = llvm_type(f32x16)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.if_else(_all_lanes(builder, args[2], 16)) as (every, some):
            with every:
                store_to(builder, args[0], args[1])
            with some:
                pointer = builder.inttoptr(args[0], kind.as_pointer())
                rest = [args[1], pointer, constant(I32, 1), lane_mask(builder, args[2], 16)]
                call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), rest)
        return context.get_dummy_value()

    return types.none(types.intp, f32x16, types.intp), lower


def _scalar_load(result: types.Type, convert: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def scalar_load(typing: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return convert(builder, args[0])

        return result(types.intp), lower

    return scalar_load


load_i64 = _scalar_load(types.int64, lambda b, p: load_from(b, p, I64))
load_i32 = _scalar_load(types.int64, lambda b, p: b.sext(load_from(b, p, I32), I64))
load_u32 = _scalar_load(types.uint32, lambda b, p: load_from(b, p, I32))
load_u8 = _scalar_load(types.int64, lambda b, p: b.zext(load_from(b, p, I8), I64))
load_i8 = _scalar_load(types.int64, lambda b, p: b.sext(load_from(b, p, I8), I64))
load_f32 = _scalar_load(types.float32, lambda b, p: load_from(b, p, F32))
load_f64 = _scalar_load(types.float64, lambda b, p: load_from(b, p, ir.DoubleType()))
load_f16 = _scalar_load(types.float32, lambda b, p: half_to_float(b, load_from(b, p, I16)))
load_bf16 = _scalar_load(
    types.float32,
    lambda b, p: b.bitcast(b.shl(b.zext(load_from(b, p, I16), I32), constant(I32, 16)), F32),
)


def _scalar_store(kind: types.Type, convert: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def scalar_store(typing: Any, address: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            store_to(builder, args[0], convert(builder, args[1]))
            return context.get_dummy_value()

        return types.none(types.intp, kind), lower

    return scalar_store


store_f32 = _scalar_store(types.float32, lambda b, x: x)
store_f16 = _scalar_store(types.float32, float_to_half)
store_i64 = _scalar_store(types.int64, lambda b, x: x)
store_i32 = _scalar_store(types.int64, lambda b, x: b.trunc(x, I32))
store_i8 = _scalar_store(types.int64, lambda b, x: b.trunc(x, I8))
store_i16 = _scalar_store(types.int64, lambda b, x: b.trunc(x, I16))


@intrinsic
def load_halves(typing: Any, address: Any) -> Any:
    """16 IEEE halves at address as an f32x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return half_to_float(builder, load_from(builder, args[0], ir.VectorType(I16, 16)))

    return f32x16(types.intp), lower


@intrinsic
def load_bfloats(typing: Any, address: Any) -> Any:
    """16 bfloat16 at address as an f32x16."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = ir.VectorType(I32, 16)
        bits = builder.zext(load_from(builder, args[0], ir.VectorType(I16, 16)), words)
        shift = broadcast(builder, constant(I32, 16), 16)
        return builder.bitcast(builder.shl(bits, shift), llvm_type(f32x16))

    return f32x16(types.intp), lower


def _narrow_store(kind: ir.IntType) -> Any:
    @intrinsic
    def narrow_store(typing: Any, address: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            store_to(builder, args[0], builder.trunc(args[1], ir.VectorType(kind, 16)))
            return context.get_dummy_value()

        return types.none(types.intp, i32x16), lower

    return narrow_store


store_bytes = _narrow_store(I8)
"""Store the 16 lanes of an i32x16 as 16 bytes; each must fit an int8."""
store_words = _narrow_store(I16)
"""Store the 16 lanes of an i32x16 as 16 int16; each must fit."""


def ask_for(builder: Any, address: Any, locality: int) -> None:
    """A read that is to come: locality 3 is the first-level cache, 2 the second."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    flags = [constant(I32, value) for value in (0, locality, 1)]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *flags])


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at address in the second-level cache."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ask_for(builder, args[0], 2)
        return context.get_dummy_value()

    return types.none(types.intp), lower


@intrinsic
def prefetch_near(typing: Any, address: Any) -> Any:
    """Ask for the cache line at address in the first-level cache."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ask_for(builder, args[0], 3)
        return context.get_dummy_value()

    return types.none(types.intp), lower


# ---- values ----


@intrinsic
def zero(typing: Any, kind: Any) -> Any:
    """zero(f32x16): all lanes 0."""
    vec = vec_of(kind)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant(llvm_type(vec), None)

    return vec(kind), lower


@intrinsic
def splat(typing: Any, kind: Any, value: Any) -> Any:
    """splat(f32x16, x): x in all lanes."""
    vec = vec_of(kind)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return broadcast(builder, args[1], vec.lanes)

    return vec(kind, vec.element), lower


@intrinsic
def convert(typing: Any, kind: Any, value: Any) -> Any:
    """convert(f32x16, v): the same numbers in another element type (towards zero for ints)."""
    vec = vec_of(kind)
    source: Any = value.element
    target_element: Any = vec.element
    is_float, was_float = (isinstance(e, types.Float) for e in (vec.element, source))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target = llvm_type(vec)
        if is_float:
            return (builder.sitofp if source.signed else builder.uitofp)(args[1], target)
        if was_float:
            return builder.fptosi(args[1], target)
        if source.bitwidth < target_element.bitwidth:
            return (builder.sext if source.signed else builder.zext)(args[1], target)
        return builder.trunc(args[1], target)

    return vec(kind, value), lower


@intrinsic
def bitcast(typing: Any, kind: Any, value: Any) -> Any:
    """bitcast(u8x16, v): the same bits as another vector of equal size."""
    vec = vec_of(kind)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[1], llvm_type(vec))

    return vec(kind, value), lower
