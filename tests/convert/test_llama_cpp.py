"""Against llama.cpp itself: it chooses the same formats, and runs our files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert import convert, plan
from convert.recipe import FILE_TYPES
from tools.random_checkpoint import Shape, write_checkpoint

pytestmark = pytest.mark.reference
llama_cpp = pytest.importorskip("llama_cpp")

SMALL: dict[str, Any] = {
    "hidden": 256,
    "experts": 4,
    "experts_used": 2,
    "shared_width": 32,
    "shards": 1,
}
SHAPES = {
    "one_layer": Shape(layers=1, interval=1, **SMALL),
    "nine_layers_no_mtp": Shape(layers=9, mtp=False, **SMALL),
    "sixteen_layers": Shape(layers=16, **SMALL),
    "four_queries_per_key": Shape(layers=5, heads=8, kv_heads=2, **SMALL),
    "eight_experts": Shape(layers=3, interval=2, **SMALL | {"experts": 8}),
    "whole_superblocks": Shape(layers=8, expert_width=256, **SMALL | {"shared_width": 512}),
    "tied": Shape(layers=4, tied=True, **SMALL),
    "tied_narrow": Shape(layers=4, tied=True, **SMALL | {"hidden": 96}),
    "no_blocks_fit": Shape(layers=4, expert_width=48, **SMALL | {"hidden": 144}),
}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    callback = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(callback, None)
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_format_for_every_tensor(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, SHAPES[name])
    source, output = tmp_path / "source.gguf", tmp_path / "output.gguf"
    convert(folder, source, "F32")
    for kind in FILE_TYPES.values():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = kind.number
        settings.nthread = 2
        result = llama_cpp.llama_model_quantize(
            str(source).encode(), str(output).encode(), settings
        )
        assert result == 0
        theirs = {item.name: item.tensor_type.name for item in gguf.GGUFReader(output).tensors}
        ours = {item.name: item.format.name for item in plan(folder, kind.name).tensors}
        assert ours == theirs, kind.name


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "MXFP4_MOE"])
@pytest.mark.parametrize("name", ["four_queries_per_key", "tied"])
def test_it_runs(name: str, kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / name, SHAPES[name])
    convert(folder, tmp_path / "model.gguf", kind)
    model = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=64, n_threads=2, logits_all=True, verbose=False
    )
    assert model.metadata["qwen3next.nextn_predict_layers"] == "1"
    ids = model.tokenize("the model reads 한국어 <|im_end|>".encode(), add_bos=False, special=True)
    assert model.token_eos() in ids
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
    model.close()
