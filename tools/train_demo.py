"""Train the demo model from scratch: `python -m tools.train_demo CORPUS OUTPUT --minutes 100`.

Loss = trunk cross entropy + 0.3 x prediction-head cross entropy + 0.01 x load balancing. Hidden
matrices are trained with Muon (the momentum is orthogonalised by Newton-Schulz iterations and
scaled to an element size of 0.2 x the learning rate), everything else with AdamW; neither's step
grows with the gradient, so gradients are not clipped. The learning rate warms up, stays, and falls
linearly to zero at the end of the wall time given.

Several single-threaded processes share the weights and take parts of each batch as they come free:
on a busy machine that is much faster than threads that wait for each other in every product.

Written to OUTPUT: `export/` (the checkpoint, refreshed every ten minutes), `state.pt` (to resume),
`tokenizer.json` (kept by later runs) and `log.jsonl`. Bits per byte: sum of -log2 p over the
held-out book's tokens / its UTF-8 bytes; the book is never trained on, by the tokenizer neither.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_data import WINDOW, Batches, read_books, train_tokenizer
from tools.demo_export import export
from tools.demo_layers import Dimensions
from tools.demo_model import DemoModel

# Large blocks are reused instead of being returned to the system: about twice as fast.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
TOKENS_PER_STEP = 4096
LENGTHS = ((0.75, 512), (0.94, 1024), (1.0, 2048))
DRAFT_WEIGHT = 0.3
BALANCE_WEIGHT = 0.01
JOB_TOKENS = 1024
ROWS = TOKENS_PER_STEP // WINDOW
LOSS_ROWS = 512
MOMENTUM = 0.95
BETAS = (0.9, 0.95)
EVALUATED = 48 * WINDOW


class OutputLoss(torch.autograd.Function):
    """Mean cross entropy of hidden @ weight.T; the gradients are computed on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def,override]
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        total = hidden.new_zeros(())
        for rows, wanted, d_rows in zip(
            hidden.split(LOSS_ROWS),
            targets.split(LOSS_ROWS),
            d_hidden.split(LOSS_ROWS),
            strict=True,
        ):
            logits = rows @ weight.t()
            column = wanted.unsqueeze(1)
            chosen = logits.gather(1, column)
            logits.sub_(logits.amax(1, keepdim=True))
            peak = chosen - logits.gather(1, column)
            logits.exp_()
            mass = logits.sum(1, keepdim=True)
            total += (mass.log() + peak - chosen).sum()
            logits.div_(mass)
            logits.scatter_add_(1, column, torch.full_like(chosen, -1.0))
            torch.mm(logits, weight, out=d_rows)
            d_weight.addmm_(logits.t(), rows)
        ctx.save_for_backward(d_hidden, d_weight)
        return total / targets.numel()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def,override]
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / d_hidden.shape[0]
        return d_hidden * scale, d_weight * scale, None


def orthogonalise(matrix: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of (..., m, n): five Newton-Schulz steps."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.mT if tall else x


class Shared:
    """Weights, gradients and optimizer state in shared memory, one gradient buffer per process.

    Processes take jobs (a part of the batch, later one parameter) from a counter, so that a process
    whose core is busy with something else takes fewer.
    """

    def __init__(self, model: DemoModel, processes: int) -> None:
        named = list(model.named_parameters())
        size = sum(parameter.numel() for _, parameter in named)
        self.weights, self.first, self.second = torch.zeros(3, size).share_memory_().unbind(0)
        self.gradients = torch.zeros(processes, size).share_memory_()
        self.tokens = torch.zeros(TOKENS_PER_STEP + 2 * ROWS, dtype=torch.int64).share_memory_()
        self.losses = torch.zeros(3, TOKENS_PER_STEP // JOB_TOKENS).share_memory_()
        # step, row length, learning rate, 1 when the training goes on
        self.order = torch.zeros(4, dtype=torch.float64).share_memory_()
        self.counters = torch.multiprocessing.Array("i", 2)
        self.barrier = torch.multiprocessing.Barrier(processes)
        self.spans: list[tuple[str, torch.Size, slice]] = []
        first = 0
        for name, parameter in named:
            span = slice(first, first + parameter.numel())
            first = span.stop
            self.spans.append((name, parameter.shape, span))
            self.weights[span].copy_(parameter.detach().reshape(-1))
            parameter.data = self.weights[span].view(parameter.shape)
        self.spans.sort(key=lambda item: item[2].start - item[2].stop)

    def next(self, counter: int) -> int:
        """Take the next job number of a counter."""
        with self.counters.get_lock():
            self.counters[counter] += 1
            return self.counters[counter] - 1


@torch.no_grad()
def update(shared: Shared, job: int, factor: float, decay: float) -> None:
    """One optimizer step of one parameter: Muon for hidden matrices, AdamW for everything else."""
    name, shape, span = shared.spans[job]
    gradient = shared.gradients[:, span].sum(0).view(shape)
    weight, first, second = (
        buffer[span].view(shape) for buffer in (shared.weights, shared.first, shared.second)
    )
    step = int(shared.order[0])
    if ("_proj" in name and "_ba" not in name) or name == "mtp.fc.weight":
        first.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(first, MOMENTUM)
        if name.endswith("gate_up_proj"):
            direction = direction.unflatten(1, (2, -1))
        scale = 0.2 * max(direction.shape[-2:]) ** 0.5
        direction = orthogonalise(direction).reshape(shape)
        weight.mul_(1 - factor * decay).add_(direction, alpha=-factor * scale)
        return
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        weight.mul_(1 - factor * decay)
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    size = factor * math.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
    weight.addcdiv_(first, second.sqrt().add_(1e-10), value=-size)


def rate(progress: float, step: int, hold: float) -> float:
    """Learning rate factor: up over 40 steps, 1, from `hold` on linearly to 0 at progress 1."""
    return min(1.0, (step + 1) / 40, max(0.0, (1.0 - progress) / (1.0 - hold)))


def losses(model: DemoModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Trunk and prediction-head cross entropy of tokens (B, T + 2)."""
    inputs, following, second = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    hidden = model.hidden(inputs)
    draft = model.draft_hidden(hidden, following)
    weight = model.lm_head.weight
    return (
        OutputLoss.apply(hidden.flatten(0, 1), weight, following.reshape(-1)),
        OutputLoss.apply(draft.flatten(0, 1), weight, second.reshape(-1)),
    )


@torch.no_grad()
def evaluate(model: DemoModel, ids: Tensor, length: int, stride: int) -> tuple[float, float, float]:
    """Bits of ids[1:], share of first drafts equal to the trunk's greedy token and to the text.

    Windows of `length` advance by `stride`; every token is scored once, with the most context.
    """
    model.eval()
    bits, agreed, right, drafted = 0.0, 0, 0, 0
    scored = 1
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + length + 1].unsqueeze(0)
        if start + window.shape[1] <= scored:
            break
        first = scored - start - 1
        hidden = model.hidden(window[:, :-1])
        logits = model.lm_head(hidden)[0, first:]
        targets = window[0, 1 + first :]
        bits += F.cross_entropy(logits, targets, reduction="sum").item() / math.log(2)
        if window.shape[1] > 2:
            draft = model.lm_head(model.draft_hidden(hidden[:, :-1], window[:, 1:-1]))[0]
            greedy = model.lm_head(hidden)[0].argmax(-1)[1:]
            guess = draft.argmax(-1)
            agreed += int((guess == greedy)[first:].sum())
            right += int((guess == window[0, 2:])[first:].sum())
            drafted += len(guess) - first
        scored = start + window.shape[1]
    model.train()
    return bits, agreed / max(drafted, 1), right / max(drafted, 1)


def work(shared: Shared, model: DemoModel, rank: int, arguments: argparse.Namespace) -> None:
    """One optimizer step, shared with the other processes: the part every process runs."""
    gradients = shared.gradients[rank]
    for parameter, span in zip(model.parameters(), sorted(shared.spans, key=start_of), strict=True):
        parameter.grad = gradients[span[2]].view(span[1])
    step, length, factor = int(shared.order[0]), int(shared.order[1]), float(shared.order[2])
    rows = TOKENS_PER_STEP // length
    tokens = shared.tokens[: rows * (length + 2)].view(rows, length + 2)
    parts = tokens.split(max(1, JOB_TOKENS // length))
    gradients.zero_()
    while (job := shared.next(0)) < len(parts):
        torch.manual_seed(arguments.seed + step * len(parts) + job)
        trunk, draft = losses(model, parts[job])
        balance = model.balance()
        loss = trunk + DRAFT_WEIGHT * draft + BALANCE_WEIGHT * balance
        (loss / len(parts)).backward()
        shared.losses[:, job] = torch.stack([trunk, draft, balance]).detach()
    shared.barrier.wait()
    while (job := shared.next(1)) < len(shared.spans):
        update(shared, job, factor, arguments.decay)
    shared.barrier.wait()


def start_of(span: tuple[str, torch.Size, slice]) -> int:
    """Position of a parameter in the shared buffers."""
    return span[2].start


def help_along(shared: Shared, model: DemoModel, rank: int, arguments: argparse.Namespace) -> None:
    """Loop of a helper process."""
    torch.set_num_threads(1)
    while True:
        shared.barrier.wait()
        if not shared.order[3]:
            return
        work(shared, model, rank, arguments)


def report(log: Path, **values: float | int | str) -> None:
    """Append one line to the log and to standard error."""
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    with log.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    sys.stderr.write(line + "\n")


def load_tokenizer(path: Path, books: dict[str, str]) -> Tokenizer:
    """The tokenizer of an earlier run in the same folder, or a new one."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(list(books.values()), Dimensions().vocabulary)
    tokenizer.save(str(path))
    return tokenizer


def train(arguments: argparse.Namespace) -> None:
    """Train until the wall time is used up, exporting on the way."""
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    log, saved = output / "log.jsonl", output / "state.pt"
    books, held_out = read_books(arguments.corpus, arguments.held_out)
    tokenizer = load_tokenizer(output / "tokenizer.json", books)
    ids = torch.tensor(tokenizer.encode(held_out).ids)
    slice_ids = ids[len(ids) // 3 :][: EVALUATED + 1]
    slice_bytes = len(tokenizer.decode(slice_ids[1:].tolist(), skip_special_tokens=False).encode())
    model = DemoModel(Dimensions(), arguments.dropout)
    step, elapsed_before = 0, 0.0
    state = torch.load(saved, weights_only=True) if arguments.resume else None
    if state is not None:
        model.load_state_dict(state["model"])
        step, elapsed_before = state["step"], state["elapsed"]
    shared = Shared(model, arguments.processes)
    if state is not None:
        shared.first.copy_(state["first"])
        shared.second.copy_(state["second"])
    batches = Batches(books, tokenizer, arguments.chat_share, arguments.seed + step)
    report(log, event="start", parameters=len(shared.weights), tokens=len(batches.text), step=step)
    for rank in range(1, arguments.processes):
        torch.multiprocessing.get_context("fork").Process(
            target=help_along, args=(shared, model, rank, arguments), daemon=True
        ).start()
    began = time.monotonic()
    exported = evaluated = elapsed_before
    first_export = state is not None
    while True:
        elapsed = elapsed_before + time.monotonic() - began
        progress = elapsed / (60 * arguments.minutes)
        finished = progress >= 1.0
        early = not first_export and elapsed >= 60 * arguments.first_export
        if finished or early or elapsed - evaluated >= 360:
            bits, agreed, right = evaluate(model, slice_ids, WINDOW, WINDOW)
            values = {"bits_per_byte": bits / slice_bytes, "agreed": agreed, "right": right}
            report(log, event="evaluate", step=step, elapsed=elapsed, **values)
            evaluated = elapsed
        if finished or early or elapsed - exported >= 600:
            export(model, tokenizer, output / "export")
            partial = saved.with_suffix(".partial")
            states = {"model": model.state_dict(), "first": shared.first, "second": shared.second}
            torch.save(states | {"step": step, "elapsed": elapsed}, partial)
            partial.replace(saved)
            report(log, event="export", step=step, elapsed=elapsed)
            exported, first_export = elapsed, True
        if finished:
            break
        drawn = batches.random.random()
        length = next(size for share, size in LENGTHS if drawn < share)
        tokens = torch.from_numpy(batches.batch(TOKENS_PER_STEP // length, length))
        shared.tokens[: tokens.numel()] = tokens.flatten()
        factor = rate(progress, step, arguments.hold) * arguments.rate
        shared.order.copy_(torch.tensor([step, length, factor, 1.0], dtype=torch.float64))
        shared.counters[:] = [0, 0]
        shared.barrier.wait()
        work(shared, model, 0, arguments)
        step += 1
        if step % 20 == 0:
            trunk, draft, balance = shared.losses.mean(1).tolist()
            values = {"trunk": trunk, "draft": draft, "balance": balance, "rate": factor}
            report(log, event="step", step=step, elapsed=elapsed, **values)
    shared.order[3] = 0
    shared.barrier.wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of plain-text books")
    parser.add_argument("output", type=Path, help="folder for checkpoint, state and log")
    parser.add_argument("--held-out", default="the-sign-of-the-four.txt")
    parser.add_argument("--minutes", type=float, default=110.0, help="wall time of the training")
    parser.add_argument("--first-export", type=float, default=4.0, help="minutes")
    parser.add_argument("--hold", type=float, default=0.35, help="share of time before the decay")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--chat-share", type=float, default=0.2)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if sys.platform == "linux" and any(os.environ.get(k) != v for k, v in MALLOC.items()):
        command = [sys.executable, "-m", "tools.train_demo", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | MALLOC)
    train(arguments)


if __name__ == "__main__":
    main()
