# `make demo` shows it working; `make test` is the check before a commit; `make test-all` is the gate.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test test-all lint install clean

BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

define CHECKS
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/mypy
$(BIN)/lint-imports --no-logo
endef

demo: install
	@mkdir -p build
	$(BIN)/wanspec demo --json build/demo.json
	echo "make demo: $$SECONDS s"

test: install
	@$(CHECKS)
	echo "static checks: $$SECONDS s"
	$(BIN)/pytest -m "not slow and not gpu"
	echo "make test: $$SECONDS s"

# pytest's summary, with its time, is the last line.
test-all: install
	@$(CHECKS)
	echo "static checks: $$SECONDS s"
	$(BIN)/pytest -m "not gpu"

lint: install
	@$(CHECKS)
	echo "make lint: $$SECONDS s"

install:
	@.ci/install

clean:
	@rm -rf .venv build dist ./*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find vllm_wanspec tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
