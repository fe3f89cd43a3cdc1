"""The comparison of speeds: whose times count, who takes in what, and what becomes of the page."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import OURS, Rounds, merged
from benchmarks.worker import Worker, WorkerFailed
from ondevice import demo


class FakeWorker:
    """Answers with times given beforehand, and remembers what it was asked."""

    def __init__(self, *seconds: tuple[float, float]) -> None:
        self.seconds = list(seconds)
        self.asked: list[dict[str, Any]] = []

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        prefill, decode = self.seconds.pop(0)
        times = {"prefill_seconds": [prefill], "decode_seconds": [decode]}
        return times | {"prompt": [7, 8], "decoded": [0, len(self.asked)]}


def test_medians_of_all_rounds_but_the_first() -> None:
    ours = FakeWorker((99, 99), (1, 2), (4, 1), (2, 8))
    theirs = FakeWorker((99, 99), (3, 2), (4, 4), (4, 4))
    rounds = Rounds(ours, {"peer": theirs})  # type: ignore[arg-type, dict-item]
    for _ in range(4):
        rounds.measure((100, 10))
    assert rounds.rate(OURS, "prefill", (100, 10)) == 100 / 2
    assert rounds.rate("peer", "prefill", (100, 10)) == 100 / 4
    assert rounds.rate(OURS, "decode", (100, 10)) == 10 / 2
    assert rounds.rate("peer", "decode", (100, 10)) == 10 / 4
    assert rounds.ratios("peer", "prefill", (100, 10)) == [3, 1, 2]
    assert rounds.ratios("peer", "decode", (100, 10)) == [1, 4, 0.5]
    assert rounds.rate(OURS, "decode", (5, 10)) is None
    # the peer takes in what ours did in the same turn
    assert theirs.asked == [{"prompt": [7, 8], "decoded": [0, turn]} for turn in (1, 2, 3, 4)]


def test_a_section_takes_the_place_of_its_predecessor() -> None:
    page = merged("", "## a.gguf\n\nold a\n")
    page = merged(page, "## a.gguf, AVX2 only\n\nother\n")
    page = merged(page, "## b.gguf\n\nb\n")
    page = merged(page, "## a.gguf\n\nnew a\n")
    assert page.startswith("# Benchmarks\n")
    parts = page.split("## ")[1:]
    assert parts == ["a.gguf\n\nnew a\n\n", "a.gguf, AVX2 only\n\nother\n\n", "b.gguf\n\nb\n"]
    assert merged(page, "## b.gguf\n\nb\n") == page


def test_a_worker_that_cannot_start_says_why() -> None:
    with pytest.raises(WorkerFailed, match=r"No module named benchmarks\.nothing"):
        Worker(sys.executable, "benchmarks.nothing", environment={})


def options(**changes: Any) -> argparse.Namespace:
    defaults = {
        "rounds": 2,
        "threads": 1,
        "depth": 700,
        "depth_peers": False,
        "features": "native",
        "peer_python": sys.executable,
        "layouts": [],
    }
    return argparse.Namespace(**(defaults | changes))


def rows(page: str) -> dict[str, list[str]]:
    """Cells of the page's tables by the first one."""
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_our_own_figures() -> None:
    """All of it but the other program, on the demo model."""
    said: list[str] = []
    page = compare.compare(demo.model_path("demo"), options(), said.append)
    found = rows(page)
    assert [line.split(": ")[1] for line in said[1:]] == ["warming up", "round 1", "round 2"]
    assert page.startswith(f"## {demo.model_path('demo').name}\n")
    assert "llama.cpp was not run" in page
    for name in (
        "decode, 64 tokens after 512",
        "prefill, 512 tokens",
        "prefill, 64 tokens",
        "decode, 64 tokens after 1",
        "decode, 64 tokens after 700",
        "prefill, 700 tokens",
    ):
        rate, ratio = found[name]
        assert 1 < float(rate) < 1e6 and ratio == "-", name
    assert 0 < float(found["**fraction of the limit**"][0].split("*")[2]) < 10
    for name in ("dense products", "experts", "everything"):
        assert 0 < float(found[f"prefill, {name}"][0].split()[2]) < 1, name
    deep = float(found["decode, 64 tokens after 700"][0])
    empty = float(found["decode, 64 tokens after 1"][0])
    shown = float(found["decode at 700 against an empty context"][0])
    assert shown == pytest.approx(deep / empty, abs=0.002)


@pytest.mark.reference
def test_against_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole program; both layouts of llama.cpp, and the faster of them in the ratio."""
    pytest.importorskip("llama_cpp")
    page = tmp_path / "page.md"
    arguments = [str(demo.model_path("demo")), "--rounds", "1", "--output", str(page)]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    compare.main()
    found = rows(page.read_text())
    for name in ("decode, 64 tokens after 512", "prefill, 512 tokens", "prefill, 64 tokens"):
        ours, own, file, ratio = found[name]
        expected = float(ours) / max(float(own), float(file))
        assert float(ratio.split("**")[1]) == pytest.approx(expected, rel=0.01, abs=0.006), name
