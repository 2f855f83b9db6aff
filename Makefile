# Needs Python 3.11 or newer with pip, git and make. To choose another: make PYTHON=python3.12
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint install clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/'

demo: install ## Adapt a draft to another domain on this machine and measure it (about a quarter of an hour)
	$(BIN)/afaspec demo

test: install ## Run all tests, with real vLLM on this machine
	$(BIN)/pytest

lint: install ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

install: ## Build the virtual environment (some 3 minutes; instant when it is there)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; give one: make PYTHON=..."; exit 1; }
	@$(PYTHON) tools/install.py $(VENV)

clean: ## Remove the virtual environment and caches; results in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
