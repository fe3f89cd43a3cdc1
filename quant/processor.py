"""What the compiler takes the processor for.

LLVM asks the operating system what an x86 processor can do and is right. On ARM it guesses from
the CPU's name: the int8 dot products (`dotprod`: sdot, `i8mm`: smmla) are missing from its answer
where the name is unknown, and code that uses them then aborts the compiler. There the kernel's own
list is asked: the auxiliary vector on Linux (asm/hwcap.h of arm64), sysctl on macOS. Numba's
NUMBA_CPU_NAME and NUMBA_CPU_FEATURES win over all of it.
"""

import ctypes
import functools
import sys
from typing import Any

import llvmlite.binding
import numba
from numba.core.registry import cpu_target

AT_HWCAP, AT_HWCAP2 = 16, 26
_HWCAPS = {"dotprod": (AT_HWCAP, 1 << 20), "i8mm": (AT_HWCAP2, 1 << 13)}
_SYSCTLS = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "i8mm": b"hw.optional.arm.FEAT_I8MM"}


def is_arm(triple: str) -> bool:
    """Whether an LLVM target triple means 64-bit ARM."""
    return triple.startswith(("aarch64", "arm64"))


def dot_products() -> dict[str, bool] | None:
    """Whether this ARM processor has `dotprod` and `i8mm`; None where nobody can be asked."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None)
    if sys.platform == "darwin":
        return {name: _sysctl(library, key) != 0 for name, key in _SYSCTLS.items()}
    if not hasattr(library, "getauxval"):
        return None
    ask = library.getauxval
    ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return {name: ask(word) & bit != 0 for name, (word, bit) in _HWCAPS.items()}


def _sysctl(library: ctypes.CDLL, key: bytes) -> int:
    """The integer that macOS keeps under a name; 0 for a name that it does not know."""
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    pointers = ctypes.byref(value), ctypes.byref(size)
    known = library.sysctlbyname(key, *pointers, None, ctypes.c_size_t(0)) == 0
    return value.value if known else 0


def _choose_features() -> None:
    """Put LLVM's answer right, before Numba compiles anything."""
    config: Any = numba.config
    chosen = config.CPU_NAME is not None or config.CPU_FEATURES is not None
    if chosen or not is_arm(llvmlite.binding.get_process_triple()):
        return
    found = dot_products()
    if found is not None:
        features = {**llvmlite.binding.get_host_cpu_features(), **found}
        config.CPU_FEATURES = ",".join("-+"[has] + name for name, has in sorted(features.items()))


@functools.cache
def target() -> tuple[str, str, str]:
    """(triple, CPU name, features) that Numba compiles for, in LLVM's words.

    The first call settles it for the process; an application that compiled with Numba before has
    settled it already.
    """
    _choose_features()
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features
