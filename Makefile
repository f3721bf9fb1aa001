# `make` lists the targets. Variables can be given on the command line: make serve PORT=9000

PORT      ?= 8000
INSTANCES ?= 2
# A path or a name as vLLM takes it; empty: the small model that `make model` fetches.
MODEL     ?=
# Further options of the server, or of pytest.
ARGS      ?=
VENV      ?= .venv
# cpu, or vllm on a machine with NVIDIA GPUs.
EXTRA     ?= cpu
# The first Python of these that is 3.11 to 3.13.
PYTHON    ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null \
  && echo $$p && break; done)

BENCHMARKS := dispatch scale_out relay \
  overhead:--engine:cpu:--requests:16:--concurrency:4:--tokens:64 \
  overhead:--profile:cpu-smoke overhead:--profile:instant

BIN := $(VENV)/bin
export VLLM_NO_USAGE_STATS = 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install model serve test chaos lint type bench gpu-check paper docs clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r t d; \
	  do printf '  make %-9s %s\n' "$$t" "$$d"; done

install: ## Make .venv and install everything (EXTRA=vllm for NVIDIA GPUs)
	@test -n "$(PYTHON)" || { echo 'llumnix: needs Python 3.11, 3.12 or 3.13' >&2; exit 1; }
	@$(PYTHON) deploy/install.py $(VENV) --extra $(EXTRA)

model: install ## Fetch the small real model and print where it lies
	@$(BIN)/python deploy/model.py

serve: install ## Start a node with two vLLM instances on port 8000 (PORT, INSTANCES, MODEL, ARGS)
	@model='$(MODEL)'; test -n "$$model" || model=$$($(BIN)/python deploy/model.py) || exit 1; \
	  exec $(BIN)/python deploy/serve.py --port $(PORT) --instances $(INSTANCES) \
	    --model "$$model" $(ARGS)

test: model lint type ## Check and test everything (ARGS for pytest; ARGS='-m "not slow"' for the quick part)
	$(BIN)/python -m pytest $(ARGS)

chaos: model ## Faults under load, from a seed (ARGS="--minutes 60 --seed 7"); report in build/chaos/
	$(BIN)/python -m tests.chaos $(ARGS)

lint: install ## Style, format, and the arrows between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

type: install ## mypy in strict mode
	$(BIN)/mypy

bench: install ## Run the benchmarks; JSON goes to build/bench/
	@mkdir -p build/bench; for run in $(BENCHMARKS); do set -- $$(echo $$run | tr : ' '); name=$$1; shift; \
	  file=$$(echo $$run | tr -d : | tr -s - _); echo "== $$name $$*"; \
	  $(BIN)/python benchmarks/$$name.py "$$@" --json build/bench/$$file.json || exit 1; done

gpu-check: install ## On a machine with GPUs, before a release: do moves work and are they fast (ARGS="--out FOLDER")
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

paper: install ## Run the paper's evaluation in the simulator; writes docs/paper.md (ARGS="--seeds 4 5")
	$(BIN)/python -m benchmarks.paper $(ARGS)

docs: install ## Write docs/options.md and the routes of docs/security.md out of the code
	@$(BIN)/python deploy/options.py
	@$(BIN)/python deploy/routes.py

clean: ## Remove .venv and everything that was built; the model stays in the user's cache
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
