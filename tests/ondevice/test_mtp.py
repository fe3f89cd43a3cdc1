"""The multi-token-prediction block against references we did not write.

The float64 oracle judges it by default; torch judges it too, assembled from transformers' own
layer classes, since transformers itself leaves the block out.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import convert
import ondevice
from ondevice.kernels import ahead, layout
from ondevice.model import Model
from ondevice.speculate import Prediction
from ondevice.state import State
from tests.oracle import Oracle
from tests.oracle import State as OracleState
from tests.oracle_gguf import read_gguf
from tools.random_checkpoint import Shape, write_checkpoint

SHAPE = Shape(
    hidden=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    state_size=64,
    expert_width=256,
    shared_width=256,
    vocabulary=512,
)
TOKENS = 40
# float32 sums of some hundred terms, and keys and values in half floats. No rope
# moves logits by 1e-2, the two halves of the input exchanged by more.
F32_ERROR = 1e-3
# activations in 8 bits
QUANTISED_ERROR = 3e-2


@dataclass
class Files:
    checkpoint: Path
    f32: Path
    mixed: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("mtp")
    found = Files(folder / "checkpoint", folder / "F32.gguf", folder / "Q4_K_M.gguf")
    write_checkpoint(found.checkpoint, SHAPE, 1)
    convert.convert(found.checkpoint, found.f32, type="F32")
    convert.convert(found.checkpoint, found.mixed, type="Q4_K_M")
    return found


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(7).integers(0, SHAPE.vocabulary, TOKENS).astype(np.int32)


class Block:
    """The block of a model, after a prompt was read in batches."""

    def __init__(self, model: Model, ids: np.ndarray, batches: list[int]) -> None:
        assert model.ahead is not None
        self.model, self.ahead, self.ids = model, model.ahead, ids
        self.state = State(model.config, model.context, model.kv)
        self.ahead.prepare(model, self.state)
        self.step = model.step(self.state)
        self.step[layout.HISTORY] = ids.ctypes.data
        assert sum(batches) == len(ids) - 1
        for batch in batches:
            start = self.state.position
            assert model.prefill(self.state, self.step, ids[start : start + batch])

    @property
    def prediction(self) -> Prediction:
        assert self.state.prediction is not None
        return self.state.prediction

    def guess(self, position: int, drafts: int = 1, rows: int = 1) -> tuple[np.ndarray, list[int]]:
        """Logits of the last of so many drafts, the first made at `position`; the drafts.

        The block takes so many positions up to that one.
        """
        model, step, record = self.model, self.step, self.ahead.record
        head = self.ahead.head
        assert head is not None
        with model._alone() as team:
            model._begin(self.state, step, rows)
            record[[ahead.AT, ahead.DRAFTED]] = position + 1, drafts
            record[ahead.MADE], step[layout.POSITION] = (
                0,
                position + 1 - rows - self.prediction.start,
            )
            step[[layout.CACHE, layout.STEADY]] = self.prediction.cache.ctypes.data, 1
            model._run(team, head.drafts, step)
            step[layout.CACHE] = self.state.cache.ctypes.data
        vocabulary = model.config.vocabulary
        logits = head.logits.memory.view(np.float32)[:vocabulary].copy()
        checked = record[ahead.RECORD_WORDS :].view(np.int32)[1 : 1 + drafts].tolist()
        return logits, checked


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(found - expected).max() / abs(expected).max())


@pytest.mark.parametrize("batches", [[39], [1] * 39, [7, 20, 12]])
def test_equals_the_oracle(files: Files, ids: np.ndarray, batches: list[int]) -> None:
    oracle = Oracle.open(files.checkpoint)
    hidden = oracle.hidden(ids)
    expected, _ = oracle.mtp(hidden[:-1], ids[1:])
    with ondevice.load(files.f32, threads=2, mtp="on") as model:
        block = Block(model, ids, batches)
        assert (block.prediction.start, block.prediction.end) == (0, TOKENS - 1)
        for position in range(TOKENS - 1):
            logits, drafts = block.guess(position)
            assert relative_error(logits, expected[position]) <= F32_ERROR, position
            assert drafts == [logits.argmax()]


@pytest.mark.parametrize("kind", ["f32", "mixed"])
def test_positions_that_passed_change_no_bit_of_a_guess(
    files: Files, ids: np.ndarray, kind: str
) -> None:
    with ondevice.load(getattr(files, kind), threads=2, mtp="on") as model:
        block = Block(model, ids, [39])
        for rows in (2, 3, 20):
            alone, expected = block.guess(TOKENS - 2, 3)
            logits, drafts = block.guess(TOKENS - 2, 3, rows)
            assert logits.tobytes() == alone.tobytes() and drafts == expected


def test_further_drafts_equal_the_oracle(files: Files, ids: np.ndarray) -> None:
    """Fed with its own output: the vector in place of the trunk's, and the token it has guessed."""
    oracle = Oracle.open(files.checkpoint)
    hidden = oracle.hidden(ids)
    seen = OracleState()
    oracle.mtp(hidden[:19], ids[1:20], seen)
    with ondevice.load(files.f32, threads=1, mtp="on") as model:
        block = Block(model, ids, [39])
        for count in (1, 2, 3, 4):
            logits, drafts = block.guess(19, count)
            own = copy.deepcopy(seen)
            vector, token = hidden[19:20], int(ids[20])
            for draft in drafts:
                expected, vector = oracle.mtp(vector, [token], own)
                token = draft
            assert relative_error(logits, expected[0]) <= F32_ERROR, count
            # what guesses left in the cache does not stay there
            again, _ = block.guess(19)
            assert block.guess(19)[0].tolist() == again.tolist()


@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_large_vocabularies_are_guessed_in_part(
    files: Files, ids: np.ndarray, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The common tokens and those that the text had last, with the logits that they have."""
    common, recent = 96, 48
    monkeypatch.setattr("ondevice.candidates.COMMON", common)
    monkeypatch.setattr("ondevice.candidates.RECENT", recent)
    oracle = Oracle.open(files.checkpoint)
    expected, _ = oracle.mtp(oracle.hidden(ids)[:-1], ids[1:])
    with ondevice.load(files.f32, threads=2, mtp="on", memory=memory) as model:
        block = Block(model, ids, [39])
        assert block.ahead.head is not None
        tokens = block.ahead.head.candidates.tokens
        texts = [ids[:20], ids[20:], np.arange(300, 500, dtype=np.int32)]
        drafted = set()
        for text in texts:
            block.ahead.note(text)
            had = list(dict.fromkeys(np.concatenate(texts)[::-1].tolist()))
            if text is texts[-1]:
                assert set(had[:recent]) == set(tokens.tolist())
            assert len(set(tokens.tolist())) == recent
            assert {token for token in text[-recent:].tolist() if token >= common} <= set(
                tokens.tolist()
            )
            known = [*range(common), *tokens.tolist()]
            for position in range(TOKENS - 1):
                logits, drafts = block.guess(position)
                found, true = logits[: len(known)], expected[position][known]
                assert relative_error(found, true) <= F32_ERROR, position
                assert drafts == [known[found.argmax()]]
                drafted.add(drafts[0])
    assert min(drafted) < common < max(drafted)


def test_quantised_file_means_its_bytes(files: Files, ids: np.ndarray) -> None:
    oracle = Oracle(*read_gguf(files.mixed))
    expected, _ = oracle.mtp(oracle.hidden(ids)[:-1], ids[1:])
    with ondevice.load(files.mixed, threads=2, mtp="on") as model:
        block = Block(model, ids, [39])
        errors = [
            relative_error(block.guess(position)[0], expected[position])
            for position in range(TOKENS - 1)
        ]
    assert np.median(errors) <= QUANTISED_ERROR


@pytest.mark.reference
def test_equals_transformers_layers(files: Files, ids: np.ndarray) -> None:
    """The trunk is transformers'; the block is its decoder layer, norms and rotary embedding."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    trunk = transformers.Qwen3NextForCausalLM.from_pretrained(
        files.checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    weights = {}
    for path in sorted(files.checkpoint.glob("*.safetensors")):
        weights |= {name: value.float() for name, value in load_file(path).items()}
    config = copy.deepcopy(trunk.config)
    config.layer_types = ["full_attention"]
    layer = modeling.Qwen3NextDecoderLayer(config, 0).float()
    prefix = "mtp.layers.0."
    own = {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix) and ".experts." not in name
    }
    experts = [f"{prefix}mlp.experts.{number}." for number in range(SHAPE.experts)]
    own["mlp.experts.gate_up_proj"] = torch.stack(
        [
            torch.cat([weights[f"{e}gate_proj.weight"], weights[f"{e}up_proj.weight"]])
            for e in experts
        ]
    )
    own["mlp.experts.down_proj"] = torch.stack([weights[f"{e}down_proj.weight"] for e in experts])
    layer.load_state_dict(own, strict=True)

    def norm(name: str) -> "torch.nn.Module":
        module = modeling.Qwen3NextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        module.load_state_dict({"weight": weights[name]})
        return module

    with torch.no_grad():
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        hidden = trunk.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        embedded = trunk.model.embed_tokens(tokens[:, 1:])
        both = [
            norm("mtp.pre_fc_norm_embedding.weight")(embedded),
            norm("mtp.pre_fc_norm_hidden.weight")(hidden),
        ]
        x = torch.nn.functional.linear(torch.cat(both, dim=-1), weights["mtp.fc.weight"])
        count = x.shape[1]
        positions = torch.arange(count)[None]
        mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
        x = layer(
            x,
            position_embeddings=trunk.model.rotary_emb(x, positions),
            attention_mask=mask,
            position_ids=positions,
        )
        expected = trunk.lm_head(norm("mtp.norm.weight")(x))[0].numpy()
    with ondevice.load(files.f32, threads=2, mtp="on") as model:
        block = Block(model, ids, [39])
        for position in range(TOKENS - 1):
            logits, _ = block.guess(position)
            assert relative_error(logits, expected[position]) <= F32_ERROR, position
