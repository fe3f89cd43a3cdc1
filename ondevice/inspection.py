"""What a model file holds and what one token costs, from its header alone.

    active parameters  = weights that take part in one token: every dense tensor of the trunk and
                         the output, and experts_used of each stack of experts; not the embedding,
                         of which one row is looked up
    bytes per token    = the bytes of those weights and of one embedding row: what one decode step
                         reads from memory, so bandwidth / bytes per token bounds its speed
    state              = per sequence, of any length: the delta memories (value_heads x state x
                         state) and the convolution windows, float32
    keys and values    = per token of context: attention layers x 2 x kv_heads x head_dim, 2 bytes

The multi-token-prediction block is counted in `parameters` and in the file's bits per weight, and
on its own as `mtp_parameters`; a plain decode step does not read it.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice.config import Config
from ondevice.gguf_file import GGUFFile, Tensor
from ondevice.weights import Weights

if TYPE_CHECKING:
    from quant.compiling import Report

READINGS = 40
"""Of the memory's bandwidth, 1.5 seconds before and after the disk is looked at."""
SURE = 0.1
"""Share of the readings that may be below the one that counts: a shared host may give a machine
nearly twice its usual bandwidth for seconds, but not for as long as an answer takes."""
_EXPERTS = "_exps.weight"
_EMBEDDING = "token_embd.weight"
_SAMPLING = "general.sampling."
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of the model file at `path`, ready for JSON; Error if it is not a sound model."""
    with GGUFFile.open(Path(path)) as file:
        config = Config.from_gguf(file)
        weights = Weights(file, config)
        weights.check()
        needed = [file.tensors[name] for name, _ in weights.needed()]
        trunk = [tensor for tensor in needed if not _is_prediction(tensor.name, config)]
        prediction = [tensor for tensor in needed if _is_prediction(tensor.name, config)]
        embedding = file.tensors[_EMBEDDING]
        parameters = sum(_weights_of(tensor) for tensor in file.tensors.values())
        tensor_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
        tied = not weights.has("output.weight")
        active = [tensor for tensor in trunk if tied or tensor.name != _EMBEDDING]
        return {
            "file": str(file.path),
            "parts": len(file.parts),
            "bytes": file.nbytes,
            "architecture": config.architecture,
            "name": config.name,
            "parameters": parameters,
            "active_parameters": sum(
                _used(tensor, _weights_of(tensor), config) for tensor in active
            ),
            "mtp": bool(config.mtp_layers),
            "mtp_parameters": sum(_weights_of(tensor) for tensor in prediction),
            "bits_per_weight": 8 * tensor_bytes / parameters,
            "bytes_per_token": sum(_used(tensor, tensor.nbytes, config) for tensor in active)
            + embedding.format.row_bytes(config.hidden),
            "state_bytes": state_bytes(config),
            "kv_bytes_per_token": kv_bytes_per_token(config),
            "sampling": _sampling(file.metadata),
            "config": dataclasses.asdict(config),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "type": tensor.format.name,
                    "bytes": tensor.nbytes,
                }
                for tensor in file.tensors.values()
            ],
        }


def predict(
    path: str | os.PathLike[str],
    memory: int,
    threads: int | None = None,
    context: int | None = None,
    kv: str = "i12",
    progress: Callable[[int, int], None] | None = None,
    compiling: "Report | None" = None,
) -> dict[str, Any]:
    """Where the bytes of a budget go, and how fast this machine would write with it.

    Measures the bandwidths of memory and disk: takes 8 to 17 seconds. Where experts would come from
    disk and no run has shown yet which ones, the model reads and writes some text first;
    progress(done, all) is told how many tokens, and `compiling` how many kernels are compiled.
    """
    from ondevice import disk, trial
    from ondevice.budget import available
    from ondevice.experts import READERS
    from ondevice.forecast import disk_rate, forecast, what_limits
    from ondevice.kernels.team import Team
    from ondevice.machine import Machine
    from ondevice.planning import Options, default_threads, earlier_use, planned

    options = Options(Path(path), threads, context, memory, kv)
    with GGUFFile.open(options.path) as file:
        found = planned(file, options)
        _, usage = earlier_use(file, found)
        if found.plan.cached and not usage.known and memory <= (available() or memory):
            trial.write_some(options, progress, compiling)
            _, usage = earlier_use(file, found)
    described = describe(path)
    config, plan = described["config"], found.plan
    token = described["bytes_per_token"] + 2 * described["state_bytes"]
    token += found.likely_router_bytes if plan.cached else 0
    threads = threads or default_threads()
    team, rate = Team(threads), 0.0
    try:
        machine = Machine(lambda operations, step: team.run(operations.records, step), threads)
        readings = [machine.read_bandwidth() for _ in range(READINGS)]
        if plan.cached:
            probed = disk.bandwidth(Path(path), plan.needs.slice, READERS)
            noted = usage.bytes_per_reading_second
            rate = disk_rate(probed, noted and noted * READERS)
        readings += [machine.read_bandwidth() for _ in range(READINGS)]
    finally:
        team.close()
    memory_rate = sorted(readings)[int(SURE * len(readings))]
    uses = config["layers"] * config["experts_used"]
    computing = usage.computing_seconds(threads) if plan.cached else None
    predicted = forecast(plan, usage, uses, token, memory_rate, rate, computing)
    share = 1 - predicted.computing / predicted.seconds
    return {
        "budget": memory,
        "context": found.context,
        "experts_from": "disk" if plan.cached else "memory",
        "total": plan.total,
        "parts": plan.parts(),
        "pool_experts": plan.pool // plan.needs.expert,
        "read_bandwidth": memory_rate,
        "disk_bandwidth": rate,
        "expert_hit_rate": predicted.hit_rate,
        "hit_rate_from": usage.source,
        "disk_bytes_per_token": predicted.disk_bytes,
        "tokens_per_second": predicted.tokens_per_second,
        "limited_by": what_limits(plan, predicted.hit_rate, share),
    }


def prediction_table(found: dict[str, Any]) -> str:
    """`predict`'s result as lines to read."""
    names = {"keys_and_values": f"keys and values, {found['context']:,} tokens"}
    rows = [
        (f"  {_size(nbytes)}", names.get(name, name.replace("_", " ")))
        for name, nbytes in found["parts"].items()
    ]
    rows.append((f"  {_size(found['total'])}", f"in all, of {_size(found['budget'])}"))
    lines = [f"{size:<13} {name}" for size, name in rows]
    rate = found["tokens_per_second"]
    speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    speed += " tokens/s expected"
    if found["experts_from"] == "disk":
        speed += (
            f": {found['expert_hit_rate']:.0%} of experts in memory ({found['hit_rate_from']}), "
            f"{found['disk_bytes_per_token'] / 1e6:.0f} MB per token from disk "
            f"at {found['disk_bandwidth'] / 1e9:.2f} GB/s"
        )
    return "\n".join(
        ["budget", *lines, f"speed       {speed};", f"            {found['limited_by']}"]
    )


def state_bytes(config: Config) -> int:
    """Bytes of recurrent state that one sequence keeps, whatever its length."""
    memory = config.value_heads * config.state_size * config.state_size
    window = (config.conv_kernel - 1) * config.conv_channels
    return 4 * sum(config.recurrent) * (memory + window)


def kv_bytes_per_token(config: Config) -> int:
    """Bytes of keys and values, 12 bits a number, that each token adds, without scales."""
    attention = config.layers - sum(config.recurrent)
    return 3 * attention * config.kv_heads * config.head_dim


def table(description: dict[str, Any]) -> str:
    """`describe`'s result as lines to read."""
    config = description["config"]
    delta = sum(config["recurrent"])
    attention = config["layers"] - delta
    types = Counter[str]()
    for tensor in description["tensors"]:
        types[tensor["type"]] += tensor["bytes"]
    parts = f" in {description['parts']} parts" if description["parts"] > 1 else ""
    rows = [
        ("file", f"{description['file']}, {_size(description['bytes'])}{parts}"),
        ("model", " ".join(filter(None, (description["architecture"], description["name"])))),
        (
            "parameters",
            f"{_count(description['parameters'])}, {_count(description['active_parameters'])} "
            f"active per token, {description['bits_per_weight']:.2f} bits per weight",
        ),
        ("layers", f"{config['layers']}: {delta} gated DeltaNet, {attention} gated attention"),
        (
            "experts",
            f"{config['experts']}, {config['experts_used']} used per token, "
            f"width {config['expert_width']}; shared expert, width {config['shared_width']}",
        ),
        (
            "sizes",
            f"hidden {config['hidden']:,}, vocabulary {config['vocabulary']:,}, "
            f"context {config['context_length']:,}",
        ),
        (
            "tensors",
            f"{len(description['tensors'])}: "
            + ", ".join(f"{name} {_size(nbytes)}" for name, nbytes in types.most_common()),
        ),
        ("per token", f"reads {_size(description['bytes_per_token'])} of weights"),
        (
            "memory",
            f"{_size(description['state_bytes'])} of state per conversation and "
            f"{_size(description['kv_bytes_per_token'])} per token of context",
        ),
        (
            "prediction",
            f"multi-token head of {_count(description['mtp_parameters'])} parameters"
            if description["mtp"]
            else "no multi-token head",
        ),
    ]
    if description["sampling"]:
        settings = (f"{name} {value:g}" for name, value in description["sampling"].items())
        rows.append(("sampling", ", ".join(settings)))
    return "\n".join(f"{label:<11} {text}" for label, text in rows)


def _weights_of(tensor: Tensor) -> int:
    return tensor.rows * tensor.columns


def _is_prediction(name: str, config: Config) -> bool:
    """Whether the tensor belongs to the multi-token-prediction block, the last one."""
    return config.mtp_layers > 0 and name.startswith(f"blk.{config.layers}.")


def _used(tensor: Tensor, amount: int, config: Config) -> int:
    """The part of `amount` that one token uses: the chosen experts of a stack, all of the rest."""
    if tensor.name.endswith(_EXPERTS):
        return amount // config.experts * config.experts_used
    return amount


def _sampling(metadata: dict[str, Any]) -> dict[str, float]:
    """The file's `general.sampling.*` numbers by their short names."""
    return {
        key.removeprefix(_SAMPLING): value
        for key, value in metadata.items()
        if key.startswith(_SAMPLING) and type(value) in (int, float) and math.isfinite(value)
    }


def _size(nbytes: float) -> str:
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.2f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"


def _count(number: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{suffix}"
    return f"{number:.0f}"
