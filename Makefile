# `make serve` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
# Which torch to install, e.g. TORCH='torch>=2.11'.
TORCH ?= torch==2.13.0
HOST ?= 127.0.0.1
PORT ?= 8000
SERVE_ARGS ?=
# Processes that run tests: one per core, each with one thread.
WORKERS ?= logical --maxprocesses 4
# A file stays in one process, which builds its models once; tests/conftest.py orders the files.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What `make coverage` measured when it was last raised, in percent.
COVERAGE_FLOOR := 0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup serve test test-fast coverage check format clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| (echo "euryale needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

serve: setup
	$(BIN)/euryale serve --host $(HOST) --port $(PORT) $(SERVE_ARGS)

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m 'not slow'

coverage: setup
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_FLOOR)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
