"""What this program found on this machine: processor, kernels, cache, memory, disk, speeds.

read bandwidth   bytes per second that all threads together read from memory
int8 peak        multiply-adds per second of all threads, see `machine`
disk speed       bytes per second of one sequential reader past the page cache: of the model
                 file, or of a file written for it; null where the file system has no such way
"""

import contextlib
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

from ondevice.kernels import simd
from ondevice.kernels.team import Team
from ondevice.machine import Machine
from quant import jit
from quant.cores import affinity, cores, cpu_quota, memory_limit
from quant.folders import cache_root

PIECE = 8 << 20
DISK_BYTES = 128 << 20
DISK_SECONDS = 0.5
KERNELS = {
    "AVX-512 VNNI": {"avx512vnni", "avx512bw"},
    "AVX-VNNI": {"avxvnni"},
    "AVX-512": {"avx512bw"},
    "AVX2": {"avx2"},
    "NEON i8mm": {"i8mm", "dotprod"},
    "NEON dotprod": {"dotprod"},
    "plain code": set[str](),
}
"""Kernels by their integer dot products, best first, and what they need, in LLVM's words."""
KNOWN_FEATURES = (
    *("avx2", "fma", "f16c", "avxvnni", "avx512bw", "avx512vl", "avx512vnni"),
    *("neon", "dotprod", "i8mm"),
)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def examine(model: Path | None = None) -> dict[str, Any]:
    """The findings, ready for JSON; `model`: the file whose disk is looked at."""
    threads = cores()
    folder = model.resolve(strict=True).parent if model else _existing(cache_root_or_temporary())
    total, available = memory()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **jit.versions(),
        "cpu": cpu_name(),
        "cpu_target": jit.target_name(),
        "cpu_features": [name for name in KNOWN_FEATURES if name in simd.FEATURES],
        "kernels": kernels(simd.FEATURES),
        "threads": threads,
        "processors": os.cpu_count(),
        "affinity": affinity(),
        "cpu_quota": cpu_quota(),
        "cache": cache(),
        "memory_total": total,
        "memory_available": available,
        "memory_limit": memory_limit(),
        "disk_folder": str(folder),
        "disk_free": shutil.disk_usage(folder).free,
        "disk_speed": disk_speed(folder, model),
        **speeds(threads),
    }


def kernels(features: Set[str]) -> str:
    """The name of the kernels that a processor with these features gets."""
    return next(name for name, needed in KERNELS.items() if needed <= features)


def table(found: dict[str, Any]) -> str:
    """`examine`'s result as lines to read."""
    granted = [f"{found['affinity']} of {found['processors']} processors"]
    if found["cpu_quota"]:
        granted.append(f"{found['cpu_quota']:g} granted by the container")
    cache = found["cache"]
    limit, speed = found["memory_limit"], found["disk_speed"]
    rows = [
        ("system", f"{found['system']}, Python {found['python']}"),
        ("compiler", f"Numba {found['numba']}, llvmlite {found['llvmlite']}"),
        ("processor", f"{found['cpu']}, compiled for {found['cpu_target']}"),
        ("features", " ".join(found["cpu_features"]) or "none that the kernels know"),
        ("kernels", found["kernels"]),
        ("threads", f"{found['threads']}: {', '.join(granted)}"),
        (
            "cache",
            f"{cache['folder']}, {cache['state']}, "
            f"{cache['entries']} kernels, {_size(cache['bytes'])}"
            if cache["folder"]
            else cache["state"],
        ),
        (
            "memory",
            f"{_size(found['memory_available'])} available of {_size(found['memory_total'])}"
            + (f", {_size(limit)} granted by the container" if limit else ""),
        ),
        (
            "disk",
            f"{found['disk_folder']}, {_size(found['disk_free'])} free"
            + (f", reads {speed / 1e9:.2f} GB/s" if speed else ""),
        ),
        ("bandwidth", f"{found['read_bandwidth'] / 1e9:.1f} GB/s read from memory"),
        ("int8 peak", f"{found['int8_peak'] / 1e9:.0f} GMAC/s"),
    ]
    return "\n".join(f"{label:<11} {text}" for label, text in rows)


def cache() -> dict[str, Any]:
    """Where machine code is kept and how much of it, or why nowhere."""
    folder = jit.FOLDER
    if folder is None:
        state = "none: no folder that belongs to this user alone; kernels are compiled every time"
        return {"folder": None, "state": state, "entries": 0, "bytes": 0}
    states = ["private"]
    if not os.access(folder.path, os.W_OK):
        states.append("read only")
    with contextlib.suppress(RuntimeError):
        if not folder.path.is_relative_to(cache_root()):
            states.append(f"temporary, as {cache_root()} cannot be used")
    sizes = list(folder.sizes())
    return {
        "folder": str(folder.path),
        "state": ", ".join(states),
        "entries": len(sizes),
        "bytes": sum(sizes),
    }


def cache_root_or_temporary() -> Path:
    try:
        return cache_root()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Hardware", "Model")) and ":" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory() -> tuple[int, int]:
    """Bytes of memory in all, and those that programs can have without others giving way."""
    with contextlib.suppress(OSError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return values["MemTotal"], values["MemAvailable"]
    if hasattr(os, "sysconf"):
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(ValueError, OSError):
            return total, page * os.sysconf("SC_AVPHYS_PAGES")
        return total, total
    return 0, 0


def disk_speed(folder: Path, model: Path | None) -> float | None:
    """Bytes per second of reading in large pieces past the page cache; None: cannot be told."""
    try:
        if model is not None:
            return _read_directly(model)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as file:
            piece = os.urandom(PIECE)
            started = time.perf_counter()
            while file.tell() < DISK_BYTES and time.perf_counter() - started < DISK_SECONDS:
                file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            return _read_directly(Path(file.name))
    except (OSError, ImportError, AttributeError):  # no way past the page cache
        return None


def _read_directly(path: Path) -> float | None:
    direct = getattr(os, "O_DIRECT", 0)
    descriptor = os.open(path, os.O_RDONLY | direct)
    try:
        if not direct:
            import fcntl

            fcntl.fcntl(descriptor, getattr(fcntl, "F_NOCACHE"), 1)  # noqa: B009
        with mmap.mmap(-1, PIECE) as buffer:  # direct reading wants whole pages
            done, started = 0, time.perf_counter()
            while done < DISK_BYTES and time.perf_counter() - started < DISK_SECONDS:
                if not (count := os.preadv(descriptor, [buffer], done)):
                    break
                done += count
            seconds = time.perf_counter() - started
        return done / seconds if done else None
    finally:
        os.close(descriptor)


def speeds(threads: int) -> dict[str, float]:
    """What a team of threads reads from memory and multiplies, per second."""
    team = Team(threads)
    try:
        machine = Machine(lambda operations, step: team.run(operations.records, step), threads)
        return {"read_bandwidth": machine.read_bandwidth(), "int8_peak": machine.int8_peak()}
    finally:
        team.close()


def _size(nbytes: float) -> str:
    unit = 0
    while nbytes >= 1024 and unit < len(UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.1f} {UNITS[unit]}" if unit else f"{nbytes:.0f} B"
