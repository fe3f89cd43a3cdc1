"""The GGUF reader: equal to the `gguf` package on good files, one clear line on bad ones."""

import itertools
import os
import re
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from ondevice import gguf_header
from ondevice.config import Config
from ondevice.gguf_file import GGUFFile
from ondevice.weights import Weights
from quant.errors import Error, ResourceError
from quant.registry import FORMATS
from tests.ondevice.gguf_builder import (
    BOOL,
    I32,
    STRING,
    U8,
    U32,
    U64,
    Array,
    Builder,
    Shape,
    number,
    string,
    tiny_builder,
    tiny_model,
)

SECONDS = 1.0  # from opening to the message, for any file
MEMORY = 4 << 20  # bytes a refused file of a few kilobytes may make us allocate
Q4_K, IQ2_XS = 12, 17


def sample() -> Builder:
    """Two tensors, 4 and 8 floats, and one key."""
    builder = Builder().key("general.name", "sample")
    return builder.array("a", np.arange(4)).array("b", np.arange(8).reshape(2, 4))


def cut(build: bytes, count: int) -> bytes:
    return build[: len(build) - count]


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def nested_arrays(depth: int) -> bytes:
    inner = (number(U32, 9) + number(U64, 1)) * depth
    return Builder().raw_key("k", 9, inner + number(U32, U8) + number(U64, 0)).build()


BIG = 2**64 - 1

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"empty file \(0 bytes\)"),
    "3 bytes": (lambda: b"GGU", "too short for a GGUF header: 3 of 24 bytes"),
    "header cut": (lambda: header()[:20], "too short for a GGUF header: 20 of 24 bytes"),
    "magic": (lambda: b"ABCD" + header()[4:], "not a GGUF file: it starts with b'ABCD'"),
    "byte-swapped magic": (lambda: header(magic=b"FUGG"), "byte-swapped"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "looks like a zip archive"),
    "json": (lambda: b'{"architectures": ["Qwen3Next"]}', "looks like JSON"),
    "safetensors": (lambda: number(U64, 40) + b'{"a":{}}' + bytes(40), "a safetensors file"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git-LFS pointer"),
    "html": (lambda: b"<!DOCTYPE html><html>404</html>", "an HTML page"),
    "version 0": (lambda: header(version=0), "GGUF version 0; supported are 2 and 3"),
    "version 1": (lambda: header(version=1), "GGUF version 1; supported are 2 and 3"),
    "version 99": (lambda: header(version=99), "GGUF version 99; supported are 2 and 3"),
    "big-endian": (lambda: header(version=3 << 24), "big-endian GGUF is not supported"),
    "keys 2^62": (lambda: header(keys=2**62), "claims 4,611,.* metadata keys; the limit is 65,536"),
    "keys 2^64-1": (lambda: header(keys=BIG) + bytes(99), "metadata keys; the limit is"),
    "tensors 2^62": (lambda: header(tensors=2**62) + bytes(99), "tensors; the limit is 262,144"),
    "keys 20": (lambda: header(keys=20) + bytes(99), "20 metadata keys; the 99 bytes left hold"),
    "tensors 20": (lambda: header(tensors=20) + bytes(99), "tensors; the 99 bytes left hold"),
    "key length 2^63": (lambda: header(keys=1) + number(U64, 2**63) + bytes(40), "claims 9,223,"),
    "key length 2^30": (lambda: header(keys=1) + number(U64, 2**30) + bytes(40), "the limit is"),
    "string 2^30": (
        lambda: Builder().raw_key("k", STRING, number(U64, 2**30)).build(),
        "k claims 1,073,741,824 bytes; the limit is 16,777,216",
    ),
    "string cut": (
        lambda: Builder().raw_key("k", STRING, number(U64, 5000)).build(),
        "k needs 5,000 bytes and .* are left: download incomplete",
    ),
    "value type 77": (lambda: Builder().raw_key("k", 77, b"\0").build(), "k has value type 77"),
    "element type 77": (
        lambda: Builder().raw_key("k", 9, number(U32, 77) + number(U64, 1) + b"\0").build(),
        "k has value type 77",
    ),
    "duplicate key": (
        lambda: Builder().key("k", 1).key("k", 2).build(),
        "duplicate key k at bytes 24 and 41",
    ),
    **{
        f"array {exponent}": (
            lambda exponent=exponent: (
                Builder().raw_key("k", 9, number(U32, I32) + number(U64, 2**exponent)).build()
            ),
            "elements in k; the limit is 67,108,864",
        )
        for exponent in (27, 30, 62)
    },
    "array 2^26": (
        lambda: Builder().raw_key("k", 9, number(U32, I32) + number(U64, 2**26)).build(),
        "67,108,864 elements in k; the .* bytes left hold at most",
    ),
    "string array": (
        lambda: Builder().raw_key("k", 9, number(U32, STRING) + number(U64, 2**26)).build(),
        "67,108,864 strings in k; the .* bytes left hold at most",
    ),
    "string in array": (
        lambda: (
            Builder().raw_key("k", 9, number(U32, 8) + number(U64, 1) + bytes(7) + b"\1").build()
        ),
        "string 0 of k claims 72,057,594,037,927,936 bytes",
    ),
    "string array cut": (
        lambda: (
            header(keys=1)
            + string("k")
            + struct.pack("<IIQ", 9, 8, 3)
            + string("xx") * 2
            + bytes(7)
        ),
        "string 2 of k",
    ),
    "nested arrays": (lambda: nested_arrays(2000), "k is an array of arrays"),
    "bool 2": (lambda: Builder().raw_key("k", BOOL, b"\2").build(), "k holds a bool of value 2"),
    "key not UTF-8": (
        lambda: Builder().key(b"\xff\xfe", 1).build(),
        r"key 0, b'\\xff\\xfe', is not",
    ),
    "key with newline": (lambda: Builder().key("a\nb", 1).build(), "holds control characters"),
    "empty key": (lambda: Builder().key("", 1).build(), "metadata key 0 is empty"),
    "alignment 13": (
        lambda: Builder().key("general.alignment", 13).build(),
        "alignment is 13; need",
    ),
    "alignment 0": (lambda: Builder().key("general.alignment", 0).build(), "alignment is 0; need"),
    "alignment text": (lambda: Builder().key("general.alignment", "x").build(), "alignment is 'x'"),
    "dimensions": (
        lambda: Builder().tensor("t", [4], dimensions=10**6).build(),
        "tensor t has 1,000,000 dimensions; needed 1 to 4",
    ),
    "no dimensions": (lambda: Builder().tensor("t", []).build(), "tensor t has 0 dimensions"),
    "dimension 0": (lambda: Builder().tensor("t", [4, 0]).build(), "tensor t has a dimension of 0"),
    "dimension -1": (lambda: Builder().tensor("t", [BIG]).build(), "t has a dimension of 18,446"),
    "product wraps": (
        lambda: Builder().tensor("t", [2**62, 2**62, 4, 1], data=bytes(32)).build(),
        "tensor t ends at byte 340,",
    ),
    "type 99": (
        lambda: Builder().tensor("t", [4], 99, bytes(16)).build(),
        "tensor t has type number 99, which is unknown; supported types are F32",
    ),
    "type 4": (lambda: Builder().tensor("t", [4], 4).build(), "tensor t has type Q4_2; supported"),
    "type IQ2_XS": (
        lambda: Builder().tensor("t", [256], IQ2_XS, bytes(74)).build(),
        "tensor t has type IQ2_XS; supported types are F32, F16.*Q4_K",
    ),
    "Q4_K row of 31": (
        lambda: Builder().tensor("t", [31], Q4_K).build(),
        "tensor t is Q4_K with rows of 31 weights; needed a multiple of 256",
    ),
    "duplicate tensor": (
        lambda: Builder().array("t", np.ones(4)).array("t", np.ones(4)).build(),
        "duplicate tensor t",
    ),
    "offset 2^40": (
        lambda: sample().tensor("t", [4], offset=2**40).build(),
        "tensor t lies outside the file: offset 1,099,511,627,776 and 16 bytes",
    ),
    "offset 2^64-32": (
        lambda: sample().tensor("t", [4], offset=2**64 - 32).build(),
        "tensor t lies outside the file",
    ),
    "offset unaligned": (
        lambda: sample().tensor("t", [4], offset=8).build(),
        "tensor t starts at offset 8; needed a multiple of 32",
    ),
    "overlap": (
        lambda: Builder().array("a", np.ones(16)).tensor("b", [4], offset=32).build(),
        "tensors a and b overlap at offset 32",
    ),
    "same offset": (
        lambda: Builder().array("a", np.ones(16)).tensor("b", [4], offset=0).build(),
        "tensors a and b overlap at offset 0",
    ),
    "one byte short": (
        lambda: cut(Builder().array("a", np.ones(16)).array("b", np.ones(16)).build(), 1),
        r"file is 223 of 224 bytes \(tensor b ends at byte 224\): download incomplete",
    ),
    "half": (lambda: sample().build()[:100], "are left: download incomplete"),
    "name of 70": (lambda: Builder().tensor("t" * 70, [4]).build(), "claims 70 bytes; the limit"),
    "empty name": (lambda: Builder().tensor("", [4]).build(), "the name of tensor 0 is empty"),
    "name not UTF-8": (lambda: Builder().tensor(b"\xff", [4]).build(), r"b'\\xff', is not UTF-8"),
    "Q4_K 2^40": (
        lambda: Builder().tensor("t", [2**40], Q4_K, bytes(144)).build(),
        "download incomplete",
    ),
    "two 2^63": (
        lambda: Builder().tensor("a", [2**61]).tensor("b", [2**61], offset=2**63).build(),
        "tensor a ends at byte 9,223,",
    ),
    "pad wrap": (
        lambda: Builder().tensor("a", [2**62 - 4], data=bytes(64)).build(),
        "tensor a ends at byte 18,446,",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_gets_one_line(name: str, tmp_path: Path) -> None:
    build, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(build())
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(Error) as caught:
            GGUFFile.open(path)
        seconds = time.perf_counter() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert re.search(message, text), text
    assert text.startswith(str(path))
    assert "\n" not in text
    assert caught.value.exit_code == 3
    assert seconds < SECONDS
    assert peak < MEMORY


def test_missing_file_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"absent\.gguf: no such file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(Error, match="a folder; needed a GGUF file"):
        GGUFFile.open(tmp_path)
    with pytest.raises(ResourceError, match="cannot be read"):
        GGUFFile.open(tmp_path / ("x" * 5000))
    with pytest.raises(ResourceError, match="cannot be read"):
        GGUFFile.open("a\0b")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(Error, match="not a regular file"):
        GGUFFile.open(tmp_path / "pipe.gguf")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["magic", "half", "overlap", "one byte short", "duplicate key"])
def test_failed_open_leaves_nothing_open(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[name][0]())
    with pytest.raises(Error) as caught:
        GGUFFile.open(path)
    assert caught.value is not None  # its traceback is alive here
    assert not open_names("bad.gguf")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_close_unmaps_when_the_last_view_is_gone(tmp_path: Path) -> None:
    path = sample().write(tmp_path / "good.gguf")
    with GGUFFile.open(path) as file:
        data = file.tensors["b"].data
        assert open_names("good.gguf")
    assert data.view("<f4")[3] == 3
    del data
    assert not open_names("good.gguf")


def open_names(name: str) -> list[str]:
    """Places where this process has a file of that name mapped or open."""
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    handles = (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return mapped + [str(link) for entry in handles if name in str(link := entry.readlink())]


def test_values_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    builder = sample().key("big", 2**40).key("small", -5).key("flag", True).key("x", 0.5)
    builder.key("words", Array(STRING, ["one", "zwei", b"\xff\xfe"])).key("none", Array(STRING, []))
    builder.key("flags", Array(BOOL, [True, False])).key("numbers", Array(I32, [1, -2]))
    builder.key("broken", b"caf\xe9")
    with GGUFFile.open(builder.write(path)) as file:
        metadata = file.metadata
        assert (metadata["big"], metadata["small"], metadata["x"]) == (2**40, -5, 0.5)
        assert metadata["flag"] is True
        assert metadata["broken"] == "caf\N{REPLACEMENT CHARACTER}"
        assert metadata["words"][:2] == ["one", "zwei"]
        assert metadata["words"][2].encode("utf-8", "surrogateescape") == b"\xff\xfe"
        assert metadata["none"] == []
        np.testing.assert_array_equal(metadata["flags"], [True, False])
        np.testing.assert_array_equal(metadata["numbers"], [1, -2])
        tensor = file.tensors["b"]
        assert (tensor.shape, tensor.rows, tensor.columns, tensor.nbytes) == ((2, 4), 2, 4, 32)
        assert tensor.format is FORMATS["F32"]
        assert tensor.address % 32 == 0
        assert not tensor.data.flags.writeable
        np.testing.assert_array_equal(tensor.data.view("<f4"), np.arange(8))
        assert file.nbytes == path.stat().st_size


def test_version_2_and_alignment_1(tmp_path: Path) -> None:
    builder = Builder(version=2, alignment=1).key("general.alignment", 1)
    builder.tensor("t", [3], 1, np.array([1, 2, 3], "<f2").tobytes()).array("u", np.ones(2))
    with GGUFFile.open(builder.write(tmp_path / "good.gguf")) as file:
        tensors = file.tensors
        np.testing.assert_array_equal(tensors["t"].data.view("<f2"), [1, 2, 3])
        np.testing.assert_array_equal(tensors["u"].data.view("<f4"), [1, 1])


def test_tensors_in_any_order_with_gaps(tmp_path: Path) -> None:
    builder = Builder()
    builder.tensor("late", [4], offset=64).tensor("early", [4], offset=0)
    builder.data = np.arange(20, dtype="<f4").tobytes()
    with GGUFFile.open(builder.write(tmp_path / "good.gguf")) as file:
        assert file.tensors["late"].data.view("<f4")[0] == 16
        assert file.tensors["early"].data.view("<f4")[1] == 1


def test_equal_to_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "qwen3next")
    writer.add_name("Größe 크기")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("flag", True)
    writer.add_token_list(["a", "b", "한국어", "😀"])
    writer.add_token_types([1, 2, 3, 4])
    writer.add_array("reals", [0.25, 0.5])
    writer.add_array("flags", [True, False, True])
    for format in FORMATS.values():
        raw = random.integers(0, 256, (3, 2, 4 * format.block.itemsize), np.uint8)
        kind = gguf.GGMLQuantizationType(format.type_id)
        writer.add_tensor(f"{format.name}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as ours:
        keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
        assert list(ours.metadata) == keys
        for key in keys:
            expected = theirs.fields[key].contents()
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            mine = ours.tensors[tensor.name]
            assert mine.format.name == tensor.tensor_type.name
            assert mine.shape == tuple(reversed(tensor.shape.tolist()))
            assert mine.offset == tensor.data_offset
            np.testing.assert_array_equal(mine.data, tensor.data.view(np.uint8).reshape(-1))


def test_large_vocabulary_opens_fast(tmp_path: Path) -> None:
    words = [f"token{index}" for index in range(151_936)]
    builder = Builder().key("tokens", Array(STRING, words)).key("merges", Array(STRING, words))
    path = builder.write(tmp_path / "large.gguf")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with GGUFFile.open(path) as file:
            seconds.append(time.perf_counter() - start)
            assert file.metadata["tokens"] == words
    assert min(seconds) < SECONDS  # 0.1 s on an idle core


def test_sparse_file_of_empty_strings_is_refused_fast(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        count = number(U64, 60 << 20)
        file.write(header(keys=1) + string("k") + number(U32, 9) + number(U32, STRING) + count)
        file.truncate(1 << 30)
    start = time.perf_counter()
    with pytest.raises(Error, match="strings in arrays; the limit is"):
        GGUFFile.open(path)
    assert time.perf_counter() - start < SECONDS


def test_metadata_larger_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "METADATA_LIMIT", 1000)
    words = Builder().key("k", Array(STRING, ["word"] * 100))
    numbers = Builder().key("k", Array(I32, [7] * 300))
    for builder in (words, numbers):
        path = builder.write(tmp_path / "large.gguf")
        with pytest.raises(Error, match="metadata beyond the limit of 1,000 bytes"):
            GGUFFile.open(path)


def split_model(folder: Path, parts: int = 3) -> list[Path]:
    """`parts` files with a tensor each; the first holds the metadata."""
    paths = []
    for index in range(parts):
        builder = Builder().key("split.no", index).key("split.count", parts)
        builder.key("split.tensors.count", parts)
        if index == 0:
            builder.key("general.name", "whole")
        builder.array(f"t{index}", np.full(4, index))
        paths.append(builder.write(folder / f"m-{index + 1:05d}-of-{parts:05d}.gguf"))
    return paths


def test_split_files_are_joined(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    with GGUFFile.open(paths[0]) as file:
        assert file.parts == tuple(paths)
        assert file.metadata["general.name"] == "whole"
        assert file.nbytes == sum(path.stat().st_size for path in paths)
        assert [file.tensors[f"t{index}"].data.view("<f4")[0] for index in range(3)] == [0, 1, 2]
        assert file.tensors["t2"].path == paths[2]


def test_split_files_that_do_not_fit(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    with pytest.raises(Error, match=r"part 2 of 3 .* open the first, m-00001-of-00003\.gguf"):
        GGUFFile.open(paths[1])
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(Error, match=r"first of 3 parts; needed the name NAME-00001-of-00003\.gguf"):
        GGUFFile.open(renamed)
    whole = paths[2].read_bytes()
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(Error, match=r"m-00003-of-00003\.gguf: split\.no is 1; needed 2"):
        GGUFFile.open(paths[0])
    paths[2].write_bytes(whole[:-30])
    with pytest.raises(Error, match=r"m-00003-of-00003\.gguf: file is .* download incomplete"):
        GGUFFile.open(paths[0])
    paths[2].unlink()
    with pytest.raises(Error, match=r"m-00003-of-00003\.gguf: part 3 of 3 is missing"):
        GGUFFile.open(paths[0])
    double = Builder().key("split.no", 2).key("split.count", 3).array("t0", np.ones(4))
    double.write(paths[2])
    with pytest.raises(Error, match=r"tensor t0 is also in m-00001-of-00003\.gguf"):
        GGUFFile.open(paths[0])
    builder = Builder().key("split.no", 2).key("split.count", 3)
    builder.array("t2", np.ones(4)).array("t3", np.ones(4)).write(paths[2])
    with pytest.raises(Error, match="the 3 parts hold 4 of 3 tensors"):
        GGUFFile.open(paths[0])


def test_mutated_files_never_raise_anything_else(tmp_path: Path) -> None:
    """Seeded damage to a valid model: it is either accepted or refused with an Error."""
    mutations = 2000
    shape = Shape(hidden=32, layers=2, interval=2, mtp_layers=1, experts=4, experts_used=2)
    whole = tiny_builder(shape=shape, tied=True).build()
    path = tiny_model(tmp_path / "mutant.gguf", shape=shape, tied=True)
    with GGUFFile.open(path) as file:
        front = min(tensor.offset for tensor in file.tensors.values())
    tokens = whole.index(b"tokenizer.ggml.tokens")
    # most of the front is the token list: strike the numbers before it and the tensors behind it
    behind = whole.index(b"token_embd.weight")
    random = np.random.default_rng(20)
    extremes = [0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
    outcomes = {"accepted": 0, "refused": 0}
    kinds = itertools.cycle(["byte", "bit", "extreme", "extreme", "cut", "drop", "repeat"])
    slowest = 0.0
    for _, kind in zip(range(mutations), kinds, strict=False):
        mutant = bytearray(whole)
        places = [(4, tokens), (behind, front), (4, front)]
        at = int(random.integers(*places[int(random.integers(3))]))
        size = int(random.choice([1, 4, 8, 24]))
        if kind == "byte":
            mutant[at] = int(random.integers(256))
        elif kind == "bit":
            mutant[at] ^= 1 << int(random.integers(8))
        elif kind == "extreme":
            width = 4 if size == 4 else 8
            value = extremes[int(random.integers(len(extremes)))] % 256**width
            mutant[at : at + width] = value.to_bytes(width, "little")
        elif kind == "cut":
            del mutant[int(random.integers(len(mutant))) :]
        elif kind == "drop":
            del mutant[at : at + size]
        else:
            mutant[at:at] = mutant[at : at + size]
        path.write_bytes(mutant)
        start = time.perf_counter()
        try:
            with GGUFFile.open(path) as file:
                config = Config.from_gguf(file)
                weights = Weights(file, config)
                weights.check()
                weights.vector("output_norm.weight", config.hidden)
            outcomes["accepted"] += 1
        except Error as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < SECONDS
    assert min(outcomes.values()) > mutations // 20, outcomes
