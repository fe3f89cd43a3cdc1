"""Words that threads share: int64 read, written, raised and exchanged at once."""

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from ondevice.kernels.simd import I64, on_x86


@intrinsic
def atomic_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at address; returns what was there before."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(types.intp, types.int64), lower


@intrinsic
def atomic_load(typing: Any, address: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.intp), lower


@intrinsic
def atomic_store(typing: Any, address: Any, value: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.none(types.intp, types.int64), lower


@intrinsic
def atomic_exchange(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store value at address if expected is there; whether it was."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        pair = builder.cmpxchg(pointer, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(types.intp, types.int64, types.int64), lower


pause = on_x86("llvm.x86.sse2.pause")
"""Tell the core that this is a spin loop."""
