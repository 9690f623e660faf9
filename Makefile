PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PEERS := .venv-bench
QUICKSTART ?= recipes/quickstart.yaml

.PHONY: quickstart test test-slow bench check format constraints clean help

help:                ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

# torch goes first and alone: asked for together with the rest, pip may pick a CUDA build of several gigabytes.
$(VENV)/.user: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "groundup needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[tasks,serve,annotate]'
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.user  ## set up, then go from raw text to an aligned chat model (about 20 minutes on 2 cores)
	$(BIN)/groundup run $(QUICKSTART)

test: $(VENV)/.dev   ## lint, types and the test suite (under 10 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10

test-slow: $(VENV)/.dev  ## the proofs that take minutes
	$(BIN)/python -m pytest -m slow

$(PEERS)/.done: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint benchmarks/peers.txt torch
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement benchmarks/peers.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps optimum-intel==2.2.0
	touch $@

bench: $(VENV)/.dev $(PEERS)/.done  ## speed, side by side with peers; run it on a quiet machine
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/decode.py --peer-python $(PEERS)/bin/python
	$(BIN)/python benchmarks/serve.py --peer-python $(PEERS)/bin/python

check: $(VENV)/.dev  ## lint and types only, seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(VENV)/.dev  ## write the installed versions into constraints.txt
	(head -2 constraints.txt; $(PIP) freeze --exclude-editable | sed 's/+cpu//') > constraints.new && mv constraints.new constraints.txt

clean:               ## remove the virtual environments and caches, never runs/
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache build dist
