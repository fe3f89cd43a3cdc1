"""The multi-token-prediction block: guesses the token after the next one.

    x = W_eh [norm(embedding of the next token); norm(h)]   h: the trunk's vector after output_norm
    x = x + attention(norm(x));  x = x + experts(norm(x))   with keys and values of its own
    h' = norm(x),  logits = output(h')                      h' takes h's place for a next guess

At position t it sees h of t and the token at t + 1, and guesses the token at t + 2. Positions that
have passed matter for their keys and values alone, so `follow` computes no more than those, and
only the last of a batch goes on from there to a guess.

Semantics: llama.cpp's src/models/qwen3next.cpp (graph_mtp); weights: `mtp.*` of the checkpoint.
"""

from dataclasses import dataclass

from ondevice.candidates import Candidates
from ondevice.config import Config
from ondevice.experts import Pool
from ondevice.kernels import ahead
from ondevice.kernels.formats import READERS
from ondevice.kernels.layout import BESIDE, WORD
from ondevice.layers.attention import Attention, positions
from ondevice.layers.moe import moe
from ondevice.layers.output import logits
from ondevice.program import (
    Activation,
    Buffer,
    Operations,
    Program,
    float_bits,
    record_arguments,
)
from ondevice.weights import Matrix, Weights


@dataclass(frozen=True)
class Head:
    """The block's programs."""

    follow: Operations
    """Keys and values of the batch's positions."""
    drafts: Operations
    """`follow`, and from the batch's last position the drafts of a cycle, one after the other."""
    programs: tuple[Program, ...]
    logits: Buffer
    hidden: Buffer
    candidates: Candidates


def head(
    program: Program, config: Config, weights: Weights, x: Buffer, kv: str, pool: Pool | None,
    record: int,
) -> Head:  # fmt: skip
    """Add the block to what shares `program`'s buffers; `record` is the one of kernels.ahead."""
    block = f"blk.{config.layers}"
    tail = Program(1, program.threads)
    output = _output(weights, f"{block}.nextn.shared_head_head.weight", config)
    candidates = Candidates(tail, output)
    floats = tail.activation("draft input", config.hidden, (output,)).floats

    attention = Attention(program, config, weights, config.layers, 0, kv)
    at = positions(program, config)
    inputs = _inputs(program, config, weights, block, record, floats)
    _combine(program, weights, block, inputs, config, x)
    h = attention.follow(x, at)
    follow = program.take()

    rows = (x.address, x.row_bytes, h.floats.address, h.floats.row_bytes, *record_arguments(h))
    program.add(ahead.take_last, *rows)
    at = positions(program, config, then=BESIDE)
    mixed = attention.mixed_after(h, at)
    with program.stage("experts"):
        moe(program, config, weights, config.layers, x, mixed, pool)
    one = follow + program.take()
    norm = weights.vector(f"{block}.nextn.shared_head_norm.weight", config.hidden)
    h = tail.norm(x, norm, config.norm_epsilon, "draft input", (output,))
    result = logits(tail, candidates.matrices, h, "draft logits")
    length = len(one.lines) + tail.length + 1
    tail.add(
        ahead.draft,
        *(record, result.rows.address, sum(matrix.rows for matrix in candidates.matrices)),
        *(result.piece, result.peaks.address, config.vocabulary),
        *(candidates.common, tail.keep(candidates.tokens)),
        loop=record + WORD * ahead.MORE,
        back=length,
    )
    return Head(follow, one + tail.take(), (tail,), result.rows, h.floats, candidates)


def _output(weights: Weights, own: str, config: Config) -> Matrix:
    """The block's own output matrix, or the trunk's."""
    if weights.has(own):
        return weights.matrix(own, config.vocabulary, config.hidden)
    return weights.output()


def _inputs(
    program: Program, config: Config, weights: Weights, block: str, record: int, own: Buffer
) -> Activation:
    """[norm(embedding); norm(hidden)] of each row."""
    hidden, name = config.hidden, f"{block}.nextn.embed_tokens.weight"
    embedding = (
        weights.matrix(name, config.vocabulary, hidden)
        if weights.has(name)
        else weights.embedding()
    )
    projection = _projection(weights, block, hidden)
    with program.stage("prediction"):
        both = program.activation("prediction input", 2 * hidden, (projection,))
    program.add(
        ahead.head_inputs,
        *(record, program.keep_matrix(embedding), embedding.row_bytes, hidden),
        READERS[embedding.format.name].expand,
        program.keep(weights.vector(f"{block}.nextn.enorm.weight", hidden)),
        program.keep(weights.vector(f"{block}.nextn.hnorm.weight", hidden)),
        float_bits(config.norm_epsilon),
        *(own.address, both.floats.address, both.floats.row_bytes),
        *record_arguments(both),
        per_token=True,
    )
    return both


def _projection(weights: Weights, block: str, hidden: int) -> Matrix:
    return weights.matrix(f"{block}.nextn.eh_proj.weight", hidden, 2 * hidden)


def _combine(
    program: Program, weights: Weights, block: str, inputs: Activation, config: Config, x: Buffer
) -> None:
    """x = W_eh inputs."""
    result = program.linear(_projection(weights, block, config.hidden), inputs, "x")
    assert result is x
