"""Kernel tests and a generation on 64-bit ARM processors, emulated: `make test-arm64`.

QEMU runs one ARM program at a time in this system's place: a Python of Debian's packages, with the
packages of this environment as ARM wheels, all in build/arm64. For each processor of PROCESSORS

    the kernels are compiled ahead, here (tests/cross_compile): the compiler itself is ten times
        slower under emulation; those of test_simd are compiled in place, as on an ARM machine
    the kernel tests run, but for TOO_LONG
    the demo model answers a prompt, greedily: tokens as on this machine, logits up to rounding

Ends with 77 where the emulation cannot be had, with 1 where a test fails.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np

from ondevice import demo

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "arm64"
SYSTEM, SITE, PYTHON = BUILD / "system", BUILD / "site", BUILD / "python"
PACKAGES = SYSTEM / "opt" / "packages"
CANNOT = 77

PROCESSORS = {
    "cortex-a53": set[str](),
    "cortex-a76": {"dotprod"},
    "max,sve=off": {"dotprod", "i8mm"},
}
"""What QEMU calls them -> what must be found out. With SVE, NumPy's own products take ten times."""

SUITE, VERSION = "bookworm", (3, 11)
DEBIAN = (
    "python3.11",
    "python3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libstdc++6",
    "libgcc-s1",
    "zlib1g",
)
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + ["manylinux2014_aarch64"]
NOT_NEEDED = {"mypy", "ruff"}
KERNEL_TESTS = ROOT / "tests" / "ondevice" / "kernels"
DOTS = ("activation", "attention", "dot", "experts", "linear", "probe", "simd", "tiles")
"""Tests whose kernels have integer dot products; the others run on the first processor only."""
TOO_LONG = ("encoded", "apple", "test_chunks", "18-2-64-32", "draws_follow")
"""What takes minutes under emulation, or compiles for Apple."""
IN_PLACE = "simd"

PROMPT = "It was a dark and stormy night, and the detective"
TOKENS = 24
LOGITS_ERROR = 1e-3
GENERATE = f"""
import sys, numpy, ondevice
with ondevice.load(sys.argv[1], threads=2) as model:
    ids = model.tokenize({PROMPT!r})
    tokens = list(model.generate(ids, max_tokens={TOKENS}, temperature=0.0))
    numpy.savez(sys.argv[2], tokens=ids + tokens, logits=model.logits(ids + tokens))
"""


class SetUpError(Exception):
    """The emulation cannot be had; one line."""


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command in the repository; its output, or CalledProcessError with it."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


# ---- set-up ----


def emulator() -> str:
    """The path of QEMU, installed from Debian's packages where we may; mmdebstrap with it."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        raise SetUpError("the emulation needs Linux on x86-64; on an ARM machine use `make test`")

    def found() -> list[str | None]:
        names = ("qemu-aarch64-static", "qemu-aarch64")
        return [next(filter(None, map(shutil.which, names)), None), shutil.which("mmdebstrap")]

    if None in found() and os.geteuid() == 0 and shutil.which("apt-get"):
        apt = ["apt-get", "-qq", "-o", "Acquire::Retries=1"]
        run([*apt, "update"])
        install = [*apt, "install", "-y", "--no-install-recommends"]
        run([*install, "qemu-user-static", "mmdebstrap"], DEBIAN_FRONTEND="noninteractive")
    qemu, mmdebstrap = found()
    if qemu is None or mmdebstrap is None:
        raise SetUpError("needs the packages qemu-user-static and mmdebstrap")
    return qemu


def requirements() -> list[str]:
    """What the tests import, in the versions installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in wanted} - NOT_NEEDED
    return sorted(f"{name}=={metadata.version(name)}" for name in names)


def set_up() -> None:
    """Make build/arm64, unless it is there as it would be made now."""
    qemu = emulator()
    pins = requirements()
    recipe = hashlib.sha256(repr((qemu, SUITE, DEBIAN, PLATFORMS, pins, ROOT)).encode()).hexdigest()
    stamp = BUILD / "recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    mode = "root" if os.geteuid() == 0 else "chrootless"
    debootstrap = ["mmdebstrap", "--quiet", "--architectures=arm64", "--variant=extract"]
    run([*debootstrap, f"--mode={mode}", f"--include={','.join(DEBIAN)}", SUITE, SYSTEM])
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--target", PACKAGES, "--no-compile"]
    version = "".join(map(str, VERSION))
    kind = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    kind += [f"--abi={abi}" for abi in (f"cp{version}", "abi3", "none")]
    kind += [f"--platform={platform}" for platform in PLATFORMS]
    run([*pip, *kind, *pins])
    SITE.mkdir()
    (SITE / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(PYTHON)!r}\n")
    PYTHON.write_text(
        "#!/bin/sh\n"
        f"export PYTHONHOME={shlex.quote(f'{SYSTEM}/usr')}\n"
        f"export PYTHONPATH={shlex.quote(f'{SITE}:{PACKAGES}')}\n"
        f"exec {shlex.quote(qemu)} -L {shlex.quote(str(SYSTEM))} "
        f'{shlex.quote(f"{SYSTEM}/usr/bin/python3.11")} "$@"\n'
    )
    PYTHON.chmod(0o755)
    # bytecode does not depend on the processor, and compiling it under emulation takes minutes
    native = sys.executable if sys.version_info[:2] == VERSION else str(PYTHON)
    run([native, "-m", "compileall", "-q", PACKAGES, SYSTEM / "usr" / "lib" / "python3.11"])
    stamp.write_text(recipe)


# ---- one processor ----


def emulated(processor: str, arguments: Sequence[str | Path]) -> str:
    """Run Python on an emulated processor, with a cache folder of its own."""
    return run(
        [PYTHON, *arguments],
        QEMU_CPU=processor,
        ONDEVICE_CACHE=str(BUILD / f"cache-{processor}"),
        OPENBLAS_NUM_THREADS="1",
    )


def tests_of(processor: str) -> list[str]:
    """Names of the kernel tests that run on a processor."""
    every = sorted(path.stem.removeprefix("test_") for path in KERNEL_TESTS.glob("test_*.py"))
    return every if processor == next(iter(PROCESSORS)) else list(DOTS)


def compile_ahead(processor: str) -> None:
    """Fill the processor's cache folder from here, after a look at what it is taken for."""
    ask = "from quant import jit; print(*jit.target(), jit.FOLDER.path, sep='\\n')"
    triple, cpu, features, folder = emulated(processor, ["-c", ask]).splitlines()
    found = {name for name in ("dotprod", "i8mm") if f"+{name}" in features.split(",")}
    assert found == PROCESSORS[processor], f"the processor is taken for one with {found}"
    for other in set(Path(folder).parent.glob("kernels-*")) - {Path(folder)}:
        shutil.rmtree(other)
    if sys.version_info[:2] == VERSION:
        tests = set(tests_of(processor)) - {IN_PLACE}
        modules = ["ondevice.kernels", *(f"tests.ondevice.kernels.test_{name}" for name in tests)]
        command = [sys.executable, "-m", "tests.cross_compile", triple, cpu, features, folder]
        run([*command, *modules])


def test_kernels(processor: str) -> str:
    chosen = " and ".join(f"not {part}" for part in TOO_LONG)
    options = ["-q", "-p", "no:cacheprovider", "-k", chosen, "--durations=15"]
    files = [KERNEL_TESTS / f"test_{name}.py" for name in tests_of(processor)]
    output = emulated(processor, ["-m", "pytest", *files, *options])
    return output.strip().splitlines()[-1]


def test_generation(processor: str, model: Path, expected: Path) -> str:
    """Greedy tokens and logits against those of this machine."""
    found = BUILD / f"{processor}.npz"
    emulated(processor, ["-c", GENERATE, model, found])
    with np.load(expected) as ours, np.load(found) as theirs:
        a, b = ours["tokens"].tolist(), theirs["tokens"].tolist()
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        x, y = ours["logits"][:same], theirs["logits"][:same]
        error = float(abs(x - y).max() / x.std())
        close = same == len(a) or abs(x[-1, a[same]] - x[-1, b[same]]) < LOGITS_ERROR * x.std()
    assert same > 0 and error < LOGITS_ERROR and close, f"{same} tokens agree, logits {error:.1e}"
    return f"{same} of {len(a)} tokens as on x86, logits within {error:.1e} of their deviation"


def main() -> int:
    started = time.monotonic()
    try:
        set_up()
    except SetUpError as error:
        print(f"test-arm64: not run: {error}")
        return CANNOT
    except (subprocess.CalledProcessError, OSError, metadata.PackageNotFoundError) as error:
        shutil.rmtree(BUILD, ignore_errors=True)
        lines = str(getattr(error, "output", None) or error).strip().splitlines()
        print(f"test-arm64: not run: set-up failed: {lines[-1] if lines else error}")
        return CANNOT
    print(f"set-up: {time.monotonic() - started:.0f} s", flush=True)
    model, expected = demo.gguf_path(), BUILD / "expected.npz"
    run([sys.executable, "-c", GENERATE, model, expected])
    failed = False

    def job(processor: str) -> str:
        begun = time.monotonic()
        compile_ahead(processor)
        compiled = time.monotonic()
        kernels = test_kernels(processor)
        tested = time.monotonic()
        generation = test_generation(processor, model, expected)
        ended = time.monotonic()
        features = " ".join(sorted(PROCESSORS[processor])) or "plain"
        return (
            f"{processor} ({features}): compiled ahead in {compiled - begun:.0f} s; "
            f"{kernels}; {generation}, {ended - tested:.0f} s"
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {name: pool.submit(job, name) for name in PROCESSORS}
        for name, future in jobs.items():
            try:
                print(future.result(), flush=True)
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{name} FAILED ({error.returncode}):\n{error.output[-3000:]}", flush=True)
            except AssertionError as error:
                failed = True
                print(f"{name} FAILED: {error}", flush=True)
    print(f"{'failed' if failed else 'passed'} in {time.monotonic() - started:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
