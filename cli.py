"""The `ondevice` command: read the options, call one function, print what it returns.

stdout carries the result alone; with --json its last line is one JSON object and nothing else is
written there. Progress and notes go to stderr, and only when that is a terminal. Numba and NumPy
take a third of a second to import, so nothing heavy is imported outside the bodies of commands.
"""

import contextlib
import dataclasses
import io
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ondevice.console import (
    Program,
    compiling,
    note,
    print_figures,
    print_json,
    rewrite,
    size,
    trying,
    watched,
)
from quant.errors import Error, UsageError

if TYPE_CHECKING:
    import ondevice
    from convert import Progress
    from ondevice.sampling import Sampling

VERSION = "0.1.0"
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S"),
    *("IQ4_NL", "IQ4_XS", "MXFP4_MOE", "Q4_0"),
)

Function = TypeVar("Function", bound=Callable[..., Any])


# Options that several commands share


def options(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """One decorator that applies several, the first one outermost."""

    def apply(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
threads_option = click.option(
    "-t", "--threads", type=click.IntRange(min=1), help="Threads [default: one per core]."
)
memory_option = click.option(
    "--memory",
    metavar="SIZE",
    type=size,
    help="Memory the model may take, such as 24G.",
)
context_option = click.option(
    "-c", "--ctx-size", "context", type=click.IntRange(min=1), help="Most tokens to remember."
)
kv_option = click.option(
    "--kv-type",
    "kv",
    type=click.Choice(["i12", "i16", "q8_0"]),
    default="i12",
    show_default=True,
    help="How keys and values are kept: in 12 bits, 16 or 8.",
)
prompt_cache_option = click.option(
    "--prompt-cache/--no-prompt-cache",
    default=True,
    show_default=True,
    help="Keep what was computed for long prompts on disk, for the next time.",
)
mtp_option = click.option(
    "--mtp",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Guess tokens ahead where that is faster, always, or never; the answer is the same.",
)
running_options = options(threads_option, context_option, memory_option, kv_option)
sampling_options = options(
    click.option("--temp", "temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, help="Choose among this many tokens; 0 means all."),
    click.option("--top-p", type=float, help="Choose among tokens that sum to this probability."),
    click.option("--min-p", type=float, help="Leave out what is less likely than this x the best."),
    click.option("--repeat-penalty", type=float, help="Above 1 makes repetition less likely."),
    click.option("--seed", type=int, help="Makes the choice of tokens repeatable."),
)


def load(model: str, **settings: Any) -> "ondevice.Model":
    import ondevice

    if sys.stderr.isatty():
        click.secho(f"loading {model} ... ", err=True, dim=True, nl=False)
        settings["progress"] = compiling
    try:
        loaded = ondevice.load(model, **settings)
    except BaseException:
        note("")
        raise
    note(f"{loaded.load_seconds:.1f} s, {loaded.compile_seconds:.1f} of them for the kernels")
    return loaded


def chosen(sampling: "Sampling", options: dict[str, Any]) -> "Sampling":
    """The file's sampling defaults with what the user gave in their place."""
    return dataclasses.replace(sampling, **{k: v for k, v in options.items() if v is not None})


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-"; a byte order mark and one last newline go."""
    name = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise Error(f"{name}: byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise Error(f"{name}: {error.strerror}") from error


# Commands


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="%(prog)s %(version)s")
def main() -> None:
    """Run Qwen3-Next language models on this machine's CPU.

    MODEL is a GGUF file, the first part of a split one, or the word demo for the small model that
    comes with this program.
    """


@main.command()
@click.argument("source")
@click.argument("output", required=False, metavar="[OUT.gguf]")
@click.option(
    "--type",
    "kind",
    metavar="TYPE",
    type=click.Choice(TYPES, case_sensitive=False),
    default="Q4_K_M",
    show_default=True,
    help=f"How weights are stored: {' '.join(TYPES)}.",
)
@click.option("--no-mtp", is_flag=True, help="Leave out the multi-token-prediction block.")
@threads_option
@click.option("--dry-run", is_flag=True, help="Show what would be written and stop.")
@click.option("--force", is_flag=True, help="Replace OUT.gguf if it exists.")
@as_json
def convert(
    source: str,
    output: str | None,
    kind: str,
    no_mtp: bool,
    threads: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make a GGUF file of the Hugging Face checkpoint in the folder SOURCE.

    Without OUT.gguf the file is named after the checkpoint and the type and lies in the current
    folder. It appears under its name only when it is complete.
    """
    import convert as converter
    from ondevice import demo

    folder = demo.checkpoint_path() if source == "demo" else Path(source)
    target = Path(output or f"{folder.resolve().name}-{kind}.gguf")
    if dry_run:
        planned = converter.plan(folder, kind, mtp=not no_mtp)
        if as_json:
            facts = {"bytes": planned.nbytes, "bits_per_weight": planned.bits_per_weight}
            print_json({"output": str(target), "tensors": len(planned.tensors), **facts})
        else:
            click.echo(str(planned))
        return
    with ProgressLine() as line:
        report = converter.convert(
            folder,
            target,
            kind,
            mtp=not no_mtp,
            threads=threads,
            force=force,
            progress=line.show,
            compiling=compiling,
        )
    for remark in report.notes:
        note(f"note: {remark}")
    if as_json:
        print_json({**dataclasses.asdict(report), "output": str(report.output)})
    else:
        click.echo(
            f"{report.output}: {report.bytes / 1e6:,.1f} MB, {report.tensors} tensors, "
            f"{report.bits_per_weight:.2f} bits per weight, {report.seconds:.1f} s, "
            f"{report.peak_memory / 1e6:,.0f} MB of memory at most"
        )


class ProgressLine(contextlib.AbstractContextManager["ProgressLine"]):
    """A line on the terminal, rewritten in place: share done, rate, time left, tensor."""

    def __init__(self) -> None:
        self.last = 0.0

    def show(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self.last < 0.1:
            return
        self.last = now
        share = progress.done_bytes / max(progress.total_bytes, 1)
        minutes, seconds = divmod(round(progress.eta), 60)
        line = f"{share:4.0%}  {progress.rate / 1e6:,.0f} MB/s  {minutes}:{seconds:02} left"
        width = shutil.get_terminal_size().columns - 1
        line = f"{line}  {progress.tensor}"[:width]
        rewrite(line)

    def __exit__(self, *exception: object) -> None:
        rewrite("")


@main.command()
@click.argument("model")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@running_options
@as_json
def inspect(
    model: str,
    tensors: bool,
    threads: int | None,
    context: int | None,
    memory: int | None,
    kv: str,
    as_json: bool,
) -> None:
    """Show what a model file holds, without loading it.

    With --memory also what that much would be used for, and how fast the model would write. If its
    experts would come from disk and it never ran here, it reads and writes some text for that.
    """
    from ondevice import demo, inspection

    path = demo.model_path(model, compiling)
    described = inspection.describe(path)
    if memory is not None:
        described["memory"] = inspection.predict(
            path, memory, threads, context, kv, progress=trying, compiling=compiling
        )
    if as_json:
        print_json(described)
        return
    click.echo(inspection.table(described))
    if memory is not None:
        click.echo()
        click.echo(inspection.prediction_table(described["memory"]))
    if tensors:
        click.echo()
        for tensor in described["tensors"]:
            shape = " x ".join(map(str, tensor["shape"]))
            click.echo(f"{tensor['type']:5} {tensor['bytes']:>13,}  {tensor['name']}  {shape}")


@main.command()
@click.argument("model")
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", help="A file with the prompt; - is standard input.")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Stop after this many tokens [default: when the answer or the context ends].",
)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without a chat template.")
@mtp_option
@sampling_options
@running_options
@prompt_cache_option
@as_json
def generate(
    model: str,
    prompt: str | None,
    file: str | None,
    max_tokens: int | None,
    raw: bool,
    mtp: str,
    threads: int | None,
    context: int | None,
    memory: int | None,
    kv: str,
    prompt_cache: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt: from -p, from a file, or piped in."""
    text = one_prompt(prompt, file)
    settings = {"threads": threads, "context": context, "memory": memory, "kv": kv, "mtp": mtp}
    with load(model, **settings, prompt_cache=prompt_cache) as loaded:
        if raw:
            ids = loaded.tokenize(text)
            if loaded.tokenizer.add_bos and loaded.tokenizer.bos is not None:
                ids.insert(0, loaded.tokenizer.bos)
        else:
            ids = loaded.template.encode([{"role": "user", "content": text}])
        completion = loaded.complete(ids, chosen(loaded.sampling, sampling), max_tokens)
        from ondevice.terminal import printable, timing_line

        plain = not sys.stdout.isatty()
        for piece in watched(completion):
            if not as_json:
                click.echo(piece if plain else printable(piece), nl=False)
                sys.stdout.flush()
    if as_json:
        print_json(
            {
                "text": completion.text,
                "tokens": completion.tokens,
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
                "timings": completion.timings,
            }
        )
    else:
        click.echo()
        note(timing_line(completion))


def one_prompt(prompt: str | None, file: str | None) -> str:
    if prompt is not None and file is not None:
        raise UsageError("give either --prompt or --file, not both")
    if prompt is None and file is None and sys.stdin.isatty():
        raise UsageError("no prompt: give -p TEXT or -f FILE, or pipe the text in")
    text = prompt if prompt is not None else read_text(file or "-")
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


@main.command()
@click.argument("model", required=False)
@click.option("-s", "--system", help="Tell the model how to behave, before the first message.")
@click.option(
    "--session",
    "name",
    metavar="NAME",
    help="Keep the conversation by this name, or go on with it.",
)
@click.option(
    "--continue",
    "resume",
    is_flag=True,
    help="Go on with --session NAME, or with the most recent one.",
)
@click.option("--stats", is_flag=True, help="Show the speed after each answer.")
@mtp_option
@sampling_options
@running_options
@prompt_cache_option
def chat(
    model: str | None,
    system: str | None,
    name: str | None,
    resume: bool,
    stats: bool,
    mtp: str,
    threads: int | None,
    context: int | None,
    memory: int | None,
    kv: str,
    prompt_cache: bool,
    **sampling: Any,
) -> None:
    """Talk with the model, the demo by default, or the one that a session was made with.

    Piped in, each line is a message and only the answers are printed.
    """
    if resume or name:
        from ondevice import journal

        name = journal.existing(name) if resume or name is None else name
        model = model or journal.model_of(name)
    settings = {"threads": threads, "context": context, "memory": memory, "kv": kv, "mtp": mtp}
    with load(model or "demo", **settings, prompt_cache=prompt_cache) as loaded:
        from ondevice import terminal

        if name is None:
            session = loaded.session(system=system, sampling=chosen(loaded.sampling, sampling))
        else:
            given = {key: value for key, value in sampling.items() if value is not None}
            session = journal.open_session(loaded, name, system, options=given, must_exist=resume)
            note(f"session {name}: {session.turns} turns, {session.position} tokens")
        with contextlib.closing(session):
            if sys.stdin.isatty() and sys.stdout.isatty():
                terminal.interactive(session, stats=stats)
            else:
                if isinstance(sys.stdin, io.TextIOWrapper):
                    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
                terminal.piped(session, sys.stdin, sys.stdout, stats=sys.stderr if stats else None)


@main.command()
@click.argument("model")
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens to read at once.",
)
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens to write one by one.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens already in the context before the clock starts.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Times to measure; the median counts.",
)
@click.option("--profile", is_flag=True, help="Show where the time goes, operation by operation.")
@threads_option
@memory_option
@kv_option
@as_json
def bench(
    model: str,
    prompt: int,
    generate: int,
    depth: int,
    repeat: int,
    profile: bool,
    threads: int | None,
    memory: int | None,
    kv: str,
    as_json: bool,
) -> None:
    """Measure reading and writing speed, and how near the machine's limits they come."""
    context = depth + prompt + generate
    settings = {"threads": threads, "context": context, "memory": memory, "kv": kv}
    with load(model, **settings, mtp="off") as loaded:
        from ondevice import bench as benchmark

        result = benchmark.run(loaded, prompt, generate, depth, repeat, profile)
    if as_json:
        print_json(result)
    else:
        click.echo(benchmark.report(result))


@main.command()
@click.argument("model")
@click.argument("text")
@click.option(
    "--ctx-size",
    "context",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Tokens in one window.",
)
@click.option("--reference", metavar="REF.gguf", help="Compare with this model's probabilities.")
@threads_option
@memory_option
@kv_option
@as_json
def perplexity(
    model: str,
    text: str,
    context: int,
    reference: str | None,
    threads: int | None,
    memory: int | None,
    kv: str,
    as_json: bool,
) -> None:
    """Measure how well the model predicts the file TEXT; lower is better."""
    content = read_text(text)
    from ondevice.perplexity import measure

    with contextlib.ExitStack() as stack:
        settings = {"threads": threads, "context": context, "memory": memory, "mtp": "off"}
        loaded = stack.enter_context(load(model, kv=kv, **settings))
        other = stack.enter_context(load(reference, **settings)) if reference else None
        result = measure(loaded, content, context, reference=other, progress=window_progress)
    if as_json:
        print_json(result)
    else:
        print_figures(result)


@main.command()
@click.argument("model", required=False)
@as_json
def doctor(model: str | None, as_json: bool) -> None:
    """Show what this machine has and what this program makes of it.

    Processor and kernels, cache, memory, disk (of MODEL, if given) and read bandwidth.
    """
    from ondevice import demo
    from ondevice.doctor import examine, table

    found = examine(demo.model_path(model, compiling) if model else None)
    if as_json:
        print_json(found)
    else:
        click.echo(table(found))


def window_progress(done: int, total: int, so_far: float) -> None:
    rewrite(f"window {done} of {total}, perplexity {so_far:.3f}", end=done == total)


if __name__ == "__main__":
    main(prog_name="ondevice")
