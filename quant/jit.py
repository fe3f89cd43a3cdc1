"""How every Numba function of this project is compiled, and where the machine code is kept.

Numba's disk cache does not notice an edit in another file than the one that defines a function,
so the cache folder is named after a hash of all kernel sources, the Numba version and the host
CPU: an edit, an upgrade or another machine means a new folder. Cache entries are pickles, so the
folder must belong to the user alone; where no such folder can be had, functions are compiled in
memory and the program says so once.
"""

import functools
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba import _dynfunc
from numba.core.compiler import Compiler

from quant.folders import cache_root, private_folder

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = sorted([*_ROOT.glob("quant/*.py"), *_ROOT.glob("ondevice/kernels/**/*.py")])


def source_hash() -> str:
    """12 hex digits naming this set of kernel sources, compiler versions and host CPU."""
    digest = hashlib.sha256()
    for path in _SOURCES:
        digest.update(path.read_bytes())
    features = llvmlite.binding.get_host_cpu_features().flatten()
    for part in (
        numba.__version__,
        llvmlite.__version__,
        platform.python_version(),
        llvmlite.binding.get_host_cpu_name(),
        os.environ.get("NUMBA_CPU_NAME", ""),
        os.environ.get("NUMBA_CPU_FEATURES", ""),
        features,
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _choose_cache() -> Path | None:
    try:
        folder = cache_root() / f"kernels-{source_hash()}"
    except RuntimeError:  # no home folder at all
        folder = None
    if folder is not None and private_folder(folder):
        return folder
    warnings.warn(
        f"no private cache folder at {folder}: kernels are compiled again at every start",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


CACHE_FOLDER = _choose_cache()
if CACHE_FOLDER is not None:
    numba.config.CACHE_DIR = str(CACHE_FOLDER)  # type: ignore[attr-defined]

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "cache": CACHE_FOLDER is not None,
}

kernel: Any = functools.partial(numba.njit, **OPTIONS)

short_kernel: Any = functools.partial(numba.njit, **{**OPTIONS, "nogil": False})
"""For calls that take less time than giving up the interpreter's lock."""


class _Inlined(Compiler):  # type: ignore[misc]
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


inner: Any = functools.partial(
    numba.njit,
    **OPTIONS | {"cache": False},
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    forceinline=True,
    pipeline_class=_Inlined,
)
"""For functions only ever called from a kernel: compiled into their callers."""
