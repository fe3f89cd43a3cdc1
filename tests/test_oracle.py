"""The judges judged: the oracle against stored transformers outputs, our files against checkpoints.

`oracle_gguf` undoes the format's transforms with the gguf library, so equality here means that a
converted file holds exactly the checkpoint's weights under the right names.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import convert
from tests.oracle import Oracle, State, read_safetensors
from tests.oracle_gguf import read_gguf
from tools.random_checkpoint import SHAPES, Shape, fingerprint, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
DEMO = ROOT / "ondevice" / "demo"
SEED = 1  # of the stored outputs

# transformers computes in float32, its delta rule in chunks: measured 1e-6 of the largest logit.
FLOAT32_ERROR = 1e-5
HALF = 1e-3  # outputs of a large vocabulary are stored as float16
# Norms are stored plus one and the decay as -exp(A_log), both in float32.
TRANSFORM_ERROR = 1e-6

SMALL = Shape(hidden=64, layers=2, interval=2, experts=8, experts_used=2)


@pytest.mark.parametrize("name", ["demo", *SHAPES])
def test_oracle_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = DEMO if name == "demo" else write_checkpoint(tmp_path, SHAPES[name], SEED)
    with np.load(DATA / f"{name}.npz") as stored:
        assert str(stored["fingerprint"]) == fingerprint(folder), "stored for other weights"
        ids, reference = stored["ids"], stored["logits"]
    logits = Oracle.open(folder).forward(ids)
    error = np.abs(logits - reference).max() / np.abs(reference).max()
    assert error <= (HALF if reference.dtype == np.float16 else FLOAT32_ERROR), f"{error:.1e}"


def test_oracle_steps_equal_its_prefill(tmp_path: Path) -> None:
    oracle = Oracle.open(write_checkpoint(tmp_path, SMALL))
    ids = np.arange(30) * 7 % SMALL.vocabulary
    state, hidden = State(), []
    for part in np.split(ids, [1, 2, 9]):
        hidden.append(oracle.hidden(part, state))
    whole = oracle.hidden(ids)
    np.testing.assert_allclose(np.concatenate(hidden), whole, rtol=0, atol=1e-12)

    drafts = State()
    stepped = [oracle.mtp(whole[t : t + 1], ids[t + 1 : t + 2], drafts)[0] for t in range(29)]
    logits, _ = oracle.mtp(whole[:29], ids[1:])
    np.testing.assert_allclose(np.concatenate(stepped), logits, rtol=0, atol=1e-12)


def test_checkpoints_repeat_and_layouts_agree(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", SMALL, 5)
    again = write_checkpoint(tmp_path / "again", SMALL, 5)
    other = write_checkpoint(tmp_path / "other", SMALL, 6)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)

    fused_shape = Shape(
        hidden=64, layers=2, interval=2, experts=8, experts_used=2, fused_experts=True
    )
    fused = write_checkpoint(tmp_path / "fused", fused_shape, 5)
    ids = np.arange(12)
    assert np.array_equal(Oracle.open(first).forward(ids), Oracle.open(fused).forward(ids))


@pytest.mark.parametrize("name", ["demo", "odd_heads", "deep"])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_converted_file_holds_the_checkpoint(name: str, kind: str, tmp_path: Path) -> None:
    folder = DEMO if name == "demo" else write_checkpoint(tmp_path / "hf", SHAPES[name], SEED)
    path = tmp_path / "model.gguf"
    convert.convert(folder, path, type=kind)
    weights, config = read_gguf(path)
    wanted = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {key: wanted[key] for key in config} == pytest.approx(config)
    expected = stacked(read_safetensors(folder), wanted["num_experts"])
    assert set(weights) == set(expected)
    for key, value in expected.items():
        found = weights[key].reshape(value.shape)
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=TRANSFORM_ERROR, err_msg=key)


def stacked(weights: dict[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """Per-expert tensors as the stacks transformers 5 keeps: gate over up, and down."""
    for first in [name for name in weights if name.endswith(".experts.0.gate_proj.weight")]:
        prefix = first.removesuffix("0.gate_proj.weight")
        gate, up, down = (
            np.stack([weights.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(experts)])
            for part in ("gate", "up", "down")
        )
        weights[prefix + "gate_up_proj"] = np.concatenate([gate, up], axis=1)
        weights[prefix + "down_proj"] = down
    return weights
