"""Compare the speed of this runtime with that of llama.cpp on the same GGUF files.

    python -m benchmarks.compare model.gguf other.gguf
    python -m benchmarks.compare model.gguf --features avx2 --peer-python avx2/bin/python

Both programs run in processes of their own, on the same threads, with the file mapped. After a
round to warm up they are measured by turns; before each round the file is read once, since the
kernel may have dropped pages of it, into large pages where the system has them for files. llama.cpp
takes part twice: as it comes, with most weights copied into layouts of its own, and in the file's
layout alone; the faster one counts. A turn reads a prompt of random tokens, which ends with the
logits after its last one, and writes on, greedily; llama.cpp takes in the same tokens and has none
to choose. The table has the medians of all rounds. Read bandwidth and int8 peak are measured
between the runs of each round (ondevice/bench.py).

Each file becomes a section of docs/benchmarks.md, in the place of an earlier one of the same name.
`--peer-python` names the interpreter whose llama_cpp is used. For a fair `--features avx2`, that
should be built so, in an environment of its own:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \\
        pip install --no-binary llama-cpp-python llama-cpp-python

ik_llama.cpp has no Python package and is left out. Run it on a quiet machine: OpenMP's threads wait
for each other, so any other load slows llama.cpp far more than us. Each section tells the load
average before it began.
"""

import argparse
import datetime
import mmap
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.worker import ROOT, Worker, WorkerFailed
from ondevice.gguf_file import GGUFFile
from quant.errors import Error

PAGE = ROOT / "docs" / "benchmarks.md"
INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.compare`; each section was measured in one go, both programs by
turns on the same threads and the same mapped file, and holds medians. llama.cpp is run as it comes,
with copies of weights in layouts of its own, and without them. The ratio is that of the medians, in
brackets the lowest and the highest of a round. What is measured and how:
[benchmarks/compare.py](../benchmarks/compare.py), [ondevice/bench.py](../ondevice/bench.py).
ik_llama.cpp is not among them: there is no Python package of it.
"""
DECODE, PREFILL, SHORT = (512, 64), (512, 64), (64, 1)
EMPTY = (1, 64)
OURS, PEERS = "ondevice", {"own": "llama.cpp", "file": "llama.cpp, file's layout"}
DEEP_ROUNDS = 3  # each takes minutes
AVX2 = (
    *("64bit", "cx8", "cmov", "fxsr", "mmx", "sse", "sse2", "sse3", "ssse3", "sse4.1", "sse4.2"),
    *("popcnt", "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt"),
)
FEATURES: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in AVX2),
    },
}
Case = tuple[int, int]
"""Tokens of the prompt and tokens to write."""


class Rounds:
    """Seconds of our runs and of the peers', per case, as they alternate."""

    def __init__(self, ours: Worker, peers: dict[str, Worker]) -> None:
        self._ours = ours
        self.peers = peers
        self.seconds: dict[tuple[str, str, Case], list[float]] = {}

    def measure(self, case: Case, with_peers: bool = True, profile: bool = False) -> None:
        """One turn of each program; its first turn at a case warms up and is not kept."""
        first = (OURS, "prefill", case) not in self.seconds
        found = self._ours.ask(case=case, profile=profile)
        self._keep(OURS, case, found, first)
        tokens = {name: found[name] for name in ("prompt", "decoded")}
        for name, peer in self.peers.items() if with_peers else ():
            self._keep(name, case, peer.ask(**tokens), first)

    def rate(self, whose: str, part: str, case: Case) -> float | None:
        """Median tokens per second, None where nothing was measured."""
        seconds = self.seconds.get((whose, part, case))
        return _tokens(part, case) / statistics.median(seconds) if seconds else None

    def ratios(self, whose: str, part: str, case: Case) -> list[float]:
        """How many times as fast as a peer ours was, per round."""
        ours, theirs = (self.seconds[name, part, case] for name in (OURS, whose))
        return [b / a for a, b in zip(ours, theirs, strict=True)]

    def _keep(self, whose: str, case: Case, found: dict[str, Any], first: bool) -> None:
        for part in ("prefill", "decode"):
            kept = self.seconds.setdefault((whose, part, case), [])
            if not first:
                kept += found[f"{part}_seconds"]


def _tokens(part: str, case: Case) -> int:
    return case[0] if part == "prefill" else case[1]


def compare(path: Path, arguments: argparse.Namespace, say: Callable[[str], None]) -> str:
    """Measure one file; returns its section of the page."""
    cases = [DECODE, SHORT]
    deep = [(arguments.depth, DECODE[1]), EMPTY] if arguments.depth else []
    load = os.getloadavg()[0]
    context = max(sum(case) for case in cases + deep) + 64
    environment = FEATURES[arguments.features]
    threads = arguments.threads
    say(f"{path.name}: opening")
    ours = Worker(
        sys.executable,
        "benchmarks.ondevice_worker",
        *(path, threads, context),
        environment=environment,
    )
    peers = {
        PEERS[layout]: Worker(
            arguments.peer_python,
            "benchmarks.llama_cpp_worker",
            *(path, threads, context, int(layout == "own")),
            environment={},
        )
        for layout in arguments.layouts
    }
    rounds = Rounds(ours, peers)
    for number in range(arguments.rounds + 1):
        say(f"{path.name}: {f'round {number}' if number else 'warming up'}")
        read(path)
        for case in cases:
            rounds.measure(case, profile=number > 0 and case == DECODE)
        for case in deep if number <= DEEP_ROUNDS else []:
            rounds.measure(case, with_peers=arguments.depth_peers)
    figures = ours.ask(case=DECODE, figures=True)
    page = section(path, arguments, load, rounds, figures, ours.greeting)
    for worker in (ours, *peers.values()):
        worker.close()
    return page


def read(path: Path) -> None:
    """Read a file to its end, so that it is in the page cache, in pages as large as a model's."""
    with GGUFFile.open(path) as file:
        file.want_large_pages()
        for tensor in file.tensors.values():
            tensor.data[:: mmap.PAGESIZE].max()


def section(
    path: Path,
    arguments: argparse.Namespace,
    load: float,
    rounds: Rounds,
    figures: dict[str, Any],
    greeting: dict[str, Any],
) -> str:
    """The page's section about a file."""
    rows = [
        _row(rounds, "decode", DECODE, "decode, 64 tokens after 512"),
        _row(rounds, "prefill", PREFILL, "prefill, 512 tokens"),
        _row(rounds, "prefill", SHORT, "prefill, 64 tokens"),
    ]
    if arguments.depth:
        deep = (arguments.depth, DECODE[1])
        rows += [
            _row(rounds, "decode", EMPTY, "decode, 64 tokens after 1"),
            _row(rounds, "decode", deep, f"decode, 64 tokens after {arguments.depth}"),
            _row(rounds, "prefill", deep, f"prefill, {arguments.depth} tokens"),
        ]
    peak = figures["int8_peak"]
    decode, prefill = figures["decode"], figures["prefill"]
    fractions = figures["fractions"]
    read_bytes = [figures[f"{name}bytes_per_token"] / 1e6 for name in ("", "state_", "cache_")]
    facts = [
        (
            "read bandwidth",
            f"{figures['read_bandwidth'] / 1e9:.2f} GB/s",
        ),
        (
            "bytes of a decode step",
            f"{sum(read_bytes):.1f} MB: weights {read_bytes[0]:.1f}, state {read_bytes[1]:.1f}, "
            f"keys and values {read_bytes[2]:.1f}",
        ),
        ("limit of decode", f"{figures['decode_limit_tokens_per_second']:.2f} tokens/s"),
        (
            "**fraction of the limit**",
            f"**{statistics.median(fractions):.3f}** ({min(fractions):.2f}-{max(fractions):.2f}), "
            "of each round's",
        ),
        ("int8 peak", f"{peak / 1e9:.0f} GMAC/s"),
        *(
            (
                f"prefill, {name}",
                f"{figures[f'prefill_{key}macs_per_second'] / 1e9:.1f} GMAC/s, "
                f"{figures[f'prefill_{key}fraction_of_int8_peak']:.3f} of the peak",
            )
            for name, key in (
                ("everything", ""),
                ("dense products", "dense_"),
                ("experts", "expert_"),
            )
        ),
        (
            "decode, barriers and serial operations",
            f"{decode['barrier_fraction']:.1%} and {decode['serial_fraction']:.1%} of a step",
        ),
        (
            "prefill, barriers and serial operations",
            f"{prefill['barrier_fraction']:.1%} and {prefill['serial_fraction']:.1%}",
        ),
        (
            "opening the file",
            f"{greeting['load_seconds']:.2f} s, {greeting['compile_seconds']:.2f} for kernels",
        ),
    ]
    if arguments.depth:
        facts += _depth_facts(rounds, (arguments.depth, DECODE[1]))
    peers = rounds.peers
    version = next((peer.greeting["version"] for peer in peers.values()), "was not run")
    lines = [
        f"## {heading(path, arguments.features)}",
        "",
        f"{datetime.date.today()}, {machine()}; {path.stat().st_size / 1e9:.2f} GB, "
        f"{arguments.threads} threads, {arguments.rounds} rounds; "
        f"load average before it {load:.1f}.",
        "",
        f"- ondevice {greeting['version']}",
        f"- llama.cpp {version}",
        "",
        f"| tokens per second | {' | '.join([OURS, *peers])} | ratio to the faster |",
        "|---" * (len(peers) + 3) + "|",
        *rows,
        "",
        "| ondevice | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
    ]
    return "\n".join(lines) + "\n"


def _row(rounds: Rounds, part: str, case: Case, name: str) -> str:
    rates = {whose: rounds.rate(whose, part, case) for whose in (OURS, *rounds.peers)}
    cells = [f"{rate:.2f}" if rate else "-" for rate in rates.values()]
    ours = rates.pop(OURS)
    best, peer = max(((rate, peer) for peer, rate in rates.items() if rate), default=(0.0, ""))
    ratio = "-"
    if ours and best:
        each = rounds.ratios(peer, part, case)
        ratio = f"**{ours / best:.2f}** ({min(each):.2f}-{max(each):.2f})"
    return f"| {name} | {' | '.join(cells)} | {ratio} |"


def _depth_facts(rounds: Rounds, deep: Case) -> list[tuple[str, str]]:
    facts = []
    for name, part, other in (
        (f"decode at {deep[0]} against an empty context", "decode", EMPTY),
        (f"prefill of {deep[0]} against 512", "prefill", PREFILL),
    ):
        pair = rounds.rate(OURS, part, deep), rounds.rate(OURS, part, other)
        if pair[0] and pair[1]:
            facts.append((name, f"{pair[0] / pair[1]:.3f}"))
    return facts


def heading(path: Path, features: str) -> str:
    """What a section is called, and known by."""
    return path.name if features == "native" else f"{path.name}, {features.upper()} only"


def machine() -> str:
    """The processor, its cores, the memory and the system."""
    name, memory = platform.processor() or platform.machine(), ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*: (.*)$", information.read_text(), re.MULTILINE)
        name = found[1] if found else name
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return f"{name}, {os.cpu_count()} cores{memory}, {platform.system()}"


def merged(page: str, new: str) -> str:
    """The page with a section in the place of the one with its heading, or at the end."""
    _, *sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    title = new.splitlines()[0]
    names = [old.splitlines()[0] for old in sections]
    if title in names:
        sections[names.index(title)] = new
    else:
        sections.append(new)
    return "\n".join(part.strip("\n") + "\n" for part in (INTRODUCTION, *sections))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare speeds with those of llama.cpp.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--depth", type=int, default=0, help="also with so long a context: 16384")
    parser.add_argument("--depth-peers", action="store_true", help="at that depth llama.cpp, too")
    parser.add_argument("--features", choices=FEATURES, default="native", help="what ours may use")
    parser.add_argument("--peer-python", default=sys.executable, help="whose llama_cpp to run")
    parser.add_argument(
        "--layouts",
        nargs="*",
        choices=PEERS,
        default=list(PEERS),
        help="llama.cpp's weights: in its own layouts, as in the file; without any: not run",
    )
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    try:
        for path in arguments.files:
            part = compare(path.resolve(), arguments, say)
            page = arguments.output.read_text("utf-8") if arguments.output.exists() else ""
            arguments.output.write_text(merged(page, part), "utf-8")
            print(part, flush=True)
    except (WorkerFailed, OSError, Error) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
