"""What opening a model would take, before anything of it is taken.

The forward pass is written down for batches of one token, which tells what a token of a batch and
each thread take. A large batch reads the experts that a prompt touches, most of them, less
often; a small one leaves more memory for the file's weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ondevice import usage
from ondevice.budget import Needs, Plan, available, plan
from ondevice.config import Config
from ondevice.experts import Pool
from ondevice.forward import Forward
from ondevice.gguf_file import GGUFFile
from ondevice.kernels.attention import CACHES
from ondevice.kernels.team import MOST_THREADS
from ondevice.speculate import MODES
from ondevice.speculate import state_bytes as ahead_bytes
from ondevice.state import cache_bytes
from ondevice.state import memory_bytes as state_bytes
from ondevice.weights import Weights
from quant.cores import cores
from quant.errors import UsageError

BATCHES = (2048, 1024, 512)
"""Tokens of a prefill batch, at most."""
BATCH_SHARE = 1 / 16
"""Of a budget that the file does not fit into, what the buffers of a batch may take; the smallest
batch may take more."""
DEFAULT_CONTEXT = 32768
LEAST_CONTEXT = 4096
CONTEXT_SHARE = 0.1
"""Of a budget that the file does not fit into, what the default context's keys and values may take;
down to LEAST_CONTEXT tokens."""


@dataclass(frozen=True)
class Options:
    """How a model is to be opened; as for `ondevice.load`."""

    path: Path
    threads: int | None = None
    context: int | None = None
    memory: int | None = None
    kv: str = "i12"
    mtp: str = "auto"


@dataclass(frozen=True)
class Planned:
    """A model's configuration, and where its bytes would go."""

    config: Config
    plan: Plan
    threads: int
    context: int
    batch: int
    """Tokens of a prefill batch, at most."""
    stage_bytes: int
    """Of the forward pass (program.py)."""
    pool_config: Config
    """In whose layers the pool finds experts: with those of the block that guesses ahead."""
    likely_router_bytes: int


def planned(file: GGUFFile, options: Options) -> Planned:
    """Check the options and the file's tensors, and plan.

    A context that nobody asked for is made smaller where it would take much of a budget.
    Raises UsageError for an option out of range, Error for a file that is not as it should be, and
    ResourceError where the memory is too little.
    """
    if options.kv not in CACHES:
        raise UsageError(f"kv is {options.kv!r}; it must be one of {', '.join(CACHES)}")
    if options.mtp not in MODES:
        raise UsageError(f"mtp is {options.mtp!r}; it must be one of {', '.join(MODES)}")
    threads = _threads(options.threads)
    config = Config.from_gguf(file)
    if options.mtp == "on" and not config.mtp_layers:
        raise UsageError(
            f"{options.path}: the file has no multi-token-prediction block to guess with; "
            "use auto or off"
        )
    context = _context(options.context, config)
    weights = Weights(file, config)
    weights.check()
    predicts = options.mtp != "off" and config.mtp_layers > 0
    pool_config = config
    if predicts:
        layers, others = config.layers + 1, config.mtp_layers - 1
        pool_config = replace(config, layers=layers, mtp_layers=others)
    pool = Pool(weights, pool_config)
    forward = Forward(config, weights, threads, options.kv, options.mtp, pool)
    dense = weights.dense_bytes + weights.likely_router_bytes
    if predicts:
        dense += weights.prediction_bytes

    def needs(context: int, batch: int) -> Needs:
        guessing = options.mtp != "off"
        ahead = ahead_bytes(config, context, options.kv, batch) if guessing else 0
        return Needs(
            file=file.nbytes,
            dense=dense,
            keys_and_values=cache_bytes(config, context, options.kv),
            delta_memory=state_bytes(config),
            buffers=forward.nbytes(batch) + ahead,
            least_pool=pool.least_bytes,
            most_pool=pool.most_bytes,
            expert=pool.expert_bytes,
            slice=pool.slice_bytes,
        )

    memory = options.memory
    budget = memory if isinstance(memory, int) else available()
    batch = _batch(budget, forward.token_bytes, partial(needs, context))
    wanted = needs(context, batch)
    if options.context is None and budget is not None and wanted.mapped > budget:
        while wanted.keys_and_values > CONTEXT_SHARE * budget or wanted.least > budget:
            if context // 2 < LEAST_CONTEXT:
                break
            context //= 2
            wanted = needs(context, batch)
    return Planned(
        config,
        plan(wanted, memory, options.path),
        threads,
        context,
        batch,
        forward.stage_bytes,
        pool_config,
        weights.likely_router_bytes,
    )


def _batch(budget: int | None, token_bytes: int, needs: Callable[[int], Needs]) -> int:
    """Tokens of a prefill batch: the most with which the file fits into memory, or else those
    whose buffers take no more than their share."""
    if budget is None:
        return BATCHES[0]
    for batch in BATCHES:
        if needs(batch).mapped <= budget:
            return batch
    for batch in BATCHES:
        if batch * token_bytes <= BATCH_SHARE * budget and needs(batch).least <= budget:
            return batch
    return BATCHES[-1]


def earlier_use(file: GGUFFile, found: Planned) -> tuple[str, usage.Usage]:
    """What earlier runs noted of a model's experts, and the name it is kept by."""
    name = usage.identity(file, found.config)
    return name, usage.load(name, found.config)


def default_threads() -> int:
    """As many as there are cores for this process."""
    return min(cores(), MOST_THREADS)


def _threads(wanted: int | None) -> int:
    if wanted is None:
        return default_threads()
    if not isinstance(wanted, int) or not 1 <= wanted <= MOST_THREADS:
        raise UsageError(
            f"threads is {wanted!r}; it must be a whole number from 1 to {MOST_THREADS}"
        )
    return wanted


def _context(wanted: int | None, config: Config) -> int:
    if wanted is None:
        return min(config.context_length, DEFAULT_CONTEXT)
    if not isinstance(wanted, int) or not 1 <= wanted <= config.context_length:
        raise UsageError(
            f"the context is {wanted}; this model takes 1 to {config.context_length} tokens"
        )
    return wanted
