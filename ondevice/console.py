"""What every command shares: how it ends, how it speaks, how sizes are written.

stdout carries results; notes go to stderr, and only when that is a terminal. Exit codes: 0 done,
2 usage, 3 bad model, checkpoint or input, 4 resources, 5 interrupted and safe to run again,
70 a bug of ours (with its traceback), 130 Ctrl-C.
"""

import io
import json
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

from quant.errors import Error, ResourceError

if TYPE_CHECKING:
    from ondevice.generate import Completion

BUG, CTRL_C = 70, 130
PATIENCE = 1.0
"""Seconds without an answer after which a person wants to know how long it takes."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def fail(message: str, exit_code: int) -> NoReturn:
    """End the command with one line on stderr."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(exit_code)


class Program(click.Group):
    """The command group, which turns exceptions into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter shows ?
                stream.reconfigure(errors="replace")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: note(str(message))
                return super().invoke(ctx)
        except Error as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(CTRL_C) from None
        except BrokenPipeError:
            # The reader has what it wanted. Python flushes stdout once more at exit: into nothing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None
        except MemoryError as error:
            fail(f"out of memory: {error}".rstrip(": "), ResourceError.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", ResourceError.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            raise click.exceptions.Exit(BUG) from None


def note(message: str) -> None:
    """A line for a person who is watching."""
    if sys.stderr.isatty():
        click.secho(message, err=True, dim=True)


def rewrite(line: str, end: bool = False) -> None:
    """A line in the place of the last one, for a person who is watching; without text it is gone.

    After the `end` the next one is below it.
    """
    if sys.stderr.isatty():
        shown = click.style(line, dim=True) if line else ""
        click.echo(f"\r\x1b[K{shown}", err=True, nl=end)


def compiling(done: int, needed: int) -> None:
    """The line that explains the first start on a machine, gone at the end."""
    line = f"compiling kernels for this machine, once: {done} of {needed}"
    rewrite(line if done < needed else "")


def trying(done: int, total: int) -> None:
    """The line that explains why a forecast takes its time, gone at the end."""
    line = f"reading and writing a text to see what is read from disk: {done} of {total} tokens"
    rewrite(line if done < total else "")


def watched(completion: "Completion") -> Iterator[str]:
    """The pieces of an answer; until the first one comes, a line tells how far the prompt is."""
    if not sys.stderr.isatty():
        yield from completion
        return
    begun = threading.Event()
    line = threading.Thread(target=_reading, args=(completion, begun), daemon=True)
    line.start()
    try:
        for piece in completion:
            if not begun.is_set():
                begun.set()
                line.join()
            yield piece
    finally:
        begun.set()
        line.join()


def _reading(completion: "Completion", begun: threading.Event) -> None:
    started, total = time.monotonic(), completion.prefilled_tokens
    if begun.wait(PATIENCE):
        return
    while not begun.wait(0.2):
        done = completion.read_tokens
        rate = done / (time.monotonic() - started)
        minutes, seconds = divmod(round((total - done) / rate if rate else 0), 60)
        line = f"reading the prompt: {done / total:4.0%}  {rate:,.0f} tokens/s"
        rewrite(f"{line}  {minutes}:{seconds:02} left")
    rewrite("")


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))


def print_figures(values: dict[str, Any]) -> None:
    """One `name  value` line each; numbers to six significant digits, bytes as MB or GB/s."""
    width = max(map(len, values))
    for name, value in values.items():
        if name in ("bytes_per_token", "peak_memory"):
            shown = f"{value / 1e6:,.1f} MB"
        elif name == "read_bandwidth":
            shown = f"{value / 1e9:.2f} GB/s"
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else f"{value}"
        click.echo(f"{name.replace('_', ' '):{width}}  {shown}")


def size(text: str) -> int:
    """Bytes of a size written 512M, 2G or 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise click.BadParameter(f"{text!r} is not a size such as 512M or 2G")
    return int(float(found[1]) * UNITS[found[2].upper()])
