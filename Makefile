# Every target works alone in a fresh clone; all it needs is Python 3.11 or newer:
#   make demo    the whole life of an adapter, offline, about a minute after installation
#   make test    the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS := -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test slow check format bench bench-full bench-gpu clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo    the whole life of an adapter, offline (arguments: make demo OUT=folder)
demo: $(VENV)/installed
	$(BIN)/graft demo $(if $(OUT),--out $(OUT))

## make test    the default tests (arguments: make test ARGS="tests/cli -k json")
test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

## make slow    the tests that take longer
slow: $(VENV)/installed-test
	$(BIN)/python -m pytest $(WORKERS) -m slow $(ARGS)

## make check   format, lint, types, architecture
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

## make format  rewrite the sources the way `make check` wants them
format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## make bench   tuning against PEFT and TRL, the short form: under five minutes on two cores
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/tuning.py

## make bench-full   everything that docs/results/performance.md shows of a CPU: forty minutes, kept in results/
bench-full: $(VENV)/installed-dev
	$(BIN)/python benchmarks/series.py

## make bench-gpu    the rows for one GPU: at most ten minutes each, kept in results/
bench-gpu: $(VENV)/installed-dev
	@set -e; for script in benchmarks/gpu/*.py; do echo "== $$script"; $(BIN)/python "$$script" --keep; done

## make clean   remove the environment and what tools left behind
clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that pip settles its build (CPU or CUDA) before anything depends on it.
$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Graft needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV) (once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/torch pyproject.toml
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed $(VENV)/installed-test
