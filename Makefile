# `make demo` shows it working; `make test` is the check before a commit; `make test-all` is the gate; `make help` lists
# all.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo bench bench-capacity bench-dtype bench-gpu bench-hotpath bench-more bench-overhead bench-trees bench-width \
	unit test test-all exactness compat-source fuzz docs lint install clean help

BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

define CHECKS
$(BIN)/ruff check .
$(BIN)/ruff format --check .
$(BIN)/mypy
$(BIN)/lint-imports --no-logo
endef

demo: install  ## the demo; writes build/demo.json
	@mkdir -p build
	$(BIN)/wanspec demo --json build/demo.json
	echo "make demo: $$SECONDS s"

# Remote drafting beside what a user would run otherwise; takes about 70 minutes and two quiet cores. Goes on where an
# interrupted run of the same commit stopped. Two cores cannot keep a draft forward of 5 ms at all times, hence the time
# scale.
bench: install  ## remote drafting beside plain vLLM, lookup and co-located drafts (about 70 minutes)
	@mkdir -p docs/results
	$(BIN)/wanspec bench \
		--arms none,ngram,lookup,draft_model,draft_model_lookup,wanspec,wanspec_no_lookup,oracle,wanspec_dead,wanspec_random \
		--rtt-ms 0,10,20,30,50,70,100 --far-rtt-ms 500 --count 72 --time-scale 1.25 \
		--json docs/results/bench.json --markdown docs/results/bench.md
	echo "make bench: $$SECONDS s"

# One condition changed at a time; takes about an hour and a half and two quiet cores. What is measured already, at this
# commit, is not measured again.
bench-more: install  ## the same under loads, sampling, jitter, losses and longer paces (about 90 minutes)
	@mkdir -p docs/results/more
	$(BIN)/python -m vllm_wanspec.lab.compare.more --folder docs/results/more --markdown docs/results/more.md
	echo "make bench-more: $$SECONDS s"

# How many clients one target serves, with drafts of its own and with remote ones; takes about a quarter of an hour and
# two quiet cores.
bench-capacity: install  ## clients that a target serves at a rate, drafts co-located or remote (about 15 minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.target.capacity --json docs/results/capacity.json \
		--markdown docs/results/capacity.md
	echo "make bench-capacity: $$SECONDS s"

# Whether remote drafting changes more greedy texts than vLLM's own speculation does; takes about ten minutes.
bench-dtype: install  ## greedy texts that part from plain vLLM's, in bfloat16 and float32 (about ten minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.target.dtype --json docs/results/dtype.json --markdown docs/results/dtype.md
	echo "make bench-dtype: $$SECONDS s"

# Exactness and step times on each model runner; needs a GPU that does nothing else, and takes about three quarters of an
# hour.
bench-gpu: install  ## on a GPU: exactness, and what our constraints and we cost (about 45 minutes)
	@scripts/gpu_check.sh

# What the serving path costs on either model runner: no model, no network; needs two quiet cores.
bench-hotpath: install  ## what our calls of a step cost with 256 requests (about six minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.target.hotpath --json docs/results/hotpath.json --markdown docs/results/hotpath.md
	echo "make bench-hotpath: $$SECONDS s"

# What remote drafting costs target and drafter where nothing is paced; takes about ten minutes and two quiet cores.
bench-overhead: install  ## what remote drafting costs where nothing is paced (about ten minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.target.overhead --json docs/results/overhead.json --markdown docs/results/overhead.md
	echo "make bench-overhead: $$SECONDS s"

# What redundancy buys, live; takes about a quarter of an hour and two quiet cores.
bench-trees: install  ## thresholds and main line side by side (about 15 minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.compare.trees --json docs/results/trees.json --markdown docs/results/trees.md
	echo "make bench-trees: $$SECONDS s"

# A million broken, hostile and valid frames; `make test` takes 50,000 of them.
fuzz: install  ## a million mutated frames through the decoder
	@WANSPEC_FUZZ_INPUTS=1000000 $(BIN)/pytest -q -s tests/unit/core/test_fuzz.py
	echo "make fuzz: $$SECONDS s"

# What running branches cost the drafter; takes about six minutes and two quiet cores.
bench-width: install  ## what running branches cost the drafter (about six minutes)
	@mkdir -p docs/results
	$(BIN)/python -m vllm_wanspec.lab.drafter.width --json docs/results/width.json --markdown docs/results/width.md
	echo "make bench-width: $$SECONDS s"

# Every workload on both model runners, Model Runner V2 with its kernels interpreted: takes about half an hour.
exactness: install  ## the exactness tests on both model runners; writes docs/results/exactness.md
	@mkdir -p build docs/results
	rm -f build/exactness.jsonl
	WANSPEC_EXACTNESS=build/exactness.jsonl $(BIN)/pytest -q $(addprefix tests/integration/test_, \
		exactness.py outage.py parameters.py sampling.py small_target.py structured_output.py tensor_parallel.py)
	$(BIN)/python scripts/exactness_table.py build/exactness.jsonl docs/results/exactness
	echo "make exactness: $$SECONDS s"

# Figures come from docs/results, states from the code; a test says when a page is behind.
docs: install  ## the generated parts of the pages: figures, states
	@$(BIN)/python scripts/make_docs.py

# `make test` holds vLLM 0.33 to the contract by the file that this writes. Downloads a wheel of some hundred megabytes,
# of which Python files are read.
compat-source: install  ## read anew what vLLM 0.33.0 has at our seams, from its wheel
	@mkdir -p build/vllm-0.33.0
	$(BIN)/python -m pip download --quiet --no-deps --dest build/vllm-0.33.0 vllm==0.33.0
	$(BIN)/python scripts/read_seams.py build/vllm-0.33.0/vllm-0.33.0* --against tests/contract/vllm-0.32.0.json

# No server is started; about three minutes on two cores.
unit: install  ## unit tests alone (about three minutes)
	@$(BIN)/pytest tests/unit -m "not slow and not gpu"

test: install  ## static checks, unit tests, integration tests with one real vLLM pair
	@$(CHECKS)
	echo "static checks: $$SECONDS s"
	$(BIN)/pytest -m "not slow and not gpu"
	echo "make test: $$SECONDS s"

# pytest's summary, with its time, is the last line.
test-all: install  ## the same and everything slow; what CI runs
	@$(CHECKS)
	echo "static checks: $$SECONDS s"
	$(BIN)/pytest -m "not gpu" --durations=25 --durations-min=20

lint: install  ## static checks alone
	@$(CHECKS)
	echo "make lint: $$SECONDS s"

install:  ## .venv with vLLM, this package and the tools
	@.ci/install

clean:  ## remove .venv and everything that was built
	@rm -rf .venv .overlay build dist ./*.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find vllm_wanspec tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1 \2/p' Makefile | while read -r name text; do printf '%-16s%s\n' "$$name" "$$text"; done
