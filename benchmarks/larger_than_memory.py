"""Speed under a memory budget, inside a kernel limit, beside llama.cpp under the same one.

    python -m benchmarks.larger_than_memory FILE --memory 16G 8G 4G
    python -m benchmarks.larger_than_memory FILE --memory 3.57G --llama-cpp

Each program runs in a process of its own whose control group may take the budget and a tenth more;
that needs a control group that can be written to. Ours first reads a prompt and writes WARM tokens,
until the pool is as it stays; then prompt and decoding are timed. llama.cpp maps the file without
copies in layouts of its own (which are killed) and takes random tokens one by one.

Before each run `inspect` says how fast it will be, in a process of its own under the same limit:
for a file that it has not seen, when the model writes some tokens first, and from what earlier runs
noted.

The bound is the larger of what computing and what the disk take: the time per token in which
threads did not wait, and the bytes that came from disk over what the disk gives the same reads
alone, measured right afterwards. For the prompt, it is the larger of the time in which threads did
not wait and of the time that readers were in reads. Writes a section of docs/benchmarks.md.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare import PAGE, machine, merged
from benchmarks.worker import ROOT
from ondevice.console import size

GROUP = "ondevice-benchmark"
PROMPT, WARM, GENERATE, ROUNDS = 512, 64, 48, 3
LONGEST = 300.0  # seconds for a program that has come to a standstill


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    """A control group with that limit: the file to write a process's number to."""
    top = Path("/sys/fs/cgroup")
    old = (top / "memory" / "memory.limit_in_bytes").exists()
    group = (top / "memory" if old else top) / GROUP
    group.mkdir(exist_ok=True)
    try:
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(nbytes))
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def faults() -> int:
    """Major page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def ours(path: Path, memory: int) -> dict[str, Any]:
    """Measure this runtime."""
    import ondevice
    from ondevice import disk
    from ondevice.bench import Runner
    from ondevice.experts import READERS

    with ondevice.load(path, memory=memory) as model:
        if model.ahead is not None:
            model.ahead.depth.fixed = 0  # a synthetic head cannot predict
        runner = Runner(model, PROMPT, GENERATE)
        warming = Runner(model, PROMPT, WARM)
        before = model.expert_counts
        first = runner.prefill()
        prompt = model.expert_counts - before
        warming.prefill()
        warming.decode()
        before, faulted, seconds = model.expert_counts, faults(), 0.0
        for _ in range(ROUNDS):
            seconds += runner.decode()
        counts = model.expert_counts - before
        faulted = faults() - faulted
        waiting = counts.waiting / model.threads / seconds
        plan = model.plan
    rate = disk.bandwidth(path, plan.needs.slice, READERS)
    tokens = GENERATE * ROUNDS
    each = seconds / tokens
    computing = each * (1 - waiting)
    from_disk = counts.bytes_read / tokens / rate
    busy, thinking = prompt.reading / READERS, first - prompt.waiting / model.threads
    return {
        "tokens_per_second": 1 / each,
        "hit_rate": counts.hit_rate,
        "disk_bytes_per_token": counts.bytes_read / tokens,
        "disk_bandwidth": rate,
        "readers_got": counts.bytes_read / counts.reading * READERS if counts.reading else 0.0,
        "waiting": waiting,
        "fraction_of_bound": max(computing, from_disk) / each,
        "major_faults": faulted,
        "prefill_seconds": first,
        "prefill_computing": thinking,
        "prefill_disk_busy": busy,
        "prefill_of_longer": first / max(thinking, busy),
        "prefill_reads": prompt.bytes_read / plan.needs.expert,
        "prefill_touched": prompt.hits + prompt.late + prompt.misses,
    }


def forecasts(path: Path, memory: int) -> dict[str, Any]:
    """What `inspect` expects, with what earlier runs noted and as on the first day."""
    from ondevice import inspection, usage

    with tempfile.TemporaryDirectory() as folder:
        root, usage.cache_root = usage.cache_root, lambda: Path(folder)
        try:
            fresh = inspection.predict(path, memory)
        finally:
            usage.cache_root = root
    found = inspection.predict(path, memory)
    return {
        "by_trial": fresh["tokens_per_second"],
        "by_runs": found["tokens_per_second"],
        "details": [fresh, found],
    }


def theirs(path: Path) -> dict[str, Any]:
    """Measure llama.cpp."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.use_mmap, options.use_extra_bufts = True, False
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    settings = lib.llama_context_default_params()
    settings.n_ctx = 1024
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    session = lib.llama_init_from_model(model, settings)
    random = np.random.default_rng(0)

    def step() -> None:
        token = (ctypes.c_int32 * 1)(int(random.integers(100_000)))
        batch = lib.llama_batch_get_one(ctypes.cast(token, ctypes.POINTER(ctypes.c_int32)), 1)
        if lib.llama_decode(session, batch):
            sys.exit("llama_decode failed")
        lib.llama_synchronize(session)

    for _ in range(4):
        step()
    before, started, done = faults(), time.perf_counter(), 0
    while done < GENERATE and time.perf_counter() - started < LONGEST:
        step()
        done += 1
    seconds = time.perf_counter() - started
    return {"tokens_per_second": done / seconds, "major_faults": faults() - before}


def run(who: str, path: Path, memory: int) -> dict[str, Any] | None:
    """One program in a process of its own; None if it was killed."""
    with limited(memory + memory // 10) as group:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
        command = [sys.executable, "-m", "benchmarks.larger_than_memory", str(path)]
        done = subprocess.run(
            [*command, "--memory", str(memory), "--alone", who, "--group", str(group)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        time.sleep(0.5)  # its memory is the group's until it is gone
    if done.returncode < 0:
        return None
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def section(path: Path, budgets: list[int], peer: bool) -> str:
    """Measure every budget; a section of the page."""
    rows, prompts = [], []
    for memory in budgets:
        expected = run("forecasts", path, memory)
        found = run("ours", path, memory)
        assert found is not None and expected is not None, "killed"
        other = run("theirs", path, memory) if peer else None
        cells = [
            f"{memory / (1 << 30):.3g}G",
            f"{found['tokens_per_second']:.2f}",
            *(_compared(expected[name], found) for name in ("by_trial", "by_runs")),
            f"{found['hit_rate']:.3f}",
            f"{found['disk_bytes_per_token'] / 1e6:.1f} MB",
            f"{found['disk_bandwidth'] / 1e9:.2f} GB/s",
            f"{found['readers_got'] / 1e9:.2f} GB/s",
            f"{found['waiting']:.0%}",
            f"**{found['fraction_of_bound']:.2f}**",
            str(found["major_faults"]),
        ]
        if peer:
            speed = other["tokens_per_second"] if other else 0.0
            ratio = f"**{found['tokens_per_second'] / speed:.1f}**" if other else "-"
            cells += [f"{speed:.2f}" if other else "killed", ratio]
        rows.append(f"| {' | '.join(cells)} |")
        prompts.append(
            f"- {memory / (1 << 30):.3g}G: a prompt of {PROMPT} tokens from an empty pool in "
            f"{found['prefill_seconds']:.1f} s: threads computed {found['prefill_computing']:.1f}, "
            f"the disk was busy {found['prefill_disk_busy']:.1f}; "
            f"{found['prefill_of_longer']:.2f} of the longer one; "
            f"{found['prefill_reads']:.0f} experts read, {found['prefill_touched']} touched."
        )
        print(rows[-1], prompts[-1], sep="\n", file=sys.stderr)
        for name, details in zip(("a trial", "last runs"), expected["details"], strict=True):
            print(f"expected by {name}: {details}", file=sys.stderr)
    names = ["budget", "tokens/s", "expected by a trial", "by last runs", "in memory"]
    names += ["from disk per token", "disk", "readers got", "waiting"]
    names += ["of the bound", "major faults"] + (["llama.cpp, mapped", "ratio"] if peer else [])
    return "\n".join(
        [
            f"## {path.name}, larger than memory",
            "",
            f"{datetime.date.today()}, {machine()}; {path.stat().st_size / 1e9:.2f} GB. Kernel "
            f"limit: the budget and a tenth. {ROUNDS} x {GENERATE} tokens decoded; "
            "[benchmarks/larger_than_memory.py](../benchmarks/larger_than_memory.py).",
            "",
            f"| {' | '.join(names)} |",
            "|---" * len(names) + "|",
            *rows,
            "",
            *prompts,
            "",
        ]
    )


def _compared(expected: float, found: dict[str, Any]) -> str:
    return f"{expected:.2f} ({expected / found['tokens_per_second'] - 1:+.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed under a memory budget.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--memory", nargs="+", required=True, type=size)
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp beside it")
    parser.add_argument("--alone", choices=["ours", "theirs", "forecasts"], help=argparse.SUPPRESS)
    parser.add_argument("--group", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    path = arguments.file.resolve()
    if arguments.alone:
        arguments.group.write_text(str(os.getpid()))
        memory = arguments.memory[0]
        measures = {
            "ours": lambda: ours(path, memory),
            "theirs": lambda: theirs(path),
            "forecasts": lambda: forecasts(path, memory),
        }
        print(json.dumps(measures[arguments.alone]()))
        return
    part = section(path, arguments.memory, arguments.llama_cpp)
    page = arguments.output.read_text("utf-8") if arguments.output.exists() else ""
    arguments.output.write_text(merged(page, part), "utf-8")
    print(part)


if __name__ == "__main__":
    main()
