"""llama.cpp opens our files, we open its, and both name the same next token.

The comparison itself is `benchmarks/compare_llama_cpp.py`; positions count where llama.cpp's two
best logits differ by more than 1 % of the largest.
"""

from pathlib import Path

import gguf
import pytest

from tests.oracle import Oracle

pytestmark = [pytest.mark.reference, pytest.mark.slow]
pytest.importorskip("llama_cpp")

from benchmarks import compare_llama_cpp as compare  # noqa: E402
from tools.random_checkpoint import SHAPES  # noqa: E402

AGREEMENT = 0.98
# llama.cpp rounds activations to BF16 (2^-9 each), and a flipped expert moves a few rows by 1e-2:
# a transform gone wrong in the converter shows as an rms error of 1e-1 and more.
BF16_RMS_ERROR = 5e-3

NAMES = ["demo", *SHAPES]


@pytest.mark.parametrize("name", NAMES)
def test_same_next_token(name: str, tmp_path: Path) -> None:
    checkpoint, ids = compare.checkpoint_and_ids(name, tmp_path)
    failed = []
    for file, path in compare.files(checkpoint, tmp_path):
        reference = compare.llama_cpp_logits(path, ids)
        result = compare.agreement(compare.our_logits(path, ids), reference)
        assert result.clear > len(ids) // 3, f"{file}: too few clear positions to judge: {result}"
        if result.share < AGREEMENT:
            failed.append(f"{file}: {result}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_reads_the_checkpoints_meaning(name: str, tmp_path: Path) -> None:
    """Our BF16 file, run by llama.cpp, against the float64 oracle on the checkpoint itself."""
    checkpoint, ids = compare.checkpoint_and_ids(name, tmp_path)
    path = tmp_path / "model.gguf"
    compare.convert.convert(checkpoint, path, type="BF16")
    result = compare.agreement(
        compare.llama_cpp_logits(path, ids), Oracle.open(checkpoint).forward(ids)
    )
    assert result.share >= AGREEMENT, result
    assert result.rms_error <= BF16_RMS_ERROR, result


@pytest.mark.parametrize("name", ["whole_superblocks", "deep"])
def test_same_type_for_every_tensor(name: str, tmp_path: Path) -> None:
    """Our recipes choose what llama.cpp's quantiser chooses, shape fall-backs included."""
    checkpoint, _ = compare.checkpoint_and_ids(name, tmp_path)
    base = tmp_path / "base.gguf"
    compare.convert.convert(checkpoint, base, type="BF16")
    for kind in set(compare.LLAMA_TYPES) & set(compare.convert.FILE_TYPES):
        ours, theirs = tmp_path / f"ours-{kind}.gguf", tmp_path / f"theirs-{kind}.gguf"
        compare.convert.convert(checkpoint, ours, type=kind)
        compare.llama_cpp_quantize(base, theirs, kind)
        assert tensor_types(ours) == tensor_types(theirs), kind


def tensor_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
