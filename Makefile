# make demo   convert the bundled model to 4 bits and let it answer
# make test   run the test suite          make check  style and types, changes nothing
# make fix    apply the style             make bench  speed of the demo model
# make docs   the command reference
# make reference  the slow tests, and those against torch, transformers and llama.cpp
# make test-arm64  the kernel tests and an answer on emulated ARM processors
#
# Everything goes into .venv and build/, made on first use. PYTHON is any Python from 3.11 on.

PYTHON ?= python3
PROMPT ?= Who are you?
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PATHS := cli.py quant convert ondevice tools benchmarks tests

.PHONY: demo test test-arm64 check fix bench docs reference clean

demo: build/demo-Q4_K_M.gguf
	$(BIN)/ondevice generate $< --prompt "$(PROMPT)" --max-tokens 80 --seed 1

build/demo-Q4_K_M.gguf: .venv/installed $(wildcard ondevice/demo/*.safetensors ondevice/demo/*.json convert/*.py quant/*.py)
	@mkdir -p build
	$(BIN)/ondevice convert ondevice/demo $@ --type Q4_K_M --force

test: .venv/installed-test
	$(BIN)/python -m pytest

test-arm64: .venv/installed-test
	$(BIN)/python -m tools.test_arm64

check: .venv/installed-test
	$(BIN)/ruff check $(PATHS)
	$(BIN)/ruff format --check $(PATHS)
	$(BIN)/mypy
	$(BIN)/python -m tools.cli_reference --check

fix: .venv/installed-test
	$(BIN)/ruff check --fix $(PATHS)
	$(BIN)/ruff format $(PATHS)

docs: .venv/installed
	$(BIN)/python -m tools.cli_reference

bench: build/demo-Q4_K_M.gguf
	$(BIN)/ondevice bench $<

reference: .venv/installed-reference
	$(BIN)/python -m pytest -m "slow or reference"

clean:
	rm -rf build .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(PIP) install --editable .
	@touch $@

.venv/installed-%: pyproject.toml | .venv/bin/python
	$(PIP) install --editable ".[test,$*]"
	@touch $@ .venv/installed
