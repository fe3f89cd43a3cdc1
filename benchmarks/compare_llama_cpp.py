"""Compare this runtime's logits with llama.cpp's on the same GGUF files.

Each checkpoint is converted by us to the file types of OUR_TYPES (multi-token block included), and
llama.cpp's own `llama_model_quantize` makes those of LLAMA_TYPES from our BF16 one. Both programs
then read the same file and the same token ids, teacher-forced. Positions count where llama.cpp's
two best logits differ by more than CLEAR of its largest logit: elsewhere the winner is rounding's
choice, since llama.cpp rounds activations to BF16 (BF16 weights) or to 8 bits (quantised ones).

Columns: positions, clear ones, those where both name the same token, and the largest difference of
any logit and the root mean square one, relative to the largest logit. Needs the extra `reference`.

    python -m benchmarks.compare_llama_cpp                     # demo and every random shape
    python -m benchmarks.compare_llama_cpp demo deep --json
    python -m benchmarks.compare_llama_cpp --file model.gguf --tokens 200
"""

import argparse
import ctypes
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np

import convert
import ondevice
from tools.random_checkpoint import SHAPES, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "ondevice" / "demo"
DATA = ROOT / "tests" / "data"

CLEAR = 0.01
SEED = 1
OUR_TYPES = ("BF16", "Q8_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "MXFP4_MOE")
LLAMA_TYPES = {
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "MXFP4_MOE": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
}


@dataclass(frozen=True)
class Agreement:
    """How two programs' logits over the same positions compare."""

    positions: int
    clear: int
    agreed: int  # of the clear ones
    largest_error: float
    rms_error: float

    @property
    def share(self) -> float:
        """Agreed positions per clear one."""
        return self.agreed / self.clear if self.clear else 1.0


def agreement(ours: np.ndarray, reference: np.ndarray) -> Agreement:
    """Compare logits (n, vocabulary) with the reference's."""
    largest = float(np.abs(reference).max())
    second, best = np.sort(reference, axis=1)[:, -2:].T
    clear = best - second > CLEAR * largest
    same = ours.argmax(axis=1) == reference.argmax(axis=1)
    error = (ours.astype(np.float64) - reference) / largest
    return Agreement(
        positions=len(reference),
        clear=int(clear.sum()),
        agreed=int((same & clear).sum()),
        largest_error=float(np.abs(error).max()),
        rms_error=float(np.sqrt(np.mean(error**2))),
    )


# Kept in a name: llama.cpp calls it for as long as the process lives.
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


def llama_cpp_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (n, vocabulary) float32 by llama.cpp, one prefill of the ids (n,)."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    model = llama_cpp.Llama(
        str(path),
        n_ctx=len(ids) + 32,
        n_batch=len(ids) + 32,
        n_threads=2,
        n_threads_batch=2,
        logits_all=True,
        verbose=False,
    )
    try:
        model.eval([int(token) for token in ids])
        return np.array(model.scores[: len(ids)], np.float32)
    finally:
        model.close()


def llama_cpp_quantize(source: Path, target: Path, kind: str) -> Path:
    """Quantise a GGUF file with llama.cpp's own quantiser."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = LLAMA_TYPES[kind]
    options.nthread = 2
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(options)
    )
    if status != 0:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {kind}: status {status}")
    return target


def our_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits (n, vocabulary) float32 by this runtime."""
    with ondevice.load(path) as model:
        return np.asarray(model.logits([int(token) for token in ids]))


def files(checkpoint: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Our files of a checkpoint, then those llama.cpp quantises; each is deleted after its turn."""
    base = folder / "ours-BF16.gguf"
    convert.convert(checkpoint, base, type="BF16")
    yield "ours BF16", base
    for kind in OUR_TYPES[1:]:
        path = folder / f"ours-{kind}.gguf"
        convert.convert(checkpoint, path, type=kind)
        yield f"ours {kind}", path
        path.unlink()
    for kind in LLAMA_TYPES:
        path = llama_cpp_quantize(base, folder / f"llama-{kind}.gguf", kind)
        yield f"llama.cpp {kind}", path
        path.unlink()


def checkpoint_and_ids(name: str, folder: Path) -> tuple[Path, np.ndarray]:
    """The demo's checkpoint or a random one written into `folder`, and its stored reference ids."""
    path = DEMO if name == "demo" else write_checkpoint(folder / name, SHAPES[name], SEED)
    with np.load(DATA / f"{name}.npz") as stored:
        return path, stored["ids"]


def main() -> None:
    """Print one line per checkpoint and file."""
    parser = argparse.ArgumentParser(description="Compare logits with llama.cpp's.")
    parser.add_argument("names", nargs="*", help=f"demo or any of {', '.join(SHAPES)}")
    parser.add_argument("--file", type=Path, help="compare on this GGUF file instead")
    parser.add_argument("--tokens", type=int, default=300, help="random ids to feed to --file")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()

    def report(name: str, file: str, path: Path, ids: np.ndarray) -> None:
        result = agreement(our_logits(path, ids), llama_cpp_logits(path, ids))
        if options.json:
            print(json.dumps({"checkpoint": name, "file": file, **asdict(result)}), flush=True)
            return
        print(
            f"{name:18} {file:18} {result.positions:5} {result.clear:5} {result.agreed:5}"
            f" {result.share:8.2%} {result.largest_error:9.1e} {result.rms_error:9.1e}",
            flush=True,
        )

    if options.file:
        with ondevice.load(options.file) as model:
            count = model.config.vocabulary
        ids = np.random.default_rng(SEED).integers(0, count, options.tokens)
        report(options.file.stem, "as given", options.file, ids)
        return
    for name in options.names or ["demo", *SHAPES]:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, ids = checkpoint_and_ids(name, Path(scratch))
            for file, path in files(checkpoint, Path(scratch)):
                report(name, file, path, ids)


if __name__ == "__main__":
    main()
