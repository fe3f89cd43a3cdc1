"""A Hugging Face checkpoint folder -> one GGUF file.

    checkpoint -> names -> transforms -> recipe -> plan -> write -> model.gguf

Everything that can be refused is refused while the plan is made, before a byte is written.
"""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.partial import partial_path
from convert.plan import Plan, make_plan
from convert.recipe import FILE_TYPES, file_type
from convert.write import Progress, Report, write_plan
from quant.cores import cores
from quant.errors import ResourceError, UsageError

__all__ = ["FILE_TYPES", "Plan", "Progress", "Report", "convert", "plan"]


def plan(source: Path, type: str = "Q4_K_M", *, mtp: bool = True) -> Plan:
    """What `convert` would do; Error when the checkpoint cannot be converted."""
    kind = file_type(type)
    with closing(Checkpoint.open(Path(source))) as checkpoint:
        return make_plan(checkpoint, kind, mtp)


def convert(
    source: Path,
    output: Path,
    type: str = "Q4_K_M",
    *,
    mtp: bool = True,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    compiling: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the checkpoint in folder `source` as the GGUF file `output`.

    `type` is one of FILE_TYPES. An existing output needs `force`, and is replaced only at the end.
    `compiling` is called with (done, needed) while encoders are compiled, once on every machine.
    """
    source, output = Path(source), Path(output)
    kind = file_type(type)
    threads = cores() if threads is None else threads
    if not 1 <= threads <= 1024:
        raise UsageError(f"threads is {threads}, 1 to 1024 is needed")
    _check_output(source, output, force)
    with closing(Checkpoint.open(source)) as checkpoint:
        planned = make_plan(checkpoint, kind, mtp)
        return write_plan(planned, output, threads, progress, compiling)


def _check_output(source: Path, output: Path, force: bool) -> None:
    """Refuse an output that exists, is a folder, or could be one of the inputs."""
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name the file to write")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent}: no such folder")
    if not os.access(output.parent, os.W_OK):
        raise ResourceError(f"{output.parent}: not writable")
    if source.is_dir():
        if output.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{output}: lies in the checkpoint's own folder; choose another one")
        inputs = [item for item in source.iterdir() if item.exists()]
        for path in (output, partial_path(output)):
            if path.exists() and any(path.samefile(item) for item in inputs):
                raise UsageError(f"{path}: is a file of the checkpoint")
    if output.exists() and not force:
        raise UsageError(f"{output}: exists already; use --force to replace it")
