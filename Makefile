# make demo    the main job: distil the built-in digits teacher into 8 steps, evaluate, write a report
# make test    the daily suite
# make test-gpu  what a GPU does otherwise, on one
# make docs    the documentation as a site, build/site/index.html; make notebooks: run those it shows, 5 minutes, first
# make dist    wheel and sdist in dist/, checked, installed in a fresh environment and used
# make check   everything: lint, types, all tests, examples in the docs
# make reproduce-digits   recorded figures again, from scratch: 15 minutes of one core; reproduce-fashion: 90
# Each creates .venv if it is missing.
# make check-oldest   what touches diffusers, transformers and peft, on the oldest of each, in .venv-oldest

PYTHON ?= python3
THREADS ?= $(or $(OMP_NUM_THREADS),2)
BIN := .venv/bin
TEST_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

OLDEST := .venv-oldest/bin

.PHONY: demo test test-gpu check check-oldest lint dist docs notebooks reproduce-digits reproduce-fashion

demo: .venv/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/momatch demo

test: .venv/installed-dev
	$(TEST_ENV) $(BIN)/pytest -n 2 -m "not slow"

test-gpu: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_devices.py

check: lint
	$(TEST_ENV) $(BIN)/pytest -n 2

check-oldest: .venv-oldest/installed
	$(TEST_ENV) $(OLDEST)/pytest -n 2 tests/teachers tests/export tests/test_lora.py tests/data

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_site.py build/site

notebooks: .venv/installed-dev
	$(TEST_ENV) $(BIN)/python tools/notebooks.py

dist: .venv/installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/check_dist.py dist constraints.txt

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

reproduce-digits reproduce-fashion: .venv/installed-dev
	$(TEST_ENV) $(BIN)/python benchmarks/reproduce.py $(@:reproduce-%=%)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "momatch needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# torch first, by itself: what is installed after it takes the torch that is there.
.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt torch
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt \
		-e '.[diffusers,lora,onnx,datasets]' pytest pytest-xdist hypothesis
	touch $@
