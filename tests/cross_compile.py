"""Kernels compiled for a processor that this machine has not: Numba with another LLVM target.

In place of LLVM's execution engine stands an `Engine` that compiles modules to objects and never
loads them, so every kernel goes through Numba's own passes, with the options of the target. It
replaces the compiler of the whole process and needs a process of its own:

    python -m tests.cross_compile TRIPLE CPU FEATURES count NAME...
        print JSON, {kernel: {mnemonic: how often it stands in its code}}
    python -m tests.cross_compile TRIPLE CPU FEATURES FOLDER NAME...
        fill a cache folder of that processor, so that it has nothing left to compile

A NAME is a package, a module, or module:function.

Reaches into the private parts of Numba's codegen module (0.68).
"""

import contextlib
import ctypes
import importlib
import json
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import codegen


class Engine(codegen.JitEngine):
    """Stands where LLVM's execution engine does: compiles modules, runs nothing."""

    def __init__(self, machine: Any) -> None:
        super().__init__(machine)
        self._modules: list[Any] = []
        self._compiled: Callable[[Any, bytes], None]
        self._word = ctypes.c_int64()

    def set_object_cache(self, compiled: Callable[[Any, bytes], None], _: Any) -> None:
        self._compiled = compiled

    def add_module(self, module: Any) -> None:
        self._load_defined_symbols(module)
        self._modules.append(module)

    def finalize_object(self) -> None:
        for module in self._modules:
            self._compiled(module, self._ee.emit_object(module))
        self._modules.clear()

    def get_function_address(self, name: str) -> int:
        return ctypes.addressof(self._word)

    get_global_value_address = get_function_address

    def add_global_mapping(self, value: Any, address: int) -> None:
        """Addresses of this process mean nothing elsewhere."""


def choose(triple: str, cpu: str, features: str) -> None:
    """Let everything that this process compiles be for that processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple)
    llvm.get_process_triple = lambda: triple
    llvm.Target.from_default_triple = lambda: target
    llvm.create_mcjit_compiler = lambda module, machine, use_lmm: machine
    codegen.JitEngine = Engine
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = cpu, features  # type: ignore[attr-defined]


def modules(names: Sequence[str]) -> Iterator[Any]:
    """Those modules and all within them."""
    for name in names:
        module = importlib.import_module(name)
        yield module
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
            yield importlib.import_module(found.name)


def kernels(names: Sequence[str]) -> dict[str, Any]:
    """Functions of fixed types by their dotted names: those named, all of a module or package."""
    from quant.jit import Compiled

    found = {
        f"{module.__name__}.{name}": value
        for module in modules([name for name in names if ":" not in name])
        for name, value in vars(module).items()
        if isinstance(value, Compiled) and value.function.__module__ == module.__name__
    }
    for module, _, name in (name.partition(":") for name in names if ":" in name):
        found[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    return found


def mnemonics(assembly: str) -> Counter[str]:
    """How often each instruction occurs; Mach-O's `sdot.4s` is `sdot`."""
    return Counter(re.findall(r"^\t([a-z]\w*)", assembly, re.MULTILINE))


def main(triple: str, cpu: str, features: str, goal: str, *names: str) -> None:
    choose(triple, cpu, features)
    from quant import jit
    from quant.code_folder import CodeFolder

    if goal == "count":
        jit.FOLDER = None
        found = kernels(names)
        assembly = {name: found[name].code._library.get_asm_str() for name in found}
        json.dump({name: mnemonics(text) for name, text in assembly.items()}, sys.stdout)
    else:
        jit.FOLDER = CodeFolder(Path(goal), (Path(goal) / "key").read_bytes())
        for kernel in kernels(names).values():
            with contextlib.suppress(Exception):  # it fails the test that needs it
                _ = kernel.code


if __name__ == "__main__":
    main(*sys.argv[1:])
