# Every target starts from nothing but Python and make; the environment lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# llama.cpp's build for the processor at hand crashes on some with AMX.
LLAMA_CPP := $(shell grep -q amx_tile /proc/cpuinfo 2>/dev/null && \
  echo "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_BF16=ON -DGGML_AVX512_VNNI=ON")

.PHONY: demo test check bench verify clean

demo: .venv/core  ## set up, train GPT-2 on Shakespeare, sample, check the quick claims, write the report
	$(BIN)/canon run gpt2 --preset laptop

test: .venv/dev  ## set up and pass the tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: .venv/dev  ## format, lint, types and the house rules (under a minute)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/structure

bench: .venv/bench  ## compare with peers, both sides in one run; regenerates docs/PERFORMANCE.md
	$(BIN)/canon bench

verify: .venv/dev  ## every claim, every seed (hours); resumes where it was stopped
	$(BIN)/canon verify --all --publish

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Canon needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/core: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[images]'
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ .venv/core

.venv/bench: .venv/dev
	CMAKE_ARGS="$(LLAMA_CPP)" $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@
