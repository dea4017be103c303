# Everything that a newcomer, a developer and CI run. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
ARGS ?=
JOBS ?= 2
SYSTEM ?=
QUICK ?=

BIN := .venv/bin
BENCH_FLAGS := $(if $(filter-out 0,$(QUICK)),--quick,)

# An environment that was moved or whose Python is gone is made anew, whatever its date says.
ifneq ($(shell [ "$$(cat .venv/.stamp 2>/dev/null)" = "$$PWD" ] && .venv/bin/python -c '' 2>/dev/null && echo whole),whole)
.PHONY: .venv/.stamp
endif

.venv/.stamp: pyproject.toml constraints.txt
	@tools/setup.sh "$(PYTHON)"

.PHONY: help setup demo test check format-check lint types docs docs-serve format quality speed composition freeze clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

setup: .venv/.stamp ## make .venv (does nothing when it is up to date; PYTHON=... chooses the interpreter)

demo: setup ## pre-train, adapt and measure on bundled handwriting; report in runs/demo
	@$(BIN)/vitkit demo --out runs/demo $(ARGS)

test: setup ## the tests (ARGS="tests/test_tokens.py -x" for some of them)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: format-check lint types docs ## formatting, lint, types of the public API, documentation

format-check: setup
	@echo "ruff format --check" && $(BIN)/ruff format --check .

lint: setup
	@echo "ruff check" && $(BIN)/ruff check .

types: setup
	@echo "mypy" && $(BIN)/mypy

docs: setup ## build the documentation into site/ (strict; readable from disk)
	@echo "mkdocs build --strict" && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean --site-dir site

docs-serve: setup ## the documentation at localhost:8000, rebuilt on change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: setup ## format and mend what ruff can
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

quality: setup ## quality benchmarks (SYSTEM=adaptformer for one, QUICK=1 for a short run)
	@tools/bench.sh quality "$(SYSTEM)" $(BENCH_FLAGS) $(ARGS)

speed: setup ## speed benchmarks (SYSTEM=..., QUICK=1)
	@tools/bench.sh speed "$(SYSTEM)" $(BENCH_FLAGS) $(ARGS)

composition: setup ## every adaptation on every kind of ViT, through every verb: the table in docs/composition.md
	@$(BIN)/python -m benchmarks.composition

freeze: setup ## write constraints.txt from .venv, after its bounds were changed and everything was tested
	@$(BIN)/python tools/freeze.py

clean: ## remove what was built (not .venv, not runs)
	@rm -rf site build dist .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
