# make demo | demo-text | test | test-kills | lint | docs | bench-speed | bench-*: each sets up .venv first if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-text test test-kills lint docs clean bench-speed

demo: .venv/.demo
	$(BIN)/python scripts/demo.py

# From text to a quantized model, with a pipeline of random weights: nothing is downloaded.
demo-text: .venv/.text
	$(BIN)/python scripts/demo_text.py

test: .venv/.dev
	$(BIN)/python -m pytest --numprocesses 2

# Runs killed at 60 instants, in every stage of every family of recipes (`make test` has one of each); minutes.
test-kills: .venv/.dev
	ZSQ_KILLS=60 $(BIN)/python -m pytest tests/test_kills.py -s

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site in build/site; a broken link or a missing name is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# Time, memory and work beside the published algorithm; more networks: see the head of benchmarks/speed.py.
bench-speed: .venv/.dev
	$(BIN)/python benchmarks/speed.py digits

# make bench-NAME runs benchmarks/NAME.toml; finished rows are kept, so a stopped one goes on.
bench-%: .venv/.dev
	$(BIN)/zsq bench benchmarks/$*.toml

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "zsq needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

.venv/.text: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[diffusion]'
	@touch $@

.venv/.docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP_INSTALL) -e '.[dev,demo]'
	@touch $@

clean:
	rm -rf .venv
