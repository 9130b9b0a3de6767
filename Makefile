# Everything starts here. Needs Python >= 3.11 and make; works offline once installed.
#
#   make demo      align the built-in model, measure before and after, write demo/report.html
#   make test      all tests, on two processes
#   make check     lint and types
#   make bench     the quick suite (attacks, leaderboard) and the speed of evaluation
#   make install   only .venv with the `safelight` command

VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench docs

help:
	@sed -n 's/^#   //p' Makefile

install: $(VENV)/.installed

demo: install
	$(BIN)/safelight demo $(ARGS)

# Small models are faster on one thread each than on two that wait for each other.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/cards.py --check
	$(BIN)/mypy src/safelight

bench: install
	$(BIN)/safelight bench emoji-quick --output runs/bench $(ARGS)
	$(BIN)/python benchmarks/evaluate_speed.py emoji-world

# The cards in docs/ are written from the methods' own files.
docs: install
	$(BIN)/python docs/cards.py

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# First and alone: a range such as torch>=2.6 can bring gigabytes of CUDA to a machine without one.
$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
	  || $(BIN)/python -m pip install --quiet --constraint constraints.txt '$(TORCH)'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Safelight needs Python 3.11 or newer; name one: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
