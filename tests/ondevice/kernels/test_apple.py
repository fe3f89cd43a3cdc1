"""Kernels compiled, not run, for Apple's processors: they get the instructions that those have."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ondevice.kernels import attention, delta, experts, linear, sample
from ondevice.kernels.activation import NONE
from ondevice.kernels.formats import READERS
from ondevice.kernels.operation import CompiledFunction
from tests.ondevice.kernels.harness import run_python

PROCESSORS = {"apple-m1": "+dotprod", "apple-m2": "+dotprod,+i8mm"}
DOTS = {"apple-m1": {"sdot"}, "apple-m2": {"sdot", "smmla"}}
FEW = ["Q4_0", "Q6_K"]
EACH = pytest.mark.parametrize("cpu", PROCESSORS)


def counts(cpu: str, names: Sequence[str], cache: Path) -> dict[str, dict[str, int]]:
    """Kernel -> instruction -> how often."""
    target = ["arm64-apple-macosx", cpu, PROCESSORS[cpu], "count", *names]
    found = run_python(["-m", "tests.cross_compile", *target], {"ONDEVICE_CACHE": str(cache)})
    return dict(json.loads(found))


def dotted(kernel: CompiledFunction, separator: str = ".") -> str:
    return f"{kernel.function.__module__}{separator}{kernel.__name__}"


def check_products(found: dict[str, dict[str, int]], formats: Iterable[str], cpu: str) -> None:
    for name in formats:
        reader = READERS[name]
        wanted = {"fmla"} if reader.activation == NONE else DOTS[cpu]
        assert wanted <= found[dotted(reader.multiply)].keys(), name


@EACH
def test_products_have_the_instructions_of_the_processor(cpu: str, tmp_path: Path) -> None:
    names = [dotted(READERS[name].multiply, ":") for name in FEW]
    check_products(counts(cpu, names, tmp_path), FEW, cpu)


@pytest.mark.slow
@EACH
def test_every_kernel_compiles(cpu: str, tmp_path: Path) -> None:
    found = counts(cpu, ["ondevice.kernels"], tmp_path)
    check_products(found, READERS, cpu)
    assert {dotted(reader.expand) for reader in READERS.values()} <= found.keys()
    operations = {attention.attend, delta.delta_rule, experts.gate_up, linear.linear, sample.sample}
    assert {dotted(operation) for operation in operations} <= found.keys()
    assert all("ret" in instructions for instructions in found.values())
