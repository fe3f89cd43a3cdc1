"""Measure a demo checkpoint on the held-out book: `python -m tools.evaluate_demo CORPUS FOLDER`.

Bits per byte (every token is scored, after `<|endoftext|>`, with at least half a window of context)
and how often the prediction head's greedy guess for token t+2 equals the trunk's own greedy choice
there and the text. Weights are the BF16 ones of the checkpoint, arithmetic is float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tools.demo_data import END_OF_TEXT, read_books
from tools.demo_export import load_published
from tools.demo_layers import Dimensions
from tools.demo_model import DemoModel
from tools.train_demo import evaluate


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="folder of plain-text books")
    parser.add_argument("checkpoint", type=Path, help="folder that train_demo exported")
    parser.add_argument("--held-out", default="the-sign-of-the-four.txt")
    parser.add_argument("--window", type=int, default=1024)
    arguments = parser.parse_args()
    _, text = read_books(arguments.corpus, arguments.held_out)
    tokenizer = Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(arguments.checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    model = DemoModel(Dimensions())
    load_published(model, tensors)
    ids = torch.tensor([tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(text).ids])
    window = arguments.window
    bits, agreed, right = evaluate(model, ids, window, window // 2)
    result = {
        "bytes": len(text.encode()),
        "tokens": len(ids) - 1,
        "bits_per_byte": round(bits / len(text.encode()), 4),
        "draft_equals_greedy": round(agreed, 4),
        "draft_equals_text": round(right, 4),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
