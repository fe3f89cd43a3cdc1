"""Where the bytes go."""

from pathlib import Path

import pytest

from ondevice import budget
from ondevice.budget import Needs, plan
from quant.errors import ResourceError, UsageError

GIGABYTE = 1 << 30
NEEDS = Needs(
    file=45 * GIGABYTE,
    dense=2 * GIGABYTE,
    keys_and_values=GIGABYTE,
    delta_memory=GIGABYTE // 8,
    buffers=GIGABYTE // 4,
    least_pool=GIGABYTE // 32,
    most_pool=44 * GIGABYTE,
    expert=1 << 21,
    slice=1 << 19,
)
PATH = Path("model.gguf")


@pytest.mark.parametrize("memory", [NEEDS.least, 8 * GIGABYTE, 16 * GIGABYTE, NEEDS.mapped - 1])
def test_a_budget_is_used_and_never_exceeded(memory: int) -> None:
    planned = plan(NEEDS, memory, PATH)
    assert planned.cached
    assert planned.total == sum(planned.parts().values()) <= memory
    assert planned.total == memory or planned.pool == NEEDS.most_pool


def test_a_file_that_fits_is_mapped() -> None:
    planned = plan(NEEDS, NEEDS.mapped, PATH)
    assert not planned.cached
    assert planned.total == sum(planned.parts().values()) == NEEDS.mapped


def test_what_is_too_little_is_refused_with_the_least() -> None:
    with pytest.raises(ResourceError, match=f"below the {NEEDS.least:,}"):
        plan(NEEDS, NEEDS.least - 1, PATH)
    with pytest.raises(UsageError, match="memory is '8G'"):
        plan(NEEDS, "8G", PATH)  # type: ignore[arg-type]


def test_without_a_budget_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "available", lambda: 60 * GIGABYTE)
    assert not plan(NEEDS, None, PATH).cached
    monkeypatch.setattr(budget, "available", lambda: 20 * GIGABYTE)
    assert plan(NEEDS, None, PATH).total == int(budget.SHARE * 20 * GIGABYTE)
    monkeypatch.setattr(budget, "available", lambda: 1 << 20)
    assert plan(NEEDS, None, PATH).total == NEEDS.least


def test_what_is_available_is_less_than_there_is() -> None:
    found = budget.available()
    assert found is None or 0 < found < 1 << 50
