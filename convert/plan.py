"""What a conversion will do, worked out from headers alone: no weight is read.

A plan holds every output tensor with its format and its source rows, and all metadata; `str(plan)`
is what `--dry-run` prints. Making it checks the whole checkpoint: configuration, tokenizer, every
shard's header, every tensor the model needs.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from convert import header, metadata, names, recipe
from convert.checkpoint import Checkpoint, refuse
from convert.header import Value
from convert.hparams import HParams
from convert.names import Output
from convert.recipe import FileType
from convert.shard import READABLE, Source
from convert.vocabulary import read_vocabulary
from quant.errors import Error
from quant.format import Format
from quant.registry import FORMATS


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file to be written; shape is (rows..., columns)."""

    output: Output
    sources: tuple[Source, ...]
    format: Format

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.output.shape

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.format.row_bytes(self.shape[-1])

    @property
    def source_bytes(self) -> int:
        """Bytes that have to be read to make it."""
        return sum(
            segment.rows.count * source.columns * source.nbytes // max(prod(source.shape), 1)
            for segment, source in zip(self.output.segments, self.sources, strict=True)
        )


@dataclass(frozen=True)
class Plan:
    """A checked conversion, ready to be run by `convert.write`."""

    checkpoint: Checkpoint
    kind: FileType
    hparams: HParams
    mtp: bool
    metadata: dict[str, Value]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def header(self) -> bytes:
        """The bytes before the first tensor."""
        return header.encode(
            self.metadata,
            ((item.name, item.shape, item.format.type_id, item.nbytes) for item in self.tensors),
        )

    @cached_property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(
            item.nbytes + header.padding(item.nbytes) for item in self.tensors
        )

    @cached_property
    def source_bytes(self) -> int:
        return sum(item.source_bytes for item in self.tensors)

    @cached_property
    def parameters(self) -> int:
        return sum(prod(item.shape) for item in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(item.nbytes for item in self.tensors) / self.parameters

    def __str__(self) -> str:
        width = max(len(item.name) for item in self.tensors)
        lines = [
            f"{item.name:{width}}  {item.format.name:5}  {item.nbytes:>15,}  "
            + " x ".join(map(str, item.shape))
            for item in self.tensors
        ]
        counts = Counter(item.format.name for item in self.tensors)
        lines += [
            "",
            ", ".join(f"{count} {name}" for name, count in counts.most_common()),
            f"{len(self.tensors)} tensors, {self.parameters:,} weights, {self.nbytes:,} bytes as "
            f"{self.kind.name} ({self.bits_per_weight:.2f} bits per weight), "
            f"{self.source_bytes:,} bytes to read",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_plan(checkpoint: Checkpoint, kind: FileType, mtp: bool = True) -> Plan:
    """Check everything that can be checked without reading weights."""
    config = checkpoint.read_json("config.json")
    if config is None:
        raise Error(f"{checkpoint.folder}: no config.json")
    hparams = HParams.from_config(config, str(checkpoint.folder / "config.json"))
    prefix = names.mtp_prefix(checkpoint.tensors)
    notes = list(checkpoint.notes)
    if prefix is None and mtp and hparams.mtp_layers:
        notes.append("config.json names an MTP block, the shards hold none: converted without it")
    if not mtp:
        prefix = None
    if prefix is not None and f"{prefix}layers.1.mlp.gate.weight" in checkpoint.tensors:
        raise Error(
            f"{checkpoint.folder}: {prefix}layers.1: more than one MTP block; "
            "convert without MTP instead"
        )
    outputs = tuple(names.outputs(hparams, checkpoint.tensors, prefix))
    problems = _problems(outputs, checkpoint)
    ignored = () if prefix else names.MTP_PREFIXES
    problems += _leftovers(outputs, checkpoint, hparams, ignored)
    refuse(problems, str(checkpoint.folder))
    tokenizer, tokens = read_vocabulary(checkpoint, config, hparams.vocabulary)
    if tokens < hparams.vocabulary:
        notes.append(f"vocabulary padded from {tokens} to {hparams.vocabulary} tokens")
    blocks = hparams.layers + (prefix is not None)
    formats = recipe.choose(
        kind,
        [(output.name, output.shape) for output in outputs],
        blocks,
        hparams.experts,
        hparams.heads // hparams.kv_heads,
    )
    keys = (
        metadata.general(checkpoint.folder, kind)
        | metadata.sampling(checkpoint.read_json("generation_config.json") or {})
        | metadata.architecture(hparams, prefix is not None)
        | tokenizer
    )
    tensors = tuple(
        PlannedTensor(
            output,
            tuple(checkpoint.tensors[segment.source] for segment in output.segments),
            FORMATS[formats[output.name]],
        )
        for output in outputs
    )
    return Plan(checkpoint, kind, hparams, prefix is not None, keys, tensors, tuple(notes))


def _problems(outputs: tuple[Output, ...], checkpoint: Checkpoint) -> list[str]:
    """Needed tensors that are absent, misshapen or of a dtype that is not read."""
    needed = {segment.source: segment.shape for output in outputs for segment in output.segments}
    problems = []
    for name, shape in needed.items():
        source = checkpoint.tensors.get(name)
        if source is None:
            problems.append(f"{name} is missing")
        elif source.shape != shape:
            problems.append(
                f"{name} ({source.shard.path.name}) has shape {source.shape}, "
                f"config.json needs {shape}"
            )
        elif source.dtype not in READABLE:
            problems.append(
                f"{name} ({source.shard.path.name}) is {source.dtype}; "
                f"convert reads {', '.join(READABLE)}"
            )
    return problems


def _leftovers(
    outputs: tuple[Output, ...],
    checkpoint: Checkpoint,
    hparams: HParams,
    ignored: tuple[str, ...],
) -> list[str]:
    """A tensor that would be dropped means another model than the one we would write."""
    used = {segment.source for output in outputs for segment in output.segments}
    problems = []
    for name in checkpoint.tensors:
        if name in used or name.startswith(ignored) or name.endswith(".rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and hparams.tied:
            continue
        problems.append(f"{name} has no place in a {metadata.ARCHITECTURE} model")
    return problems
