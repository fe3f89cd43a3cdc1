"""Copy a GGUF file with changed tensors or keys, through the gguf library.

The copies are the layouts that other programs once wrote: `ssm_in` for the DeltaNet input and
`ffn_gate_up_exps` for the experts. Both only move whole rows, so a quantised tensor keeps its
blocks and the model keeps its meaning to the bit.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, gguf.ReaderTensor]
Changed = Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]
Keys = dict[str, Any]
Change = Callable[[Tensors, Keys], Changed]


def unchanged(tensors: Tensors, keys: Keys) -> Changed:
    """Every tensor as it is."""
    for name, tensor in tensors.items():
        yield name, tensor.data, tensor.tensor_type


def join_delta_input(tensors: Tensors, keys: Keys) -> Changed:
    """attn_qkv (rows q | k | v) and attn_gate (z) -> ssm_in, rows q, k, v, z per key head."""
    key_heads = keys["qwen3next.ssm.group_count"]
    key_rows = key_heads * keys["qwen3next.ssm.state_size"]
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".attn_")
        if kind == "qkv.weight":
            qkv, z = tensor.data, tensors[prefix + ".attn_gate.weight"].data
            parts = [qkv[:key_rows], qkv[key_rows : 2 * key_rows], qkv[2 * key_rows :], z]
            grouped = [part.reshape(key_heads, -1, part.shape[-1]) for part in parts]
            rows = np.concatenate(grouped, axis=1).reshape(-1, qkv.shape[-1])
            yield prefix + ".ssm_in.weight", rows, tensor.tensor_type
        elif kind != "gate.weight":
            yield name, tensor.data, tensor.tensor_type


def fuse_experts(tensors: Tensors, keys: Keys) -> Changed:
    """ffn_gate_exps and ffn_up_exps -> ffn_gate_up_exps, the gate's rows first."""
    for name, tensor in tensors.items():
        if name.endswith("ffn_gate_exps.weight"):
            up = tensors[name.replace("_gate_", "_up_")].data
            fused = np.concatenate([tensor.data, up], axis=1)
            yield name.replace("_gate_", "_gate_up_"), fused, tensor.tensor_type
        elif not name.endswith("ffn_up_exps.weight"):
            yield name, tensor.data, tensor.tensor_type


def rewrite(
    source: Path,
    target: Path,
    change: Change = unchanged,
    *,
    drop: Collection[str] = (),
    add: Mapping[str, list[bool]] | None = None,
) -> Path:
    """Write `target`: `source` with its tensors changed, keys dropped, boolean lists added."""
    reader = gguf.GGUFReader(source)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    writer = gguf.GGUFWriter(target, keys["general.architecture"])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in drop:
            continue
        element = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    for name, values in (add or {}).items():
        writer.add_array(name, values)
    for name, data, kind in change({tensor.name: tensor for tensor in reader.tensors}, keys):
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
