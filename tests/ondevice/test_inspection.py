"""What `inspect` says of a file, against sums made here from the model's dimensions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ondevice import inspection
from ondevice.config import Config
from quant.errors import Error
from tests.ondevice.gguf_builder import Shape, encode_f16, tiny_model, tiny_weights

VOCABULARY, HIDDEN = 261, 64


def sizes(shape: Shape, **layout: bool) -> dict[str, int]:
    return {name: values.size for name, values in tiny_weights(shape, **layout).items()}


@pytest.mark.parametrize("fused", [False, True])
def test_counts(fused: bool, tmp_path: Path) -> None:
    shape = Shape()
    counted = sizes(shape, fused=fused)
    trunk = {name: size for name, size in counted.items() if not name.startswith("blk.4.")}
    experts = sum(size for name, size in trunk.items() if "_exps." in name)
    assert experts == shape.layers * shape.experts * 3 * shape.expert_width * HIDDEN
    active = sum(trunk.values()) - VOCABULARY * HIDDEN - experts * 5 // 8  # 3 of 8 experts
    path = tiny_model(tmp_path / "m.gguf", fused=fused, metadata={"general.sampling.top_k": 20})
    description = inspection.describe(path)
    assert description["parameters"] == sum(counted.values())
    assert description["mtp_parameters"] == sum(counted.values()) - sum(trunk.values())
    assert description["active_parameters"] == active
    assert description["bytes_per_token"] == 4 * (active + HIDDEN)
    assert description["bits_per_weight"] == 32
    assert description["bytes"] == path.stat().st_size
    assert description["mtp"] is True
    assert description["sampling"] == {"top_k": 20}
    assert description["config"]["layers"] == 4
    assert json.loads(json.dumps(description))["config"]["recurrent"] == [True, True, True, False]


def test_half_precision_and_tied_output(tmp_path: Path) -> None:
    shape = Shape(mtp_layers=0)
    path = tiny_model(tmp_path / "m.gguf", shape=shape, tied=True, encode=encode_f16)
    description = inspection.describe(path)
    assert description["mtp"] is False
    assert description["mtp_parameters"] == 0
    weights = tiny_weights(shape, tied=True)
    inactive = sum(values.size for name, values in weights.items() if "_exps." in name) * 5 // 8
    everything = sum(values.size for values in weights.values())
    assert description["active_parameters"] == everything - inactive
    by_name = {tensor["name"]: tensor for tensor in description["tensors"]}
    assert by_name["token_embd.weight"] == {
        "name": "token_embd.weight",
        "shape": [VOCABULARY, HIDDEN],
        "type": "F16",
        "bytes": 2 * VOCABULARY * HIDDEN,
    }
    whole = sum(tensor["bytes"] for tensor in description["tensors"])
    assert description["bits_per_weight"] == 8 * whole / everything
    assert description["bytes_per_token"] == whole - 2 * inactive + 2 * HIDDEN


def test_state_and_keys_of_the_80b() -> None:
    config = Config(
        architecture="qwen3next",
        name="",
        layers=48,
        mtp_layers=1,
        context_length=262_144,
        hidden=2048,
        vocabulary=151_936,
        recurrent=(True, True, True, False) * 12,
        heads=16,
        kv_heads=2,
        head_dim=256,
        rope_dimensions=64,
        rope_base=1e7,
        norm_epsilon=1e-6,
        experts=512,
        experts_used=10,
        expert_width=512,
        shared_width=512,
        key_heads=16,
        value_heads=32,
        state_size=128,
        conv_kernel=4,
    )
    assert inspection.state_bytes(config) == 36 * 4 * (32 * 128 * 128 + 3 * 8192)  # 75.4 MiB
    assert inspection.kv_bytes_per_token(config) == 18 << 10
    assert dataclasses.asdict(config)["experts"] == 512


def test_table_reads_well(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", metadata={"general.sampling.temp": 0.5})
    lines = inspection.table(inspection.describe(path)).splitlines()
    assert lines[1] == "model       qwen3next tiny"
    assert lines[2].startswith("parameters  422.")
    assert "3 gated DeltaNet, 1 gated attention" in lines[3]
    assert lines[-1] == "sampling    temp 0.5"
    assert max(map(len, lines)) < 120 + len(str(path))


def test_unsound_model_is_refused(tmp_path: Path) -> None:
    norm = {"output_norm.weight": np.ones(3, np.float32)}
    with pytest.raises(Error, match=r"output_norm\.weight has shape \(3\); needed \(64\)"):
        inspection.describe(tiny_model(tmp_path / "m.gguf", tensors=norm))
