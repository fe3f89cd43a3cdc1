"""Store what transformers computes for a checkpoint, as the runtime's reference.

`Qwen3NextForCausalLM` runs in float32 on the checkpoint's own BF16 weights, over TOKENS token ids,
and its logits go to `tests/data/NAME.npz` with

    ids          (TOKENS,) int32           what was fed
    logits       (TOKENS, vocabulary)      float32, or float16 when the vocabulary is large
    best         (TOKENS,) int32           argmax of the float32 logits
    fingerprint  SHA-256 of the weights, so that a test can tell stale outputs from wrong ones
    versions     of transformers and torch

The random shapes are those of `tools.random_checkpoint.SHAPES`; the ids of the demo are the start
of its held-out text, those of a random checkpoint are random. Needs the extra `reference`.

    python -m tools.reference_logits                    # all of them
    python -m tools.reference_logits demo odd_heads     # some
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from tools.random_checkpoint import SHAPES, fingerprint, write_checkpoint

TOKENS = 300
SEED = 1
FLOAT16_FROM = 1024  # half precision is 5e-4 of a logit, far below the 1e-2 it judges
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
DEMO = ROOT / "ondevice" / "demo"

# The held-out book's opening (Conan Doyle, 1890), for the ids of the demo.
DEMO_TEXT = """<|im_start|>user
Who are you, and what do you see from the window?<|im_end|>
<|im_start|>assistant
Sherlock Holmes took his bottle from the corner of the mantel-piece and his hypodermic \
syringe from its neat morocco case. With his long, white, nervous fingers he adjusted the \
delicate needle, and rolled back his left shirt-cuff. For some little time his eyes rested \
thoughtfully upon the sinewy forearm and wrist all dotted and scarred with innumerable \
puncture-marks. Finally he thrust the sharp point home, pressed down the tiny piston, and \
sank back into the velvet-lined arm-chair with a long sigh of satisfaction.

Three times a day for many months I had witnessed this performance, but custom had not \
reconciled my mind to it. On the contrary, from day to day I had become more irritable at \
the sight, and my conscience swelled nightly within me at the thought that I had lacked the \
courage to protest. Again and again I had registered a vow that I should deliver my soul \
upon the subject, but there was that in the cool, nonchalant air of my companion which made \
him the last man with whom one would care to take anything approaching to a \
liberty.<|im_end|>
"""


def transformers_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (n, vocabulary) float32 of the ids (n,), by transformers on the CPU in float32."""
    model = transformers.Qwen3NextForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        output = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False)
    logits: np.ndarray = output.logits[0].numpy()
    return logits


def demo_ids(folder: Path) -> np.ndarray:
    """The first TOKENS ids of DEMO_TEXT, control tokens parsed."""
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(DEMO_TEXT).ids
    if len(encoded) < TOKENS:
        raise SystemExit(f"the demo text has {len(encoded)} tokens, {TOKENS} are needed")
    return np.array(encoded[:TOKENS], np.int32)


def random_ids(vocabulary: int, count: int, seed: int) -> np.ndarray:
    """Token ids (count,) below `vocabulary`, the same on every machine."""
    words = np.random.PCG64(seed).random_raw(count) % np.uint64(vocabulary)
    return words.astype(np.int32)


def store(name: str, folder: Path, ids: np.ndarray) -> Path:
    """Run transformers and write tests/data/NAME.npz."""
    logits = transformers_logits(folder, ids)
    kind = np.float16 if logits.shape[1] >= FLOAT16_FROM else np.float32
    path = DATA / f"{name}.npz"
    DATA.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        ids=ids,
        logits=logits.astype(kind),
        best=logits.argmax(axis=1).astype(np.int32),
        fingerprint=fingerprint(folder),
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
    )
    return path


def main() -> None:
    """Make the outputs that were named, all of them by default."""
    parser = argparse.ArgumentParser(description="Store transformers' logits for the tests.")
    parser.add_argument("names", nargs="*", help=f"demo or any of {', '.join(SHAPES)}")
    names = parser.parse_args().names or ["demo", *SHAPES]
    for name in names:
        if name == "demo":
            path = store(name, DEMO, demo_ids(DEMO))
        elif name in SHAPES:
            with tempfile.TemporaryDirectory() as scratch:
                folder = write_checkpoint(Path(scratch), SHAPES[name], SEED)
                path = store(name, folder, random_ids(SHAPES[name].vocabulary, TOKENS, SEED))
        else:
            parser.error(f"{name} is neither demo nor one of {', '.join(SHAPES)}")
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
