"""What the compiler takes the processor for: LLVM's answer on x86, the kernel's on ARM."""

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import pytest

from quant import jit, processor

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
X86 = pytest.mark.skipif(
    processor.is_arm(llvmlite.binding.get_process_triple()), reason="the answer for x86"
)


def found(**environment: str) -> list[str]:
    """The target of a process of its own, and what the kernels make of it."""
    code = (
        "from quant.processor import target; from ondevice.kernels.simd import FEATURES\n"
        "print(*target(), ' '.join(sorted(FEATURES)), sep='\\n')"
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_CPU")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@X86
def test_llvm_is_believed_on_x86() -> None:
    triple, name, features, _ = found()
    assert triple == llvmlite.binding.get_process_triple()
    assert name == llvmlite.binding.get_host_cpu_name()
    assert features == llvmlite.binding.get_host_cpu_features().flatten()


def test_numba_variables_win() -> None:
    assert found(NUMBA_CPU_NAME="generic")[1:] == ["generic", "", ""]
    assert found(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="+v1,-v2,+v3")[1:] == [
        "generic",
        "+v1,-v2,+v3",
        "v1 v3",
    ]


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Numba's configuration in a process that seems to run on ARM, with nothing chosen."""
    config: Any = numba.config
    monkeypatch.setattr(llvmlite.binding, "get_process_triple", lambda: "aarch64-unknown-linux-gnu")
    features = {"neon": True, "dotprod": False, "sve": False}
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(config, "CPU_NAME", None)
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    return config


@pytest.mark.parametrize(
    ("dotprod", "i8mm", "features"),
    [
        (False, False, "-dotprod,-i8mm,+neon,-sve"),
        (True, False, "+dotprod,-i8mm,+neon,-sve"),
        (True, True, "+dotprod,+i8mm,+neon,-sve"),
    ],
)
def test_the_kernel_is_believed_on_arm(
    arm: Any, monkeypatch: pytest.MonkeyPatch, dotprod: bool, i8mm: bool, features: str
) -> None:
    answer = {"dotprod": dotprod, "i8mm": i8mm}
    monkeypatch.setattr(processor, "dot_products", lambda: answer)
    processor._choose_features()
    assert arm.CPU_NAME is None
    assert features == arm.CPU_FEATURES


def test_nothing_is_changed_where_something_was_chosen(
    arm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "dot_products", lambda: {"dotprod": True, "i8mm": True})
    arm.CPU_NAME = "cortex-a53"
    processor._choose_features()
    assert arm.CPU_FEATURES is None
    arm.CPU_NAME, arm.CPU_FEATURES = None, "+neon"
    processor._choose_features()
    assert arm.CPU_FEATURES == "+neon"


def test_nothing_is_changed_where_nobody_can_be_asked(
    arm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "dot_products", lambda: None)
    processor._choose_features()
    assert arm.CPU_FEATURES is None


@LINUX
def test_linux_is_asked_for_the_auxiliary_vector() -> None:
    """The vector as the kernel shows it; what its bits mean here is another matter."""
    raw = Path("/proc/self/auxv").read_bytes()
    words = struct.unpack(f"{len(raw) // 8}Q", raw)
    vector = dict(zip(words[::2], words[1::2], strict=True))
    assert processor.dot_products() == {
        "dotprod": bool(vector.get(16, 0) >> 20 & 1),
        "i8mm": bool(vector.get(26, 0) >> 13 & 1),
    }


def test_macos_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An M1: it has dot products, and knows the other name only since macOS 12."""

    class Library:
        def sysctlbyname(self, name: bytes, value: Any, size: Any, *_: Any) -> int:
            if name != b"hw.optional.arm.FEAT_DotProd":
                return -1
            ctypes.memmove(value, b"\1\0\0\0", 4)
            return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert processor.dot_products() == {"dotprod": True, "i8mm": False}


def test_the_target_is_part_of_the_cache_folders_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for features in ("+dotprod,-i8mm", "+dotprod,+i8mm", "-dotprod,-i8mm"):
        target = ("aarch64-unknown-linux-gnu", "generic", features)
        monkeypatch.setattr(jit, "target", lambda target=target: target)
        names.add(jit.source_hash())
    assert len(names) == 3
