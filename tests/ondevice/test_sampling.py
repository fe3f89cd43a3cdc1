"""How tokens are chosen: the options' ranges, what files recommend, and what each option does."""

import dataclasses
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ondevice
from ondevice.model import Model
from ondevice.sampling import Sampling
from quant.errors import Error, UsageError

PROMPT = [5, 80, 200, 31]
NEUTRAL: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def drawn(model: Model, count: int, **options: Any) -> list[int]:
    return list(model.generate(PROMPT, max_tokens=count, **(NEUTRAL | options)))


# ---- the options ----


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", 100.5, "a number from 0 to 100"),
        ("temperature", float("nan"), "a number from 0 to 100"),
        ("temperature", float("inf"), "a number from 0 to 100"),
        ("temperature", "1", "a number from 0 to 100"),
        ("top_k", -1, "a whole number from 0 to 2147483647"),
        ("top_k", 2.0, "a whole number from 0 to 2147483647"),
        ("top_p", 1.01, "a number from 0 to 1"),
        ("min_p", -0.01, "a number from 0 to 1"),
        ("repeat_penalty", 0, "a number from 0.01 to 100"),
        ("seed", -1, "a whole number from 0 to 9223372036854775807"),
        ("seed", 2**63, "a whole number from 0 to 9223372036854775807"),
        ("seed", 1.5, "a whole number from 0 to 9223372036854775807"),
    ],
)
def test_an_option_out_of_range_is_named(name: str, value: Any, needed: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be {needed}"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_a_truth_value_is_no_number(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is True"):
        Sampling(**{name: True})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_k": 0, "top_p": 0, "min_p": 0, "repeat_penalty": 0.01, "seed": 0},
        {
            "temperature": 100.0,
            "top_k": 2**31 - 1,
            "top_p": 1.0,
            "min_p": 1,
            "repeat_penalty": 100,
            "seed": 2**63 - 1,
        },
    ],
)
def test_the_ends_of_the_ranges_work(options: dict[str, Any], tiny: Model) -> None:
    assert len(list(tiny.generate(PROMPT, max_tokens=3, **options))) == 3


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 1.0  # type: ignore[misc]


# ---- what a file recommends ----


def test_a_file_recommends() -> None:
    metadata = {
        "general.sampling.temp": float(np.float32(0.6)),
        "general.sampling.top_k": 33,
        "general.sampling.top_p": float(np.float32(0.95)),
        "general.sampling.min_p": float(np.float32(0.05)),
        "general.sampling.penalty_repeat": float(np.float32(1.1)),
        "general.sampling.seed": 5,
        "general.name": "other",
    }
    assert Sampling.from_metadata(metadata) == Sampling(
        temperature=0.6, top_k=33, top_p=0.95, min_p=0.05, repeat_penalty=1.1, seed=None
    )


@pytest.mark.parametrize("metadata", [{}, {"general.sampling.temp": "hot"}])
def test_where_a_file_is_silent_ours_hold(metadata: dict[str, Any]) -> None:
    assert Sampling.from_metadata(metadata) == Sampling()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recommended_number_that_is_none(value: float) -> None:
    with pytest.raises(Error):
        Sampling.from_metadata({"general.sampling.top_k": value})


def test_a_bad_recommendation_is_the_files_fault(tiny_path: Path, tmp_path: Path) -> None:
    content = bytearray(tiny_path.read_bytes())
    key = b"general.sampling.temp"
    begin = content.index(key) + len(key) + 4  # the value follows the number of its type
    content[begin : begin + 4] = struct.pack("<f", -1.0)
    path = tmp_path / "negative.gguf"
    path.write_bytes(content)
    with pytest.raises(Error, match="temperature is -1") as caught:
        ondevice.load(path, threads=1)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.exit_code == Error.exit_code


def test_a_model_takes_the_files_options_unless_told(demo: Model) -> None:
    ids = demo.tokenize("It was")
    of_the_file = dataclasses.replace(demo.sampling, seed=3)
    expected = demo.complete(ids, of_the_file, 20)
    text = "".join(expected)
    assert text
    assert list(demo.generate(ids, max_tokens=20, seed=3)) == expected.tokens
    assert list(demo.generate(ids, max_tokens=20, seed=3, temperature=None)) == expected.tokens


# ---- what the options do ----


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}]
)
def test_the_strictest_choice_is_the_likeliest_token(
    options: dict[str, float], endless: Model
) -> None:
    found = drawn(endless, 30, **({"temperature": 2.0, "seed": 9} | options))
    logits = endless.logits(PROMPT + found[:-1])
    assert found == logits[len(PROMPT) - 1 :].argmax(axis=1).tolist()


def test_a_seed_repeats_and_another_differs(endless: Model) -> None:
    first, again, other = (drawn(endless, 40, temperature=5.0, seed=n) for n in (1, 1, 2))
    assert first == again
    assert first != other


def test_without_a_seed_every_answer_is_new(endless: Model) -> None:
    assert drawn(endless, 40, temperature=100.0) != drawn(endless, 40, temperature=100.0)


def test_draws_follow_the_probabilities(endless: Model) -> None:
    count, temperature = 800, 0.2
    logits = endless.logits(PROMPT)[-1].astype(np.float64)
    best = np.argsort(-logits)[:4]
    shares = np.exp((logits[best] - logits[best[0]]) / temperature)
    shares /= shares.sum()
    found = Counter(
        drawn(endless, 1, temperature=temperature, top_k=4, seed=seed)[0] for seed in range(count)
    )
    assert set(found) <= set(best.tolist())
    for token, share in zip(best.tolist(), shares, strict=True):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(found[token] / count - share) < 4 * deviation


def test_a_penalty_keeps_from_repeating(endless: Model) -> None:
    free = drawn(endless, 40, temperature=0.0)
    penalised = drawn(endless, 40, temperature=0.0, repeat_penalty=100.0)
    assert len(set(free)) < 40
    assert len(set(penalised) | set(PROMPT)) == 40 + len(PROMPT)
