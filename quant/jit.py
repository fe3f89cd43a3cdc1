"""How every Numba function of this project is compiled, and where the machine code is kept.

Numba's own disk cache does not notice an edit in another file than the one that defines a function,
trusts whatever lies in its folder, and fails on a damaged file. So machine code goes through
`quant.code_folder`, into a folder named after a hash of all kernel sources, the compiler's version
and settings, and the CPU: an edit, an upgrade or another machine means a new folder. Where no
private folder can be had, functions are compiled in memory and the program says so once.
"""

import functools
import hashlib
import os
import pickle
import platform
import sys
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import _dynfunc  # type: ignore[attr-defined]
from numba.core import sigutils
from numba.core.caching import NullCache
from numba.core.compiler import Compiler, CompileResult
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from quant.code_folder import CodeFolder
from quant.errors import Error
from quant.processor import target

OLDEST_NUMBA = (0, 68)
VECTOR = 64
"""Bytes of the longest vector."""
_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = sorted([*_ROOT.glob("quant/*.py"), *_ROOT.glob("ondevice/kernels/**/*.py")])
_SETTINGS = ("CPU_NAME", "CPU_FEATURES", "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK")

if numba.version_info.short < OLDEST_NUMBA:
    raise Error(
        f"numba {numba.__version__} is too old: {'.'.join(map(str, OLDEST_NUMBA))} is needed "
        "(pip install --upgrade numba)"
    )


def source_hash() -> str:
    """12 hex digits naming this set of kernel sources, compiler versions and target CPU."""
    digest = hashlib.sha256()
    for path in _SOURCES:
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    if not _SOURCES:  # frozen into one file
        status = Path(sys.executable).stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for part in (
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
        *target(),
        *(str(getattr(numba.config, name, None)) for name in _SETTINGS),
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _open_folder() -> CodeFolder | None:
    folder = CodeFolder.open(f"kernels-{source_hash()}")
    if folder is None:
        warnings.warn(
            "no private cache folder: kernels are compiled again at every start",
            RuntimeWarning,
            stacklevel=2,
        )
    return folder


FOLDER = _open_folder()


def versions() -> dict[str, str]:
    """Those of the compiler's parts."""
    return {"numba": numba.__version__, "llvmlite": llvmlite.__version__}


def target_name() -> str:
    """The processor that code is compiled for, in LLVM's words."""
    return str(cpu_target.target_context.codegen().magic_tuple()[1])


class CodeCache(NullCache):
    """What Numba asks for the machine code of one function; `kind` sets uses of it apart."""

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        self._function = function
        self._kind = kind

    @property
    def cache_path(self) -> str | None:
        return str(FOLDER.path) if FOLDER else None

    def name(self, signature: Any) -> str:
        """The entry for these argument types."""
        code = self._function.__code__
        parts = (
            str(getattr(signature, "args", signature)),
            cpu_target.target_context.codegen().magic_tuple(),
            _file_hash(code.co_filename),
            code.co_firstlineno,
            code.co_code,
        )
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        name = f"{self._function.__module__}.{self._function.__qualname__}"
        return f"{name.replace('<', '').replace('>', '')}-{self._kind}-{digest}"

    def load_overload(self, signature: Any, target: Any) -> Any:
        if FOLDER is None or self._function.__closure__:
            return None
        name = self.name(signature)
        data = FOLDER.read(name)
        if data is None:
            return None
        rtsys.initialize(target)  # of all that compiling needs, loading needs no more than this
        try:
            return CompileResult._rebuild(target, *pickle.loads(data))
        except Exception:  # signed by us, and yet not for this Numba
            FOLDER.discard(name)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        cachable = not (self._function.__closure__ or result.lifted)
        if FOLDER is not None and cachable and not result.library.has_dynamic_globals:
            FOLDER.write(self.name(signature), dumps(result._reduce()))


@functools.cache
def _file_hash(path: str) -> str:
    """Of the file that defines a function, which may be none of ours."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return f"none {os.getpid()}"


class Kernel(Compiler):
    """Lets a function begin on a whole vector of the stack.

    LLVM keeps there what the registers have no room for, and would take vectors of 32 and 64 bytes
    to any multiple of 16, as it comes: one that crosses two pages takes as long as dozens of
    products, in some threads and not in others.
    """

    def _compile_bytecode(self) -> Any:
        state = self.state
        library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        add = library.add_ir_module

        def add_aligned(module: Any) -> None:
            for function in module.functions:
                if not function.is_declaration:
                    function.attributes.alignstack = VECTOR
                    function.attributes.add("nounwind")  # without a name none is written
            add(module)

        library.add_ir_module = add_aligned
        library.enable_object_caching()
        state.library = library
        result = super()._compile_bytecode()
        del library.add_ir_module
        return result


class Compiled:
    """A function of fixed argument types: compiled, or read from the folder, when first needed.

    Its module and name find it in another process, see `quant.compiling`.
    """

    kind = "python"
    __name__: str

    def __init__(self, function: Callable[..., Any], signature: Any, **options: Any) -> None:
        self.function = function
        self.signature: Any = sigutils.normalize_signature(signature)
        self.options = {**OPTIONS, **options}
        functools.update_wrapper(self, function)

    @cached_property
    def code(self) -> Any:
        """What Numba made of it."""
        dispatcher = kernel(self.function, **self.options)
        arguments, result = self.signature
        dispatcher.compile(result(*arguments))
        dispatcher.disable_compile()
        return dispatcher

    @property
    def kept(self) -> bool:
        """Whether the folder has its machine code, or this process."""
        if "code" in self.__dict__:
            return True
        return FOLDER is not None and self._entry in FOLDER

    @cached_property
    def _entry(self) -> str:
        return CodeCache(self.function, self.kind).name(self.signature[0])

    def __call__(self, *arguments: Any) -> Any:
        return self.code(*arguments)


OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}


def kernel(function: Callable[..., Any], **options: Any) -> Any:
    """Compiled for the argument types that it is called with; machine code is kept."""
    dispatcher = numba.njit(**{**OPTIONS, **options}, pipeline_class=Kernel)(function)
    dispatcher._cache = CodeCache(function, Compiled.kind)
    return dispatcher


class _Inlined(Compiler):
    """Leaves the code of a function as it is first lowered: its callers optimise it as a part of
    theirs. Numba would optimise and assemble it once for every level of calls.
    """

    def _compile_bytecode(self) -> Any:
        state = self.state
        library = state.targetctx.codegen().create_library(state.func_id.func_qualname)
        library._optimize_final_module = lambda: None
        library._finalize_final_module = functools.partial(_finalize, library)
        state.library = library
        state.flags.no_compile = True
        result = super()._compile_bytecode()
        descriptor = result.fndesc
        entry = _dynfunc.make_function(
            descriptor.lookup_module(), descriptor.qualname, "", 0, result.environment, (library,)
        )
        state.targetctx.insert_user_function(entry, descriptor, [library])
        return result._replace(entry_point=entry)


def _finalize(library: Any) -> None:
    library._finalize_dynamic_globals()
    library._finalized = True


INNER: Any = {
    **OPTIONS,
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": _Inlined,
}
"""Numba's options for functions that are compiled into their callers."""


class Inner(CPUDispatcher):
    """A function without an entry for Python."""

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is compiled into kernels only; see from_python")


def inner(function: Callable[..., Any]) -> Any:
    """For functions only ever called from a kernel: compiled into their callers."""
    dispatcher = numba.njit(**INNER)(function)
    dispatcher.__class__ = Inner
    return dispatcher


def from_python(function: Any) -> Any:
    """An inner function as one that Python can call, for tests."""
    return numba.njit(**OPTIONS)(function.py_func)
