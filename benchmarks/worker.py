"""A program under test, in a process of its own that answers one JSON object per line.

The process imports what it must, opens the model and greets with a line; then each line on its
stdin is a request and each line on its stdout the answer. What else it says goes to stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 2000  # characters of what a process that failed had to say


class WorkerFailed(Exception):
    """The process ended without an answer."""


class Worker:
    """Starts `python -m module arguments` in the repository and talks to it."""

    def __init__(
        self, python: str, module: str, *arguments: object, environment: dict[str, str]
    ) -> None:
        self._name = f"{python} -m {module}"
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.greeting = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """What the process answers."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, or its absence, says why
        return self._answer()

    def close(self) -> None:
        """Let it end; it does when its input does."""
        with self._said, self._process:
            if self._process.stdin:
                self._process.stdin.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        self._said.seek(0)
        said = self._said.read()[-SHOWN:]
        self.close()
        raise WorkerFailed(f"{self._name} ended with {status}:\n{said}")


def serve(greeting: dict[str, Any], answer: Callable[..., dict[str, Any]]) -> None:
    """The process's side: greet, then answer requests, their keys as keywords, until they end."""
    print(json.dumps(greeting), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
