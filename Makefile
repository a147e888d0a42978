# Two commands on a fresh machine: `make audit` and `make test`. Both need Python >= 3.11 with venv, and make.
PYTHON ?= python3
VENV   ?= .venv
# Another package index, e.g. one with CPU-only builds of torch: make audit INDEX=https://...
INDEX  ?=

# One test process per core, each with one torch thread.
PARALLEL ?= --numprocesses auto --maxprocesses 8 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX))

.PHONY: audit test test-slow check docs bench clean

audit: $(VENV)/.runtime
	$(BIN)/kvfloor audit

test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PARALLEL)

check: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.development
	$(BIN)/python docs/generate.py

bench: $(VENV)/.development
	$(BIN)/python bench/decode.py

clean:
	rm -rf $(VENV) out

$(VENV)/.runtime: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.development: $(VENV)/.runtime requirements-dev.lock
	$(PIP) -r requirements-dev.lock
	touch $@
