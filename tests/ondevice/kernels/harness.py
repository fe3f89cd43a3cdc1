"""Driving one kernel: guarded memory, step records, activation records, blocks, references.

References are float64 NumPy or the `gguf` package, never another kernel.
"""

import ctypes
import functools
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llvmlite.binding
import numpy as np
import pytest

from ondevice.kernels import layout
from ondevice.kernels.activation import NONE, PER_256, record_bytes
from ondevice.kernels.formats import READERS
from ondevice.kernels.operation import CompiledFunction
from ondevice.kernels.peaks import note_peaks
from ondevice.kernels.team import Team
from quant.format import Array
from quant.registry import FORMATS

GUARD = 0xFF  # as bytes of a float: NaN, so that what reads it shows it
SURPLUS = 20  # bytes after each row: rows are not aligned, which kernels must not need

three_integers = functools.partial(CompiledFunction, count=3)
"""A decorator: a function of three addresses, compiled as the kernels are."""


class Rows:
    """Rows of values with guard bytes before, between and after them."""

    def __init__(self, rows: int, columns: int, kind: Any = np.float32) -> None:
        self._used = columns * np.dtype(kind).itemsize
        self._memory = np.full((rows + 2, self._used + SURPLUS), GUARD, np.uint8)
        self.values = self._memory[1:-1, : self._used].view(kind)

    @classmethod
    def of(cls, values: Any) -> "Rows":
        """A copy of values (rows, columns)."""
        values = np.asarray(values)
        rows = cls(*values.shape, values.dtype)
        rows.values[:] = values
        return rows

    @property
    def address(self) -> int:
        return int(self._memory[1:].ctypes.data)

    @property
    def row_bytes(self) -> int:
        return int(self._memory.strides[0])

    def check(self) -> None:
        """Fail if a guard byte has changed."""
        assert (self._memory[[0, -1]] == GUARD).all(), "written before or after the rows"
        assert (self._memory[:, self._used :] == GUARD).all(), "written between two rows"


def bits(values: Array) -> list[Any]:
    """The bits of float32, for comparisons in which NaN equals NaN and 0 is not -0."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32).tolist()


def integers(argument: Any) -> list[int]:
    """What a record holds of an argument: Rows are an address and a row's bytes."""
    if isinstance(argument, Rows):
        return [argument.address, argument.row_bytes]
    if isinstance(argument, np.ndarray):
        return [int(argument.ctypes.data)]
    if isinstance(argument, float):
        return [int(np.float32(argument).view(np.int32))]
    return [int(argument)]


def record(
    kernel: CompiledFunction,
    *arguments: Any,
    tasks: int = 1,
    per_token: bool = False,
    times: Array | None = None,
    then: int = layout.BARRIER,
    few: int = 0,
) -> Array:
    """An operation record; `times` is an array that begins with the number at TIMES."""
    words = np.zeros(layout.OPERATION_WORDS, np.int64)
    words[layout.FEW_TASKS] = few
    words[[layout.KERNEL, layout.TASKS, layout.PER_TOKEN]] = kernel.address, tasks, per_token
    words[[layout.TIMES, layout.THEN]] = address(times), then
    values = [value for argument in arguments for value in integers(argument)]
    words[layout.ARGUMENTS : layout.ARGUMENTS + len(values)] = values
    return words


def step_record(**words: Any) -> Array:
    """A step record: count=5 sets COUNT, state=array the address in STATE."""
    step = np.zeros(layout.STEP_WORDS, np.int64)
    for name, value in words.items():
        (step[getattr(layout, name.upper())],) = integers(value)
    return step


def run(
    kernel: CompiledFunction,
    *arguments: Any,
    threads: int = 2,
    scratch: int = 0,
    tasks: int = 1,
    per_token: bool = False,
    times: Array | None = None,
    few: int = 0,
    **words: Any,
) -> Array:
    """Run one operation on a team; checks the guards of every Rows; returns the step record."""
    operation = record(kernel, *arguments, tasks=tasks, per_token=per_token, times=times, few=few)
    step = run_record(operation, threads, scratch, **words)
    for rows in arguments:
        if isinstance(rows, Rows):
            rows.check()
    return step


def run_record(operation: Array, threads: int = 2, scratch: int = 0, **words: Any) -> Array:
    """Run one operation record on a team; returns the step record."""
    own = Rows(threads, scratch, np.uint8)
    step = step_record(scratch=own.address, scratch_bytes=own.row_bytes, **{"count": 1, **words})
    team_of(threads).run(operation[None], step)
    own.check()
    return step


@functools.cache
def team_of(threads: int) -> Team:
    """The team of so many threads, the same for all tests: an emulator begins threads slowly."""
    return Team(threads)


def peaks_of(logits: Array, piece: int) -> Array:
    """The peaks of rows of logits (kernels/peaks.py)."""
    rows, vocabulary = logits.shape
    peaks = np.zeros((rows, -(-vocabulary // piece)), np.float32)
    run(
        note_peaks,
        *(logits, logits.strides[0], vocabulary, 2 * piece, 0, peaks, peaks.strides[0], piece),
        threads=1,
        count=rows,
        tasks=-(-vocabulary // (2 * piece)),
    )
    return peaks


# ---- activation records ----


def sums_of(codes: Array, length: int) -> Array:
    """Sums of `length` codes each, int64 (tokens, n / length)."""
    return codes.reshape(len(codes), -1, length).sum(axis=2, dtype=np.int64)


def pack(kind: int, codes: Array, scales: Array) -> Array:
    """codes (tokens, n) int8 and scales (tokens, groups) -> records as kernels.activation says."""
    if kind == PER_256:
        sums = np.concatenate([sums_of(codes, 16), sums_of(codes, 32)], axis=1).astype(np.int16)
    else:
        sums = (-8 * sums_of(codes, 32)).astype(np.int32)
    parts = (codes, scales.astype(np.float32), sums)
    used = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=1)
    spare = record_bytes(kind, codes.shape[1]) - used.shape[1]
    return np.pad(used, [(0, 0), (0, spare)], constant_values=GUARD)


def unpack(kind: int, records: Array, columns: int) -> tuple[Array, Array, Array]:
    """records (tokens, bytes) -> codes int8, scales f32, and sums as they are stored."""
    group = 256 if kind == PER_256 else 32
    scales_end = columns + columns // group * 4
    sum_type = np.dtype(np.int16 if kind == PER_256 else np.int32)
    count = columns // 16 + columns // 32 if kind == PER_256 else columns // 32
    parts = np.split(records, [columns, scales_end, scales_end + count * sum_type.itemsize], axis=1)
    kinds = (np.int8, np.float32, sum_type)
    codes, scales, sums = (
        np.ascontiguousarray(part).view(kind) for part, kind in zip(parts, kinds, strict=False)
    )
    return codes, scales, sums


def meant(kind: int, records: Array, columns: int) -> Array:
    """The activations that records stand for, float64 (tokens, columns)."""
    if kind == NONE:
        return np.ascontiguousarray(records[:, : 4 * columns]).view(np.float32).astype(np.float64)
    codes, scales, _ = unpack(kind, records, columns)
    groups = codes.reshape(*scales.shape, -1).astype(np.float64)
    return (groups * scales[:, :, None]).reshape(codes.shape)


def random_records(
    kind: int, tokens: int, columns: int, random: np.random.Generator, extreme: bool = False
) -> Array:
    """Valid records of random activations; `extreme` ones have only the greatest codes."""
    if kind == NONE:
        values = random.standard_normal((tokens, columns)).astype(np.float32)
        return np.pad(values.view(np.uint8), [(0, 0), (0, SURPLUS)], constant_values=GUARD)
    shape = (tokens, columns)
    codes = random.integers(-127, 128, shape, np.int8)
    if extreme:
        # long runs of one sign: the sums that a narrow integer would not hold
        runs = random.choice(np.array([-127, 127], np.int8), (tokens, columns // 32))
        codes = np.repeat(runs, 32, axis=1)
        codes[0] = 127
    scales = 10.0 ** random.uniform(-4, 0, (tokens, columns // (256 if kind == PER_256 else 32)))
    return pack(kind, codes, scales)


# ---- blocks ----

SCALES = ("d", "dmin", "m")
"""Fields of floats in a block: its scale, and what scales or is its minimum."""

WRITTEN = [name for name in READERS if FORMATS[name].quantize]
"""The formats that can be encoded; the others are only read."""


def expanded(name: str, raw: Array) -> Array:
    """Rows of blocks as gguf's own code expands them, float32."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[name])


def encoded(name: str, values: Array) -> Array:
    """values (rows, columns) as bytes (rows, row bytes)."""
    quantize = FORMATS[name].quantize
    assert quantize is not None
    return quantize(values).view(np.uint8).reshape(len(values), -1)


def gaussian_blocks(name: str, rows: int, columns: int, random: np.random.Generator) -> Array:
    return encoded(name, random.standard_normal((rows, columns)).astype(np.float32) / 16)


def random_blocks(
    name: str, rows: int, columns: int, random: np.random.Generator, extreme: bool = False
) -> Array:
    """Random bytes with finite scales of either sign; `extreme` ones have only greatest codes."""
    format = FORMATS[name]
    if format.length == 1:
        return gaussian_blocks(name, rows, columns, random)
    raw = random.integers(0, 256, (rows, format.row_bytes(columns)), np.uint8)
    if extreme:
        raw[:] = random.choice(np.array([0x7F, 0x80, 0xFF], np.uint8), (rows, 1))
        raw[0] = 0xFF
    blocks = format.blocks(raw)
    for field in SCALES:
        if field in (format.block.names or ()):
            blocks[field] = random.standard_normal(blocks.shape) / 64
    if name == "MXFP4":
        blocks["e"] = random.integers(120, 124, blocks.shape)
    return raw


# ---- products ----


def address(values: Array | None) -> int:
    return 0 if values is None else int(values.ctypes.data)


def multiply(
    name: str,
    raw: Array,
    columns: int,
    records: Array,
    source: Array | None = None,
    target: Array | None = None,
    out: Rows | None = None,
) -> Array:
    """Call a format's row kernel: (tokens, rows) f32; `source` and `target` are i and o."""
    reader = READERS[name]
    tokens = len(records) if source is None else len(source)
    out = Rows(tokens, len(raw)) if out is None else out
    scratch = Rows(1, reader.scratch_bytes(columns), np.uint8)
    reader.multiply(
        *(raw.ctypes.data, raw.strides[0], len(raw), columns),
        *(records.ctypes.data, records.strides[0], address(source)),
        *(out.address, out.row_bytes, address(target), tokens, scratch.address),
    )
    out.check()
    scratch.check()
    return out.values


# float32 rounding only, measured 5e-7: a code that is off by one changes a sum by 1e-4 or more.
PRODUCT_ERROR = 1e-6


def magnitude(name: str, raw: Array) -> Array:
    """|weights|, or where a weight is the sum of a scaled code and a minimum, the sum of both's."""
    weights = np.zeros(1)
    fields = [field for field in SCALES if field in (FORMATS[name].block.names or ())]
    for field in fields:
        part = raw.copy()
        for other in set(fields) - {field}:
            FORMATS[name].blocks(part)[other] = 0
        weights = weights + abs(expanded(name, part).astype(np.float64))
    return weights if fields else abs(expanded(name, raw).astype(np.float64))


def product_error(name: str, raw: Array, records: Array, product: Array) -> float:
    """The largest error of a product (tokens, rows), relative to the sum of its absolute terms."""
    weights = expanded(name, raw).astype(np.float64)
    activations = meant(READERS[name].activation, records, weights.shape[1])
    terms = abs(activations) @ magnitude(name, raw).T
    terms = np.maximum(terms, np.finfo(np.float32).tiny)  # rows of zeros: nothing but 0 will do
    return float((abs(product - activations @ weights.T) / terms).max())


def before_a_fault(values: Array) -> Array:
    """A copy (rows, bytes) that ends where the next byte cannot be read or written."""
    pages = -(-values.nbytes // mmap.PAGESIZE)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), np.uint8)
    end = pages * mmap.PAGESIZE
    closed = ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(memory.ctypes.data + end), ctypes.c_size_t(mmap.PAGESIZE), 0
    )
    assert closed == 0
    copy = memory[end - values.nbytes : end].reshape(values.shape)
    copy[:] = values
    return copy


def check_products(names: Sequence[str]) -> None:
    """Products of a few shapes, weights and activations each ending before a fault.

    For a process of its own, which may die of it: another CPU's instructions, reading too far.
    """
    random = np.random.default_rng(5)
    for name in names:
        kind = READERS[name].activation
        for rows, blocks in ((1, 1), (21, 3), (6, 4)):
            columns = blocks * FORMATS[name].length
            for extreme in (False, True):
                raw = before_a_fault(random_blocks(name, rows, columns, random, extreme))
                records = random_records(kind, 15, columns, random, extreme)
                if kind == NONE:
                    records = np.ascontiguousarray(records[:, : 4 * columns])
                records = before_a_fault(records)
                product = multiply(name, raw, columns, records)
                error = product_error(name, raw, records, product)
                assert error <= PRODUCT_ERROR, f"{name} {rows} x {columns}: {error:.1e}"
                for token in range(len(records)):
                    alone = multiply(name, raw, columns, records[token : token + 1])
                    assert bits(alone[0]) == bits(product[token]), f"{name}: token {token} alone"


# ---- other machines ----

# What compilers call these CPUs; the generic one is what every x86-64 can do.
_BASE = "64bit cx8 cmov fxsr mmx sse sse2"
_AVX2 = f"{_BASE} sse3 ssse3 sse4.1 sse4.2 popcnt avx avx2 fma f16c bmi bmi2 lzcnt"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512vl avx512dq avx512cd"
MACHINES = {
    "generic": "",
    "haswell": _AVX2,
    "alderlake": f"{_AVX2} avxvnni",
    "skylake-avx512": _AVX512,
    "cascadelake": f"{_AVX512} avx512vnni",
}


def compiled_for(cpu: str, cache: Path) -> dict[str, str]:
    """The environment in which kernels are compiled for `cpu`; skips where that cannot run."""
    wanted = MACHINES[cpu].split()
    host = llvmlite.binding.get_host_cpu_features()
    lacking = [feature for feature in wanted or _BASE.split() if not host.get(feature)]
    if lacking:
        pytest.skip(f"this CPU has no {', '.join(lacking)}")
    return {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in wanted),
        "ONDEVICE_CACHE": str(cache),
    }


def run_python(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """Run Python in a process of its own; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout
