"""Named tensors: shapes are checked, both old layouts give the new layout's bytes."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice.config import Config
from ondevice.gguf_file import GGUFFile
from ondevice.weights import Matrix, Weights
from quant.errors import Error
from quant.registry import FORMATS
from tests.ondevice.gguf_builder import (
    Encoded,
    Shape,
    encode_f16,
    encode_f32,
    tiny_model,
    tiny_weights,
)


class Opened:
    """A tiny model's file, configuration and weights."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.file = GGUFFile.open(tiny_model(path / "m.gguf", **options))
        self.config = Config.from_gguf(self.file)
        self.weights = Weights(self.file, self.config)


def values(matrix: Matrix) -> np.ndarray:
    """(experts, rows, columns) float32, read at the addresses that a kernel would read."""
    stacked = []
    for expert in range(matrix.experts):
        address = matrix.address + expert * matrix.stride
        raw = np.frombuffer(ctypes.string_at(address, matrix.rows * matrix.row_bytes), np.uint8)
        blocks = matrix.format.blocks(raw.reshape(matrix.rows, matrix.row_bytes))
        stacked.append(matrix.format.dequantize(blocks))
    return np.stack(stacked)


SHAPES = {
    "default": Shape(),
    "no prediction": Shape(mtp_layers=0),
    "odd heads": Shape(heads=6, kv_heads=3, key_heads=3, value_heads=9, hidden=48),
    "512 experts": Shape(layers=2, interval=2, experts=512, experts_used=10, hidden=32),
    "equal heads": Shape(key_heads=4, value_heads=4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("legacy", [False, True])
def test_valid_models_pass_the_check(shape: Shape, legacy: bool, tmp_path: Path) -> None:
    opened = Opened(tmp_path, shape=shape, legacy=legacy, fused=legacy, tied=legacy)
    opened.weights.check()


@pytest.mark.parametrize("encode", [encode_f32, encode_f16])
def test_matrices_hold_the_file_s_values(encode: Any, tmp_path: Path) -> None:
    opened = Opened(tmp_path, encode=encode)
    expected = tiny_weights(Shape())
    tolerance = 0 if encode is encode_f32 else 2**-11  # half a unit in the last place of float16
    for name, (rows, columns) in {
        "token_embd.weight": (261, 64),
        "blk.3.attn_q.weight": (128, 64),
        "blk.4.nextn.eh_proj.weight": (64, 128),
    }.items():
        matrix = opened.weights.matrix(name, rows, columns)
        np.testing.assert_allclose(values(matrix)[0], expected[name], rtol=tolerance, atol=1e-7)
    stack = opened.weights.matrix("blk.0.ffn_down_exps.weight", 64, 32, experts=8)
    down = expected["blk.0.ffn_down_exps.weight"]
    np.testing.assert_allclose(values(stack), down, rtol=tolerance, atol=1e-7)
    assert stack.stride == 64 * stack.row_bytes
    norm = opened.weights.vector("output_norm.weight", 64)
    np.testing.assert_array_equal(norm, expected["output_norm.weight"])
    assert norm.dtype == np.float32
    assert norm.flags.writeable
    window = opened.weights.array("blk.0.ssm_conv1d.weight", 128, 4)
    np.testing.assert_array_equal(window, expected["blk.0.ssm_conv1d.weight"])


def test_matrices_are_not_copied(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    tensor = opened.file.tensors["blk.0.attn_qkv.weight"]
    assert opened.weights.delta_input(0)[0].address == tensor.address
    assert opened.weights.embedding().address == opened.file.tensors["token_embd.weight"].address


def test_what_every_token_needs_is_read_before_experts(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    tensors = opened.file.tensors.values()
    for prediction in (True, False):
        mapped = opened.weights.mapped(prediction)
        found = [next(t for t in tensors if t.data is data) for data in mapped]
        stacks = [tensor.name.endswith("_exps.weight") for tensor in found]
        assert stacks == sorted(stacks)
        assert any(stacks)
        assert not all(stacks)
        for kind in (True, False):
            offsets = [t.offset for t, stack in zip(found, stacks, strict=True) if stack == kind]
            assert offsets == sorted(offsets)
        block = f"blk.{opened.config.layers}."
        expected = {name for name, _ in opened.weights.needed() if prediction or block not in name}
        assert {tensor.name for tensor in found} == expected
    assert len(opened.weights.mapped(True)) > len(opened.weights.mapped(False))


@pytest.mark.parametrize("shape", [Shape(), SHAPES["odd heads"], SHAPES["equal heads"]], ids=str)
@pytest.mark.parametrize("encode", [encode_f32, encode_f16])
def test_legacy_delta_input_is_regrouped(shape: Shape, encode: Any, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    new = Opened(tmp_path / "new", shape=shape, encode=encode)
    old = Opened(tmp_path, shape=shape, encode=encode, legacy=True)
    for layer in (0, 2):
        for left, right in zip(
            new.weights.delta_input(layer), old.weights.delta_input(layer), strict=True
        ):
            np.testing.assert_array_equal(values(left), values(right))
            assert right.address % 64 == 0


def test_legacy_rows_of_quantized_blocks(tmp_path: Path) -> None:
    def encode(name: str, array: np.ndarray) -> Encoded:
        if "ssm_in" not in name:
            return encode_f32(name, array)
        rows = np.arange(array.shape[0], dtype=np.uint8)
        blocks = np.repeat(rows[:, None], 2 * FORMATS["Q8_0"].block.itemsize, axis=1)
        return FORMATS["Q8_0"].type_id, blocks.tobytes()

    shape = Shape(key_heads=2, value_heads=4, state_size=4)  # per key head 4 q, 4 k, 8 v, 8 z
    opened = Opened(tmp_path, shape=shape, legacy=True, encode=encode)
    qkv, z = opened.weights.delta_input(0)
    assert qkv.row_bytes == 2 * 34

    def first_bytes(matrix: Matrix) -> list[int]:
        raw = ctypes.string_at(matrix.address, matrix.rows * matrix.row_bytes)
        return list(raw[:: matrix.row_bytes])

    q = [*range(4), *range(24, 28)]
    k = [*range(4, 8), *range(28, 32)]
    v = [*range(8, 16), *range(32, 40)]
    assert first_bytes(qkv) == q + k + v
    assert first_bytes(z) == [*range(16, 24), *range(40, 48)]


def test_fused_experts_equal_separate_ones(tmp_path: Path) -> None:
    (tmp_path / "apart").mkdir()
    apart = Opened(tmp_path / "apart")
    fused = Opened(tmp_path, fused=True)
    gate, up, stride = apart.weights.expert_gate_up(1)
    fused_gate, fused_up, fused_stride = fused.weights.expert_gate_up(1)
    assert fused_stride == 2 * stride == fused_gate.stride
    np.testing.assert_array_equal(values(gate), values(fused_gate))
    np.testing.assert_array_equal(values(up), values(fused_up))


def test_gate_and_up_of_different_types(tmp_path: Path) -> None:
    def encode(name: str, array: np.ndarray) -> Encoded:
        return encode_f16(name, array) if "ffn_up_exps" in name else encode_f32(name, array)

    opened = Opened(tmp_path, encode=encode)
    gate, up, stride = opened.weights.expert_gate_up(0)
    assert stride == gate.stride == 2 * up.stride
    expected = tiny_weights(Shape())
    np.testing.assert_array_equal(values(gate), expected["blk.0.ffn_gate_exps.weight"])
    half = expected["blk.0.ffn_up_exps.weight"].astype(np.float16)
    np.testing.assert_array_equal(values(up), half)


def test_tied_output_is_the_embedding(tmp_path: Path) -> None:
    opened = Opened(tmp_path, tied=True)
    assert not opened.weights.has("output.weight")
    assert opened.weights.output().address == opened.weights.embedding().address


def test_matrix_keeps_its_memory(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    matrix = opened.weights.matrix("blk.3.attn_k.weight", 32, 64)
    expected = values(matrix)
    opened.file.close()
    del opened
    np.testing.assert_array_equal(values(matrix), expected)


NAMES = [
    "output_norm.weight",
    "blk.0.ssm_dt.bias",
    "blk.3.attn_q.weight",
    "blk.4.nextn.hnorm.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    opened = Opened(tmp_path, tensors={name: None})
    with pytest.raises(Error, match=rf"m\.gguf: 1 of 93 tensors are missing: {name}$"):
        opened.weights.check()


def test_file_without_tensors_lists_the_first_five(tmp_path: Path) -> None:
    opened = Opened(tmp_path, tensors=dict.fromkeys(tiny_weights(Shape())))
    with pytest.raises(Error) as caught:
        opened.weights.check()
    assert str(caught.value).endswith(
        "92 of 92 tensors are missing: token_embd.weight, output_norm.weight, "
        "blk.0.attn_norm.weight, blk.0.post_attention_norm.weight, blk.0.attn_qkv.weight "
        "and 87 more"
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("token_embd.weight", (260, 64), r"has shape \(260 x 64\); needed \(261 x 64\)"),
        ("output.weight", (261, 32), r"has shape \(261 x 32\); needed \(261 x 64\)"),
        ("blk.0.ffn_gate_exps.weight", (7, 32, 64), r"\(7 x 32 x 64\); needed \(8 x 32 x 64\)"),
        ("blk.0.ffn_down_exps.weight", (8, 32, 64), r"\(8 x 32 x 64\); needed \(8 x 64 x 32\)"),
        ("blk.0.ssm_a", (8,), r"has shape \(8\); needed \(4\)"),
        ("blk.3.attn_q.weight", (64, 64), r"has shape \(64 x 64\); needed \(128 x 64\)"),
        ("blk.4.nextn.eh_proj.weight", (64, 64), r"has shape \(64 x 64\); needed \(64 x 128\)"),
    ],
)
def test_misshapen_tensor(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    opened = Opened(tmp_path, tensors={name: np.zeros(shape, np.float32)})
    with pytest.raises(Error, match=rf"m\.gguf: tensor {name} .*{message}"):
        opened.weights.check()


def test_sizes_of_1_and_extra_tensors_do_not_matter(tmp_path: Path) -> None:
    weights = tiny_weights(Shape())
    tensors = {
        "blk.0.ffn_gate_inp_shexp.weight": weights["blk.0.ffn_gate_inp_shexp.weight"][None],
        "blk.0.ssm_conv1d.weight": weights["blk.0.ssm_conv1d.weight"][:, None],
        "unknown.weight": np.ones((3, 5), np.float32),
    }
    opened = Opened(tmp_path, tensors=tensors)
    opened.weights.check()
    opened.weights.vector("blk.0.ffn_gate_inp_shexp.weight", 64)
    opened.weights.array("blk.0.ssm_conv1d.weight", 128, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vector_that_is_not_finite(value: float, tmp_path: Path) -> None:
    norm = np.ones(64, np.float32)
    norm[[5, 9]] = value
    opened = Opened(tmp_path, tensors={"output_norm.weight": norm})
    with pytest.raises(Error, match=r"output_norm\.weight holds 2 values .* first at index 5"):
        opened.weights.vector("output_norm.weight", 64)


def test_vocabulary_of_another_size(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.tokens": None, "qwen3next.vocab_size": 1000}
    opened = Opened(tmp_path, metadata=metadata)
    with pytest.raises(Error, match=r"token_embd\.weight has shape \(261 x 64\); needed \(1,000 x"):
        opened.weights.check()
