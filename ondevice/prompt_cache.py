"""Beginnings of prompts that were read before, found again by content, in any process.

A system message or a long document is prefilled once. The state after some multiples of BLOCK
tokens is kept in the cache folder (state_folder.py): the last one within the system message, and
the last two within the prompt, because another question often follows the same document. Only
what saves at least BLOCK tokens of reading is worth a file. Another version of the kernels, or
another processor, rounds differently: what they read is not found.

The folder has a budget. What was not used for longest goes first; a longer beginning is never
newer than the shorter ones that it stands on, so these outlive it.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ondevice.locks import FileLock
from ondevice.state import State
from ondevice.state_folder import BLOCK, StateFolder
from quant.errors import Error
from quant.folders import cache_root, private_folder
from quant.jit import source_hash

if TYPE_CHECKING:
    from ondevice.model import Model

BUDGET = 2 << 30
"""Bytes, unless a tenth of the free disk is less."""


class PromptCache:
    """The cache as one model uses it; without a folder to write it does nothing."""

    def __init__(self, model: "Model", folder: Path | None = None, budget: int = BUDGET) -> None:
        self.budget = budget
        self._states: StateFolder | None = None
        with suppress(OSError, RuntimeError):
            folder = folder or cache_root() / "prompts"
            if private_folder(folder):
                self._states = StateFolder(folder, model, source_hash())

    def resume(self, tokens: Sequence[int], state: State) -> None:
        """Let the state, which took the first of `tokens`, take as many more as are kept.

        At least one is left to be read. Bit for bit what reading would give.
        """
        states = self._states
        if states is None or len(tokens) - 1 - state.position < BLOCK:
            return
        digests = list(states.chain(tokens[:-1]))
        for number in range(len(digests) - 1, state.position // BLOCK, -1):
            prefix = tokens[: number * BLOCK]
            if not states.memory_path(prefix, digests[number]).exists():
                continue
            before = state.snapshot()
            if states.load(prefix, state, before.position):
                self._use([states.memory_path(prefix, digests[number])], digests[1 : number + 1])
                return
            state.restore(before)

    def stops(self, tokens: Sequence[int], position: int, head: int = 0) -> list[int]:
        """Where to call `keep` while `tokens` are read from `position` on.

        head: tokens at the beginning that other prompts are likely to share.
        """
        if self._states is None:
            return []
        last = (len(tokens) - 1) // BLOCK * BLOCK
        wanted = {head // BLOCK * BLOCK, last - BLOCK, last}
        return sorted(place for place in wanted if place >= position + BLOCK)

    def keep(self, tokens: Sequence[int], state: State) -> None:
        """Keep the state, which took the first of `tokens`; not where there is no room."""
        states = self._states
        if states is None:
            return
        prefix = tokens[: state.position]
        digests = list(states.chain(prefix))
        memory = states.memory_path(prefix, digests[-1])
        needed = states.needed(len(prefix))  # rather too much
        with suppress(OSError, Error), FileLock(states.folder / "lock", wait=True):
            files = {memory, *map(states.keys_path, digests[1:])}
            if not all(path.exists() for path in files):
                if not self._make_room(states.folder, files, needed):
                    return
                states.save(prefix, state)
            self._use([memory], digests[1:])

    def _use(self, last: list[Path], digests: list[bytes]) -> None:
        """Note the use of files: the shorter a beginning, the later."""
        assert self._states is not None
        paths = [*last, *map(self._states.keys_path, reversed(digests))]
        now = time.time_ns()
        for number, path in zip(itertools.count(), paths, strict=False):
            with suppress(OSError):
                os.utime(path, ns=(now + 1000 * number, now + 1000 * number))

    def _make_room(self, folder: Path, keep: set[Path], needed: int) -> bool:
        """Remove what was not used for longest until `needed` bytes fit; the lock is held."""
        found = []
        for path in folder.iterdir():
            with suppress(OSError):
                if path.name.endswith(".partial"):  # of a killed process
                    path.unlink()
                elif path.name != "lock":
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in found)
        budget = min(self.budget, (shutil.disk_usage(folder).free + used) // 10)
        needed -= sum(size for _, size, path in found if path in keep)
        if needed + sum(size for _, size, path in found if path in keep) > budget:
            return False
        for _, size, path in sorted(found, key=lambda entry: entry[0]):
            if used + needed <= budget:
                break
            if path not in keep:
                path.unlink(missing_ok=True)
                used -= size
        return used + needed <= budget


def reading(
    cache: PromptCache | None, tokens: Sequence[int], state: State, head: int = 0
) -> tuple[list[int], Callable[[], None]]:
    """Where to pause in reading `tokens`, and what to do there; the state may move on at once."""
    if cache is None:
        return [], lambda: None
    cache.resume(tokens, state)
    stops = cache.stops(tokens, state.position, head)

    def reached() -> None:
        if state.position in stops:
            cache.keep(tokens, state)

    return stops, reached
