"""States in a folder, found again by the tokens that they took.

    BLOCK tokens' keys and values      <digest>.keys               shared by all that begin alike
    the memory after some tokens       <digest>-<position>.memory  and what no whole block holds

A digest is a hash over the digest of the block before and the tokens of this one, and begins with
the model, the kind of cache, the version of the format and, if wanted, what computed the state. So
a name says all that the bytes depend on, and a file that is there never needs to be changed. Each
is written under another name first and has checksums; one that does not read well is removed and
counts as not there.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ondevice.kernels.cache import TILE
from ondevice.records import VERSION, Reader, Writer, opened, whole_file
from ondevice.state import State
from quant.errors import Error
from quant.format import Array

if TYPE_CHECKING:
    from ondevice.model import Model

BLOCK = 256
"""Tokens whose keys and values make a file; a multiple of TILE."""
KIND = "state"
HEAD = 512
"""Bytes of a file beside its arrays, at most."""


@dataclass(frozen=True)
class Saved:
    """A memory in a folder; keys and values are where they are."""

    folder: "StateFolder"
    path: Path
    position: int

    @property
    def held(self) -> bool:
        """Whether it is still to be had."""
        return self.path.exists()

    def restore(self, state: State) -> bool:
        """Take the state's memory there; False, with the state cleared, if it is lost."""
        return self.folder.read_memory(self.path, self.position, state, keys=False)


class StateFolder:
    """The states of one model in one folder, which exists and is private.

    With `kernels`, a name for what computes states, only those that it computed are found.
    """

    def __init__(self, folder: Path, model: "Model", kernels: str = "") -> None:
        self.folder = folder
        state = State(model.config, 1, model.kv)
        rows, _, tile = state.tiles.shape
        self.memory_bytes = state.memory.nbytes
        self._tile_bytes = rows * tile
        seed = f"{VERSION} {model.fingerprint} {model.kv} {self.memory_bytes} {self._tile_bytes}"
        if kernels:
            seed += f" {kernels}"
        self._seed = hashlib.blake2b(seed.encode(), digest_size=16).digest()
        self._head = {"kind": KIND, "model": model.fingerprint}

    # ---- names ----

    def chain(self, tokens: Sequence[int]) -> Iterator[bytes]:
        """The digests of the blocks that are whole in `tokens`, from that of none on."""
        ids = np.asarray(tokens, "<i4")
        digest = self._seed
        yield digest
        for end in range(BLOCK, len(ids) + 1, BLOCK):
            digest = _digest(digest, ids[end - BLOCK : end])
            yield digest

    def keys_path(self, digest: bytes) -> Path:
        return self.folder / f"{digest.hex()}.keys"

    def memory_path(self, tokens: Sequence[int], digest: bytes) -> Path:
        """digest: of the whole blocks of `tokens`."""
        rest = np.asarray(tokens[len(tokens) // BLOCK * BLOCK :], "<i4")
        if len(rest):
            digest = _digest(digest, rest)
        return self.folder / f"{digest.hex()}-{len(tokens)}.memory"

    # ---- bytes ----

    def needed(self, tokens: int) -> int:
        """Bytes of a state after so many tokens, all of its files together."""
        tiles = -(-tokens // TILE)
        return self.memory_bytes + tiles * self._tile_bytes + HEAD * (2 + tokens // BLOCK)

    def save(self, tokens: Sequence[int], state: State) -> list[Path]:
        """Keep the state, which took exactly these tokens; the files that it now consists of.

        ResourceError if one cannot be written.
        """
        assert state.position == len(tokens)
        state.settle()
        tiles = BLOCK // TILE
        digests = list(self.chain(tokens))
        paths = [self.keys_path(digest) for digest in digests[1:]]
        for number, path in enumerate(paths):
            if not path.exists():
                first = number * tiles
                self._write(path, None, state.tiles[:, first : first + tiles])
        last = self.memory_path(tokens, digests[-1])
        if not last.exists():
            rest = state.tiles[:, len(paths) * tiles : state.tiles_to(len(tokens))]
            self._write(last, state.memory, rest)
        return [*paths, last]

    def load(self, tokens: Sequence[int], state: State, have: int = 0) -> bool:
        """Make the state the one that took exactly these tokens; False if that is not kept.

        Of the keys and values the first `have` are there already. Where it fails, the state is
        cleared, and its keys and values beyond `have` are of no use.
        """
        digests = list(self.chain(tokens))
        last = self.memory_path(tokens, digests[-1])
        paths = [self.keys_path(digest) for digest in digests[1:]]
        if not all(path.exists() for path in [last, *paths]):
            return False
        tiles = BLOCK // TILE
        for number in range(have // BLOCK, len(paths)):
            first = number * tiles
            if not self._read(paths[number], None, state.tiles[:, first : first + tiles]):
                state.reset()
                return False
        return self.read_memory(last, len(tokens), state)

    def read_memory(self, path: Path, position: int, state: State, keys: bool = True) -> bool:
        """Take the state to a position from a memory's file, with the keys in it if wanted."""
        first = position // BLOCK * (BLOCK // TILE)
        rest = state.tiles[:, first : state.tiles_to(position)] if keys else None
        if not self._read(path, state.memory, rest):
            state.reset()
            return False
        state.arrive(position)
        return True

    def remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()

    def _write(self, path: Path, memory: Array | None, tiles: Array) -> None:
        needed = tiles.nbytes + (0 if memory is None else memory.nbytes) + HEAD
        with whole_file(path, needed, durable=False) as file:
            writer = Writer(file)
            writer.begin(self._head)
            if memory is not None:
                writer.record(b"memo", memory)
            writer.record(b"keys", np.ascontiguousarray(tiles).reshape(-1))

    def _read(self, path: Path, memory: Array | None, tiles: Array | None) -> bool:
        try:
            with opened(path) as file:
                reader = Reader(path, file)
                reader.begin(KIND)
                if memory is not None:
                    reader.expect(b"memo")
                    reader.payload_into(memory)
                if tiles is not None:
                    reader.expect(b"keys")
                    buffer = np.empty(tiles.nbytes, np.uint8)
                    reader.payload_into(buffer)
                    tiles[:] = buffer.reshape(tiles.shape)
        except Error:
            self.remove(path)
            return False
        return True


def _digest(before: bytes, tokens: Array) -> bytes:
    return hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest()


def file_size(path: Path) -> int:
    """Bytes of a file; 0 if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
