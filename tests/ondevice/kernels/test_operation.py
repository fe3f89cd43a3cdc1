"""Compiled functions with a C address."""

import ctypes

import numpy as np
import pytest

from ondevice.kernels import linear
from ondevice.kernels.formats import READERS
from ondevice.kernels.operation import CompiledFunction, expand_kernel, operation, row_kernel
from ondevice.kernels.simd import store_i64
from quant import jit
from tests.quant.test_jit import assert_aligned


def add(a: int, b: int, out: int) -> None:
    """Adds."""
    store_i64(out, a + b)


@pytest.mark.parametrize(("decorate", "count"), [(operation, 4), (row_kernel, 12)])
def test_decorators_know_the_signature(decorate: type, count: int) -> None:
    function = decorate(add)
    assert function.count == count
    assert (function.__name__, function.__doc__) == ("add", "Adds.")
    assert expand_kernel(add).count == 3


def test_kernels_begin_on_a_whole_vector_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "FOLDER", None)
    assert_aligned(expand_kernel(add).code._library.get_llvm_str())


def test_is_compiled_once_and_called_by_address() -> None:
    function = expand_kernel(add)
    out = np.zeros(1, np.int64)
    function(2, 3, out.ctypes.data)
    assert out[0] == 5
    address = function.address
    by_address = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)
    by_address(2**40, -1, out.ctypes.data)
    assert out[0] == 2**40 - 1
    assert function.address == address


@pytest.mark.parametrize("count", [2, 4])
def test_a_function_of_another_arity_does_not_compile(count: int) -> None:
    with pytest.raises(TypeError, match=f"{count} argument types given"):
        _ = CompiledFunction(add, count).address


def test_arguments_are_counted() -> None:
    with pytest.raises(TypeError):
        operation(add)(1, 2)
    with pytest.raises(TypeError):
        READERS["F32"].multiply(1, 2, 3)


@pytest.mark.skipif(jit.FOLDER is None, reason="there is no private cache folder")
def test_machine_code_is_kept_on_disk() -> None:
    assert linear.linear.address
    assert linear.linear.kept
    assert jit.FOLDER is not None
    assert list(jit.FOLDER.path.glob("ondevice.kernels.linear.linear-c-*.code"))
