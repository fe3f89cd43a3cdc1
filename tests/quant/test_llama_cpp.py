"""Squared error against llama.cpp's own encoders, called in its shared library."""

import ctypes
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from quant.format import Array, Format
from quant.measure import normalised_rmse
from quant.registry import FORMATS
from tests.quant.data import gaussian, heavy_tailed

pytestmark = pytest.mark.reference

NAMES = ["Q8_0", "Q4_0", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
EACH = pytest.mark.parametrize("format", [FORMATS[name] for name in NAMES], ids=NAMES)
WORSE_THAN_LLAMA_CPP = 1.02  # the project's acceptance limit
DEMO = Path(__file__).resolve().parents[2] / "ondevice" / "demo"


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        pytest.skip("llama_cpp is not installed")
    folder = Path(package.origin).parent / "lib"
    library = ctypes.CDLL(str(next(p for p in folder.iterdir() if "ggml-base" in p.name)))
    function = library.ggml_quantize_chunk
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    function.restype = ctypes.c_size_t
    return library


def encode(ggml: ctypes.CDLL, format: Format, values: Array) -> Array:
    """What llama.cpp makes of values (rows, columns) without an importance matrix."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    out = np.empty((rows, format.row_bytes(columns)), np.uint8)
    ggml.ggml_quantize_init(format.type_id)
    written = ggml.ggml_quantize_chunk(
        format.type_id, values.ctypes.data, out.ctypes.data, 0, rows, columns, None
    )
    assert written == out.nbytes
    return format.blocks(out)


def error_ratio(ggml: ctypes.CDLL, format: Format, values: Array) -> float:
    """Our error over llama.cpp's."""
    assert format.quantize is not None
    ours = normalised_rmse(values, format.dequantize(format.quantize(values)))
    return ours / normalised_rmse(values, format.dequantize(encode(ggml, format, values)))


@pytest.fixture(scope="module")
def trained() -> dict[str, Array]:
    """Every matrix of the demo checkpoint, as float32."""
    index = DEMO / "model.safetensors.index.json"
    if not index.exists():
        pytest.skip("no demo checkpoint")
    safetensors = pytest.importorskip("safetensors")
    tensors: dict[str, Array] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        with safetensors.safe_open(DEMO / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.ndim == 2:
                    tensors[name] = tensor.float().numpy()
    return tensors


@EACH
@pytest.mark.parametrize("values", [gaussian(), heavy_tailed()], ids=["gaussian", "heavy-tailed"])
def test_random_weights(ggml: ctypes.CDLL, format: Format, values: Array) -> None:
    assert error_ratio(ggml, format, values) <= WORSE_THAN_LLAMA_CPP


@EACH
def test_trained_weights(ggml: ctypes.CDLL, format: Format, trained: dict[str, Array]) -> None:
    ratios = {
        name: error_ratio(ggml, format, values)
        for name, values in trained.items()
        if values.shape[1] % format.length == 0
    }
    assert len(ratios) > 100
    worst = max(ratios, key=lambda name: ratios[name])
    assert ratios[worst] <= WORSE_THAN_LLAMA_CPP, worst
