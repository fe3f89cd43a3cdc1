"""Converted weights against formulas applied to what the safetensors library reads."""

import shutil
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (teaches NumPy the BF16 of the safetensors library)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import convert
from convert.recipe import FILE_TYPES
from quant.errors import Error
from tests.convert.conftest import SHAPE, shards
from tools.random_checkpoint import Shape, write_checkpoint

# Relative RMS error on nearly Gaussian weights; about 1.5 times what each format has, so that a
# misplaced row (error 1.4) or a wrong scale shows and the encoder's own quality does not.
LARGEST_ERROR = {
    "BF16": 0.0,
    "F16": 1e-3,
    "Q8_0": 0.012,
    "Q6_K": 0.03,
    "Q5_1": 0.06,
    "Q5_K": 0.06,
    "Q5_0": 0.07,
    "Q4_K": 0.12,
    "Q4_0": 0.14,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.12,
    "MXFP4": 0.17,
}


def source_tensors(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in shards(folder):
        tensors |= load_file(path)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def expected(folder: Path, shape: Shape) -> dict[str, np.ndarray]:
    """Every GGUF tensor, from the written description of the format."""
    source = source_tensors(folder)
    result = {
        "token_embd.weight": source["model.embed_tokens.weight"],
        "output_norm.weight": 1 + source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    prefixes = {layer: f"model.layers.{layer}." for layer in range(shape.layers)}
    if shape.mtp:
        prefixes[shape.layers] = "mtp.layers.0."
        nextn = f"blk.{shape.layers}.nextn."
        result[nextn + "eh_proj.weight"] = source["mtp.fc.weight"]
        result[nextn + "enorm.weight"] = 1 + source["mtp.pre_fc_norm_embedding.weight"]
        result[nextn + "hnorm.weight"] = 1 + source["mtp.pre_fc_norm_hidden.weight"]
        result[nextn + "shared_head_norm.weight"] = 1 + source["mtp.norm.weight"]
    for layer, prefix in prefixes.items():
        part = {}
        part["attn_norm.weight"] = 1 + source[prefix + "input_layernorm.weight"]
        part["post_attention_norm.weight"] = 1 + source[prefix + "post_attention_layernorm.weight"]
        if (layer + 1) % shape.interval == 0 or layer == shape.layers:
            at = prefix + "self_attn."
            for name in ("q", "k", "v"):
                part[f"attn_{name}.weight"] = source[f"{at}{name}_proj.weight"]
            part["attn_output.weight"] = source[at + "o_proj.weight"]
            part["attn_q_norm.weight"] = 1 + source[at + "q_norm.weight"]
            part["attn_k_norm.weight"] = 1 + source[at + "k_norm.weight"]
        else:
            at = prefix + "linear_attn."
            ratio, state = shape.value_heads // shape.key_heads, shape.state_size
            grouped = source[at + "in_proj_qkvz.weight"].reshape(shape.key_heads, -1, shape.hidden)
            q, k, v, z = np.split(grouped, np.cumsum([state, state, ratio * state]), axis=1)
            rows = [matrix.reshape(-1, shape.hidden) for matrix in (q, k, v, z)]
            part["attn_qkv.weight"] = np.concatenate(rows[:3])
            part["attn_gate.weight"] = rows[3]
            part["ssm_conv1d.weight"] = source[at + "conv1d.weight"][:, 0, :]
            part["ssm_ba.weight"] = source[at + "in_proj_ba.weight"]
            part["ssm_dt.bias"] = source[at + "dt_bias"]
            part["ssm_a"] = -np.exp(source[at + "A_log"])
            part["ssm_norm.weight"] = source[at + "norm.weight"]
            part["ssm_out.weight"] = source[at + "out_proj.weight"]
        mlp = prefix + "mlp."
        part["ffn_gate_inp.weight"] = source[mlp + "gate.weight"]
        part["ffn_gate_inp_shexp.weight"] = source[mlp + "shared_expert_gate.weight"][0]
        for name in ("gate", "up", "down"):
            part[f"ffn_{name}_shexp.weight"] = source[f"{mlp}shared_expert.{name}_proj.weight"]
            if mlp + "experts.down_proj" in source:
                stack = source[
                    mlp + ("experts.down_proj" if name == "down" else "experts.gate_up_proj")
                ]
                half = {"gate": slice(0, shape.expert_width), "up": slice(shape.expert_width, None)}
                part[f"ffn_{name}_exps.weight"] = stack[:, half.get(name, slice(None))]
            else:
                part[f"ffn_{name}_exps.weight"] = np.stack(
                    [
                        source[f"{mlp}experts.{expert}.{name}_proj.weight"]
                        for expert in range(shape.experts)
                    ]
                )
        result |= {f"blk.{layer}.{name}": value for name, value in part.items()}
    return result


def written(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and float32 values of every tensor, read by the gguf library."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


SHAPES = {
    "tiny": SHAPE,
    "no_mtp": Shape(hidden=64, layers=2, interval=2, experts=3, experts_used=1, mtp=False),
    "fused": Shape(hidden=64, layers=2, interval=2, experts=3, experts_used=2, fused_experts=True),
    "ratio_3": Shape(
        hidden=96, layers=2, interval=2, key_heads=3, value_heads=9, heads=6, kv_heads=3,
        experts=3, experts_used=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_f32_is_exact(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, SHAPES[name])
    convert(folder, tmp_path / "out.gguf", "F32", threads=2)
    found, needed = written(tmp_path / "out.gguf"), expected(folder, SHAPES[name])
    assert set(found) == set(needed)
    for tensor, values in needed.items():
        assert found[tensor][1].shape == values.shape, tensor
        np.testing.assert_array_equal(found[tensor][1], values, err_msg=tensor)


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind != "F32"])
def test_quantized_values_are_near(kind: str, tmp_path: Path) -> None:
    shape = Shape(
        hidden=256, layers=2, interval=2, experts=2, experts_used=1, vocabulary=512, shards=1
    )
    folder = write_checkpoint(tmp_path / "model", shape)
    report = convert(folder, tmp_path / "out.gguf", kind)
    found, needed = written(tmp_path / "out.gguf"), expected(folder, shape)
    assert report.tensors == len(found) == len(needed)
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size
    for tensor, values in needed.items():
        type_name, result = found[tensor]
        error = np.sqrt(np.mean((result - values) ** 2) / np.mean(values**2))
        limit = 0.0 if type_name == "F32" else LARGEST_ERROR[type_name]
        assert error <= limit, f"{tensor} {type_name}: relative error {error}"


def test_fused_and_separate_experts_give_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "separate.gguf", "BF16")
    tensors: dict[str, np.ndarray] = {}
    for path in shards(checkpoint):
        tensors |= load_file(path)
        path.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    prefixes = {name.partition("experts.")[0] for name in tensors if ".experts." in name}
    for prefix in prefixes:
        stacks = {
            name: np.stack(
                [
                    tensors.pop(f"{prefix}experts.{expert}.{name}_proj.weight")
                    for expert in range(SHAPE.experts)
                ]
            )
            for name in ("gate", "up", "down")
        }
        tensors[prefix + "experts.gate_up_proj"] = np.concatenate(
            [stacks["gate"], stacks["up"]], axis=1
        )
        tensors[prefix + "experts.down_proj"] = stacks["down"]
    save_file(tensors, checkpoint / "model.safetensors")
    convert(checkpoint, tmp_path / "fused.gguf", "BF16")
    assert (tmp_path / "fused.gguf").read_bytes() == (tmp_path / "separate.gguf").read_bytes()


def test_bytes_do_not_depend_on_threads_or_pieces(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(pristine, tmp_path / "one.gguf", "Q4_K_M", threads=1)
    monkeypatch.setattr("convert.write.PIECE", 1000)
    convert(pristine, tmp_path / "five.gguf", "Q4_K_M", threads=5)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "five.gguf").read_bytes()


def test_f16_and_f32_sources(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "bf16.gguf", "F32")
    for path, dtype in zip(shards(checkpoint), (np.float16, np.float32), strict=True):
        # Values both types hold exactly: BF16 with the small ones set to zero.
        tensors = {name: value.astype(np.float32) for name, value in load_file(path).items()}
        save_file({name: value.astype(dtype) for name, value in tensors.items()}, path)
    convert(checkpoint, tmp_path / "mixed.gguf", "F32")
    first, second = written(tmp_path / "bf16.gguf"), written(tmp_path / "mixed.gguf")
    for tensor, (_, values) in first.items():
        # float16 keeps BF16's 8 bits above 2^-16; below it the step is 2^-24.
        np.testing.assert_allclose(second[tensor][1], values, rtol=0, atol=2**-25, err_msg=tensor)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_refused(checkpoint: Path, tmp_path: Path, value: float) -> None:
    path = shards(checkpoint)[0]
    tensors = load_file(path)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    changed = tensors[name].copy()
    changed[3, 5] = changed[3, 7] = changed[100, 0] = value
    save_file(tensors | {name: changed}, path)
    with pytest.raises(Error) as caught:
        convert(checkpoint, tmp_path / "out.gguf", "BF16")
    message = str(caught.value)
    assert f"{path.name}: tensor {name} holds 3 values" in message
    assert "the first at [3, 5]" in message
    assert [item.name for item in tmp_path.iterdir()] == ["tiny-model"]


def test_a_matrix_of_zeros_is_noted(checkpoint: Path, tmp_path: Path) -> None:
    path = shards(checkpoint)[0]
    tensors = load_file(path)
    name = "model.layers.0.linear_attn.out_proj.weight"
    save_file(tensors | {name: np.zeros_like(tensors[name])}, path)
    report = convert(checkpoint, tmp_path / "out.gguf", "BF16")
    assert "blk.0.ssm_out.weight" in report.notes[-1]


def test_without_mtp(pristine: Path, checkpoint: Path, tmp_path: Path) -> None:
    convert(pristine, tmp_path / "off.gguf", "F32", mtp=False)
    assert not any("blk.4." in name for name in written(tmp_path / "off.gguf"))
    reader = gguf.GGUFReader(tmp_path / "off.gguf")
    assert "qwen3next.nextn_predict_layers" not in reader.fields
    assert reader.fields["qwen3next.block_count"].contents() == 4
    shutil.rmtree(checkpoint)
