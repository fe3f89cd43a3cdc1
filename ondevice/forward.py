"""A model's forward pass, written down once as programs.

    x = embedding(tokens)
    for each layer:   x = x + mix(norm(x));  x = x + experts(norm(x))
    logits = output(norm(x))

Three programs share the same buffers: `prefill` takes a batch of tokens into a state, `head` gives
logits for rows of that batch, and `decode` takes one token, chooses the next, and goes on with it
until a limit, an end token or a request to stop, all in one native call. Those that guess tokens
ahead are in speculate.py.
"""

from ondevice.config import Config
from ondevice.experts import Pool
from ondevice.kernels import ahead, expand, layout, sample
from ondevice.kernels.formats import READERS
from ondevice.kernels.operation import CompiledFunction
from ondevice.layers.attention import Attention, positions
from ondevice.layers.deltanet import deltanet
from ondevice.layers.moe import moe
from ondevice.layers.output import logits
from ondevice.program import Buffer, Operations, Program
from ondevice.speculate import Ahead, remember
from ondevice.weights import Weights

HEAD_ROWS = 16
"""Rows that the output head computes at a time."""
SCRATCH_STEP = 512 << 10
"""Scratch of a thread takes multiples of so many bytes: what a processor reads ahead of one
thread's should not be what another one writes."""


class Forward:
    """The programs of a model, and the memory that they work in."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        threads: int,
        kv: str,
        mtp: str,
        pool: Pool | None,
        batch: int = 1,
        stage_bytes: int = 0,
    ) -> None:
        """For batches of up to `batch` tokens; stage_bytes as for `Program`."""
        trunk = Program(batch, threads, stage_bytes)
        embedding, output = weights.embedding(), weights.output()
        x = trunk.buffer("x", 4 * config.hidden)
        trunk.add(
            expand.embed,
            *(trunk.keep_matrix(embedding), embedding.row_bytes, embedding.columns),
            READERS[embedding.format.name].expand,
            *(x.address, x.row_bytes),
            per_token=True,
            then=layout.CHAIN,
        )
        at = positions(trunk, config)
        for layer, recurrent in enumerate(config.recurrent):
            index = config.recurrent[:layer].count(recurrent)
            if recurrent:
                mixed = deltanet(trunk, config, weights, layer, x, index)
            else:
                mixed = Attention(trunk, config, weights, layer, index, kv).mixed(x, at)
            with trunk.stage("experts"):
                moe(trunk, config, weights, layer, x, mixed, pool)
        self.prefill = trunk.take()
        head = Program(HEAD_ROWS, threads)
        output_norm = weights.vector("output_norm.weight", config.hidden)
        predicts = mtp != "off" and config.mtp_layers > 0
        record = ahead.new_record(batch)
        then = layout.CHAIN if predicts else layout.BARRIER
        h = head.norm(x, output_norm, config.norm_epsilon, "head input", (output,), then=then)
        if predicts:
            remember(head, record, h.floats, config.hidden)
        self._logits = logits(head, (output,), h, "logits")
        self.head: Operations = head.take()
        self._programs: tuple[Program, ...] = (trunk, head)
        self.ahead: Ahead | None = None
        """Guesses tokens ahead, unless `mtp` is off."""
        if mtp != "off":
            self.ahead = Ahead(config, record, self.prefill, self.head, self._logits, threads, mtp)
            if predicts:
                self.ahead.add_head(trunk, weights, x, output_norm, kv, pool)
            self._programs += self.ahead.programs
        head.add(sample.sample, self._logits.peaks.address, self._logits.piece)
        self.decode: Operations = self.prefill + self.head + head.take()
        most = max(program.scratch_bytes for program in self._programs)
        self.scratch_bytes = -(-most // SCRATCH_STEP) * SCRATCH_STEP
        """Bytes that each thread has beside the buffers."""
        self.stage_bytes = trunk.stage_bytes
        self.threads = threads
        self.batch = batch

    @property
    def logits(self) -> Buffer:
        """What `head` writes."""
        return self._logits.rows

    @property
    def kernels(self) -> list[CompiledFunction]:
        """All kernels that may run."""
        programs = self.decode if self.ahead is None else self.decode + self.ahead.kernels
        return programs.kernels

    @property
    def token_bytes(self) -> int:
        """Bytes of buffers for each token of a batch."""
        return self._programs[0].nbytes // self.batch

    def nbytes(self, batch: int) -> int:
        """Bytes of all buffers and of scratch, with batches of so many tokens."""
        others = sum(program.nbytes for program in self._programs[1:])
        return batch * self.token_bytes + others + self.threads * self.scratch_bytes

    def close(self) -> None:
        """Let go of the file's memory; the programs are of no further use."""
        self._programs = ()
