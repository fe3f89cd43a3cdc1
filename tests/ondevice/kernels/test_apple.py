"""Kernels compiled, not run, for Apple's processors: they get the instructions that those have."""

import json
from pathlib import Path

import pytest

from ondevice.kernels import attention, delta, experts, linear, sample
from ondevice.kernels.activation import NONE
from ondevice.kernels.formats import READERS
from ondevice.kernels.operation import CompiledFunction
from tests.ondevice.kernels.harness import run_python

PROCESSORS = {"apple-m1": "+dotprod", "apple-m2": "+dotprod,+i8mm"}
DOTS = {"apple-m1": {"sdot"}, "apple-m2": {"sdot", "smmla"}}
EACH = pytest.mark.parametrize("cpu", PROCESSORS)


def counts(cpu: str, package: str, cache: Path) -> dict[str, dict[str, int]]:
    """Kernel -> instruction -> how often."""
    target = ["arm64-apple-macosx", cpu, PROCESSORS[cpu], "count", package]
    found = run_python(["-m", "tests.cross_compile", *target], {"ONDEVICE_CACHE": str(cache)})
    return dict(json.loads(found))


def dotted(kernel: CompiledFunction) -> str:
    return f"{kernel.function.__module__}.{kernel.__name__}"


@EACH
def test_products_have_the_instructions_of_the_processor(cpu: str, tmp_path: Path) -> None:
    found = counts(cpu, "ondevice.kernels.dot", tmp_path)
    for name, reader in READERS.items():
        wanted = {"fmla"} if reader.activation == NONE else DOTS[cpu]
        assert wanted <= found[dotted(reader.multiply)].keys(), name


@pytest.mark.slow
@EACH
def test_every_kernel_compiles(cpu: str, tmp_path: Path) -> None:
    found = counts(cpu, "ondevice.kernels", tmp_path)
    for reader in READERS.values():
        assert {dotted(reader.multiply), dotted(reader.expand)} <= found.keys()
    operations = {attention.attend, delta.delta_rule, experts.gate_up, linear.linear, sample.sample}
    assert {dotted(operation) for operation in operations} <= found.keys()
    assert all("ret" in instructions for instructions in found.values())
