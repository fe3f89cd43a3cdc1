"""How fast a model runs on this machine, beside what the machine would allow.

    prefill   tokens of a prompt per second, until the logits that follow the last one are there
    decode    tokens per second one after the other, each the likeliest that is not among the 64
              before it: a model that repeats itself would find its experts in the caches
    limit     read bandwidth / bytes of a decode step: every dense weight, the chosen experts, the
              recurrent state once read and once written, keys and values so far. Where experts come
              from disk, no more than the disk's bandwidth / bytes that came from it; that is what
              the readers got while they read
    MACs      multiply-adds of a prompt's token with weight matrices, those of the file's shapes;
              per second of the whole prefill, and of the time that its dense products and its
              experts take, which a run of its own measures operation by operation

A first round warms up. Each round then measures the machine before, between and after prefill and
decode; speeds, bandwidth and peak are medians over all rounds, so that the fractions compare
speeds with what the machine had to give in the same seconds. What is left in caches between tokens
is read faster than memory: a small model may exceed the limit.
"""

import math
import statistics
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ondevice.experts import READERS, Counts
from ondevice.forecast import what_limits
from ondevice.generate import batch_of
from ondevice.inspection import describe
from ondevice.kernels import layout
from ondevice.machine import Machine
from ondevice.profile import DENSE, EXPERTS, Profile, table
from ondevice.sampling import Sampling
from ondevice.state import State, cache_bytes, memory_bytes
from quant.errors import UsageError
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model

NEVER_AGAIN = 100.0  # the highest penalty for a repeated token


class Runner:
    """Runs prefill and decode from a fixed point, `depth` random tokens into a text."""

    def __init__(self, model: "Model", prompt: int, generate: int, depth: int = 0) -> None:
        for name, value, least in (
            ("prompt", prompt, 1),
            ("generate", generate, 1),
            ("depth", depth, 0),
        ):
            check(name, value, least)
        model.check_room(depth + prompt + generate)
        self._model = model
        self._prompt, self._generate = prompt, generate
        tokens = np.random.default_rng(0).integers(0, model.config.vocabulary, depth + prompt)
        self._tokens = tokens.astype(np.int32)
        self._state = State(model.config, model.context, model.kv)
        self._step = model.step(self._state)
        self._first = np.zeros(1, np.int32)
        self._history = np.zeros(generate + 2, np.int32)
        self._no_ends = np.zeros_like(model.ends)
        self._sampler = Sampling(temperature=0.0, repeat_penalty=NEVER_AGAIN).record(
            model.logits_address, model.config.vocabulary, self._no_ends, model.sampling_space
        )
        addresses = self._sampler.ctypes.data, self._history.ctypes.data
        self._step[[layout.SAMPLER, layout.HISTORY]] = addresses
        self._read(self._tokens[:depth])
        self._start = self._state.snapshot()
        most = min(prompt, model.batch)
        programs, threads = model.programs, model.threads
        self.prefill_profile = Profile(programs["prefill"], threads, most, prompt)
        self.decode_profile = Profile(programs["decode"], threads, 1, generate)

    def prefill(self, profiled: bool = False) -> float:
        """Seconds to read the prompt, from the fixed point."""
        self._state.restore(self._start)
        prompt = self._tokens[-self._prompt :]
        with self.prefill_profile.run() if profiled else nullcontext() as times:
            started = time.perf_counter()
            last = self._read(prompt, times)
        self._step[[layout.COUNT, layout.FIRST]] = 1, last
        self._model.run(self._model.programs["head"], self._step)
        return time.perf_counter() - started

    def decode(self, profiled: bool = False) -> float:
        """Seconds to write on, from where the sequence is."""
        step = self._step
        step[[layout.TOKENS, layout.HISTORY_LENGTH]] = self._first.ctypes.data, 1
        step[layout.STEPS_LEFT] = self._generate
        with self.decode_profile.run() if profiled else nullcontext() as times:
            started = time.perf_counter()
            self._model.decode(self._state, step, self._model.threads, profile=times)
            return time.perf_counter() - started

    @property
    def prompt(self) -> list[int]:
        """The tokens that `prefill` takes in."""
        return [int(token) for token in self._tokens[-self._prompt :]]

    @property
    def decoded(self) -> list[int]:
        """The tokens that the last `decode` took in, the first of them always 0."""
        return [int(token) for token in self._history[: self._generate]]

    def _read(self, tokens: Array, profile: Array | None = None) -> int:
        """Take tokens into the state; returns the last one's row in its batch."""
        begin, last = 0, 0
        while begin < len(tokens):
            last = batch_of(len(tokens) - begin, self._model.batch)
            batch = np.ascontiguousarray(tokens[begin : begin + last])
            begin += last
            if profile is None:
                self._model.prefill(self._state, self._step, batch)
            else:
                self._model.prefill(self._state, self._step, batch, profile=profile)
        return last - 1


class Measurement:
    """Rounds of prefill and decode, the machine's probes around them, and what they come to."""

    def __init__(
        self,
        model: "Model",
        prompt: int = 512,
        generate: int = 128,
        depth: int = 0,
        machine: Machine | None = None,
    ) -> None:
        self.runner = Runner(model, prompt, generate, depth)
        self._model = model
        self._options = {"prompt": prompt, "generate": generate, "depth": depth}
        self.runner.prefill()
        self.runner.decode()
        self._memory = peak_memory()  # the probes take more
        self.machine = machine or Machine(model.run, model.threads, model.pool_memory())
        self._experts = Counts()
        self.prefills: list[float] = []
        self.decodes: list[float] = []
        # three a round: before prefill, before decode, after it
        self._bandwidths: list[float] = []
        self._peaks: list[float] = []

    def round(self) -> None:
        """Measure once."""
        self._bandwidths.append(self.machine.read_bandwidth())
        self._peaks.append(self.machine.int8_peak())
        self.prefills.append(self.runner.prefill())
        self._peaks.append(self.machine.int8_peak())
        self._bandwidths.append(self.machine.read_bandwidth())
        before = self._model.expert_counts
        self.decodes.append(self.runner.decode())
        self._experts += self._model.expert_counts - before
        self._bandwidths.append(self.machine.read_bandwidth())

    def profile(self, decode: bool = True) -> None:
        """Run once more and note where the time goes, at least in prefill."""
        self.runner.prefill(profiled=True)
        if decode:
            self.runner.decode(profiled=True)

    @property
    def fractions(self) -> list[float]:
        """What each round's decode had of the limit that memory set right before and after it."""
        figures = self.figures()
        token = sum(figures[f"{name}bytes_per_token"] for name in ("", "state_", "cache_"))
        moved = self._options["generate"] * token
        around = zip(self._bandwidths[1::3], self._bandwidths[2::3], self.decodes, strict=True)
        return [moved / seconds / ((before + after) / 2) for before, after, seconds in around]

    def figures(self) -> dict[str, Any]:
        """Medians of the rounds; rates are per second."""
        model, prompt, generate, depth = self._model, *self._options.values()
        description = describe(model.path)
        weights = int(description["bytes_per_token"])
        state = 2 * memory_bytes(model.config)
        cache = cache_bytes(model.config, depth + prompt + generate // 2, model.kv)
        bandwidth = statistics.median(self._bandwidths)
        peak = statistics.median(self._peaks)
        limit = bandwidth / (weights + state + cache)
        came, tokens = self._experts, generate * len(self.decodes)
        disk = came.bytes_read / came.reading * READERS if came.reading else 0.0
        if came.bytes_read:
            limit = min(limit, disk / (came.bytes_read / tokens))
        waiting = came.waiting / model.threads / sum(self.decodes)
        prefill = prompt / statistics.median(self.prefills)
        decode = generate / statistics.median(self.decodes)
        macs = macs_per_token(description)
        profile = self.runner.prefill_profile
        dense, experts = (
            amount * profile.tokens / (profile.seconds(*names) or math.inf)
            for amount, names in zip(macs, (DENSE, EXPERTS), strict=True)
        )
        return {
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
            "bytes_per_token": weights,
            "state_bytes_per_token": state,
            "cache_bytes_per_token": cache,
            "read_bandwidth": bandwidth,
            "expert_hit_rate": came.hit_rate,
            "disk_bytes_per_token": came.bytes_read / tokens,
            "disk_bandwidth": disk,
            "disk_wait_fraction": waiting,
            "limited_by": what_limits(model.plan, came.hit_rate, waiting),
            "decode_limit_tokens_per_second": limit,
            "decode_fraction_of_limit": decode / limit,
            "int8_peak": peak,
            "prefill_macs_per_token": sum(macs),
            "prefill_macs_per_second": sum(macs) * prefill,
            "prefill_dense_macs_per_second": dense,
            "prefill_expert_macs_per_second": experts,
            "prefill_fraction_of_int8_peak": sum(macs) * prefill / peak,
            "prefill_dense_fraction_of_int8_peak": dense / peak,
            "prefill_expert_fraction_of_int8_peak": experts / peak,
            "load_seconds": model.load_seconds,
            "compile_seconds": model.compile_seconds,
            "peak_memory": self._memory,
            "threads": model.threads,
            **self._options,
            "repeat": len(self.prefills),
        }

    def summaries(self) -> dict[str, Any]:
        """Where the time went in decode and in prefill, per token (ondevice/profile.py)."""
        return {
            "decode": self.runner.decode_profile.summary(),
            "prefill": self.runner.prefill_profile.summary(),
        }


def run(
    model: "Model",
    prompt: int = 512,
    generate: int = 128,
    depth: int = 0,
    repeat: int = 3,
    profile: bool = False,
) -> dict[str, Any]:
    """Speeds of prefill and decode; `depth` tokens are in the context before either is timed.

    Rates are per second; `profile` adds where the time goes, operation by operation.
    """
    check("repeat", repeat, 1)
    measurement = Measurement(model, prompt, generate, depth)
    for _ in range(repeat):
        measurement.round()
        measurement.profile(decode=profile)
    return measurement.figures() | ({"profile": measurement.summaries()} if profile else {})


def macs_per_token(description: dict[str, Any]) -> tuple[int, int]:
    """Multiply-adds of one token with the layers' dense matrices and with its chosen experts.

    From what `inspection.describe` says; without the output head, which a prompt's tokens but the
    last one skip, and the convolution.
    """
    config = description["config"]
    dense, experts = 0, 0
    for tensor in description["tensors"]:
        block, _, part = tensor["name"].removeprefix("blk.").partition(".")
        if not block.isdigit() or int(block) >= config["layers"]:
            continue
        size = math.prod(tensor["shape"])
        if part.endswith("_exps.weight"):
            experts += size // config["experts"] * config["experts_used"]
        elif part == "ffn_gate_inp_shexp.weight":
            dense += size  # one row, which may be written as a vector
        elif len(tensor["shape"]) > 1 and part != "ssm_conv1d.weight":
            dense += size
    return dense, experts


def report(found: dict[str, Any]) -> str:
    """What `run` returns, as lines to read."""

    def macs(name: str) -> str:
        rate, fraction = found[f"prefill_{name}macs_per_second"], f"prefill_{name}fraction"
        return f"{rate / 1e9:.1f} GMAC/s ({found[f'{fraction}_of_int8_peak']:.0%} of the peak)"

    moved = [found[f"{name}bytes_per_token"] / 1e6 for name in ("", "state_", "cache_")]
    after = found["depth"] + found["prompt"]
    rows = [
        ("prefill", f"{found['prefill_tokens_per_second']:.5g} tokens/s: {found['prompt']} tokens"),
        (
            "decode",
            f"{found['decode_tokens_per_second']:.4g} tokens/s: {found['generate']} tokens "
            f"after {after}, on {found['threads']} threads",
        ),
        (
            "limit",
            f"{found['decode_limit_tokens_per_second']:.4g} tokens/s; decode has "
            f"{found['decode_fraction_of_limit']:.0%} of it",
        ),
        (
            "per token",
            f"{sum(moved):.1f} MB: weights {moved[0]:.1f}, state {moved[1]:.1f}, "
            f"keys and values {moved[2]:.1f}",
        ),
        *(disk_rows(found) if found["disk_bytes_per_token"] else ()),
        ("memory reads", f"{found['read_bandwidth'] / 1e9:.2f} GB/s"),
        ("int8 peak", f"{found['int8_peak'] / 1e9:.1f} GMAC/s"),
        ("products", f"{macs('')} over the whole prefill"),
        ("  dense", macs("dense_")),
        ("  experts", macs("expert_")),
        (
            "start",
            f"{found['load_seconds']:.2f} s, {found['compile_seconds']:.2f} of them for kernels",
        ),
        ("peak memory", f"{found['peak_memory'] / 1e6:,.0f} MB, mapped weights included"),
        ("limited by", found["limited_by"]),
    ]
    lines = [f"{label:<13} {text}" for label, text in rows]
    for name, summary in found.get("profile", {}).items():
        lines += ["", table(summary, f"{name}, per token")]
    return "\n".join(lines)


def disk_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on what came from the disk."""
    return [
        (
            "disk",
            f"{found['disk_bytes_per_token'] / 1e6:.1f} MB per token at "
            f"{found['disk_bandwidth'] / 1e9:.2f} GB/s; {found['expert_hit_rate']:.1%} of experts "
            f"were in memory, {found['disk_wait_fraction']:.0%} of the time went to waiting",
        )
    ]


def check(name: str, value: object, least: int) -> None:
    """UsageError unless the value is a whole number from `least`."""
    if not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {least}")


def peak_memory() -> int:
    """Most bytes of memory that this process has had at once; 0 where the platform does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
