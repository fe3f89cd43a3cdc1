"""Every format that we can read has its kernels."""

import pytest

from ondevice.kernels import expand
from ondevice.kernels.activation import NONE, PER_32, PER_256
from ondevice.kernels.formats import READERS
from quant.registry import FORMATS

EXPANDED = ("Q2_K", "Q3_K")


def test_every_format_has_a_reader() -> None:
    assert list(READERS) == list(FORMATS)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_fits_its_format(name: str) -> None:
    reader = READERS[name]
    assert reader.multiply.__name__ == f"multiply_{name.lower()}"
    assert reader.expand is getattr(expand, f"expand_{name.lower()}")
    integers = {1: NONE, 32: PER_32, 256: PER_256}[FORMATS[name].length]
    assert reader.activation == (NONE if name in EXPANDED else integers)
    assert (reader.scratch_bytes(512) > 0) == (FORMATS[name].length > 1)
