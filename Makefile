.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete
NBVAL := $(BIN)/python -m pytest -p tools.agreement --nbval -n 2 --dist loadfile -q -rs
CHAPTERS := $(wildcard book/*.ipynb)

.PHONY: help setup sync check test book bench clean

help: ## list these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[book,test]'
	touch $(SETUP)

setup: $(SETUP) ## create .venv with everything the book and the tests need

sync: $(SETUP) ## after editing a chapter: tangle, execute what changed, store
	$(BIN)/python -m tools.sync

check: $(SETUP) ## under two minutes: lint, types, book and package in sync, fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tools.tangle --check
	$(BIN)/python -m tools.sync --check
	$(BIN)/python -m pytest -q -n 2 -m 'not slow' tests

test: check ## everything: all tests, then every notebook twice (its own code, the package's)
	$(BIN)/python -m pytest -q -n 2 -m slow -rs tests
	$(NBVAL) $(CHAPTERS)
	rm -rf build/packaged
	$(BIN)/python -m tools.sync --packaged build/packaged
	$(NBVAL) build/packaged

book: sync ## build the page: _build/html/index.html
	rm -rf _build
	$(BIN)/jupyter-book build . --all --warningiserror --nitpick --keep-going --quiet
	test -f _build/html/index.html
	@echo "The book: _build/html/index.html"

bench: $(SETUP) ## measure training speed (a quiet machine is needed); one JSON line a case
	$(BIN)/python -m benchmarks

clean: ## remove what was built, keep the environment
	rm -rf _build build .pytest_cache .mypy_cache .ruff_cache .hypothesis
