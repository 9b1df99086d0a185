# Everything a developer or a first visitor does. `make` alone lists the targets.
#
# A machine with Python 3.11+, a C++ compiler and CMake is enough; the rest goes into $(VENV).

VENV ?= .venv
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	if $$p -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$p; break; fi; done)
BIN := $(VENV)/bin
# Programs that pip does not bring; without one, `make test` leaves out the tests marked with its name.
OUTSIDE := haproxy npm
MISSING = $(foreach program,$(OUTSIDE),$(if $(shell \
	PATH="$$PATH:/usr/sbin:/usr/local/sbin" command -v $(program)),,$(program)))
CHECKED := shared router worker mesh loadtests tests infra
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env run test slow chaos soak lint format check bench-engine bench-router bench-routing bench-ring bench-ring-delay bench-shards bench-nodes bench-end-to-end bench-cancel bench-batch-invariance bench-crowd bench-overload bench-slow-readers bench-servers bench-memory peers bench-peers bench-speculation check-equality check-gpu simulate clean distclean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | \
		while IFS='	' read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done

env: ## Make the environment only: builds llama.cpp once, minutes; afterwards instant
	@if [ -z "$(PYTHON)" ]; then \
		echo "make env: Python 3.11 or newer is needed, none is on the PATH; name one: make env PYTHON=/path/to/python3" >&2; exit 1; fi
	@if ! $(PYTHON) -c '$(NEW_ENOUGH)'; then \
		echo "make env: Python 3.11 or newer is needed, $(PYTHON) is not" >&2; exit 1; fi
	@$(PYTHON) infra/setup_env.py --venv $(VENV)

run: env ## Bring up NATS, a router and a worker with a small model (ARGS="--port 8000" and so on)
	@exec $(BIN)/mesh up $(ARGS)

test: env ## Run the tests (ARGS="-k name" and so on)
	@for program in $(MISSING); do \
		echo "make test: $$program is not installed; the tests that need it are left out"; done
	@bash infra/run_tests.sh $(BIN)/pytest "not slow and not chaos and not soak$(foreach program,$(MISSING), and not $(program))" --durations=25 $(ARGS)

slow: env ## Run the tests that take minutes each
	$(BIN)/pytest -m slow $(ARGS)

chaos: env ## Run the tests that kill, stop and cut off processes
	$(BIN)/pytest -s -m chaos $(ARGS)

soak: env ## Run the tests that look for leaks: an hour, or MESH_SOAK_MINUTES
	$(BIN)/pytest -s -m soak $(ARGS)

lint: env ## Check style, types and the walls between packages
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env ## Format the code and sort the imports
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

check: lint test ## What CI runs

bench-engine: env ## Engine against llama.cpp's own ceiling
	$(BIN)/python -m loadtests.bench_engine $(ARGS)

bench-routing: env ## Routing against a random worker, round robin and the queue group
	$(BIN)/python -m loadtests.bench_routing $(ARGS)

simulate: env ## The fleet in virtual time; ARGS="--part policies" and so on, half an hour for all
	$(BIN)/python -m loadtests.simulate $(ARGS)

bench-router: env ## Router alone: CPU a token, streams, memory
	$(BIN)/python -m loadtests.bench_router $(ARGS)

bench-ring: env ## A model in two stages against the same in one process
	$(BIN)/python -m loadtests.bench_ring $(ARGS)

bench-ring-delay: env ## Three stages, farther and farther apart
	$(BIN)/python -m loadtests.bench_ring_delay $(ARGS)

bench-shards: env ## Shards of experts: equal texts, perplexity by what is kept
	$(BIN)/python -m loadtests.bench_shards $(ARGS)

bench-nodes: env ## A node, a pipeline of two, expert shards on three, each with the same CPU share
	$(BIN)/python -m loadtests.bench_nodes $(ARGS)

bench-end-to-end: env ## HTTP through router and NATS against the engine alone
	$(BIN)/python -m loadtests.bench_end_to_end $(ARGS)

bench-cancel: env ## From a client's leaving to its slot being free
	$(BIN)/python -m loadtests.bench_cancel $(ARGS)

bench-batch-invariance: env ## What rows cost that keep others from being alone
	$(BIN)/python -m loadtests.bench_batch_invariance $(ARGS)

bench-crowd: env ## 200 requests at one moment: how soon each begins; ARGS="MODEL --against CHECKOUT"
	$(BIN)/python -m loadtests.bench_crowd $(ARGS)

bench-overload: env ## Five times the capacity: what is still answered, and how soon after
	$(BIN)/python -m loadtests.bench_overload $(ARGS)

bench-slow-readers: env ## 50 streams beside 200 clients that read a byte a second
	$(BIN)/python -m loadtests.bench_slow_readers $(ARGS)

bench-servers: env ## ASGI servers against each other; installs those that are not needed otherwise
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt granian hypercorn
	$(BIN)/python -m loadtests.http_servers $(ARGS)

peers: env ## Build llama-server, to be compared with: minutes once, afterwards instant
	@$(BIN)/python -m loadtests.peers.build_llama_server $(ARGS)

bench-peers: env ## Ours against llama-server; most of an hour, ARGS="--part throughput" and so on
	@$(BIN)/python -m loadtests.peers.build_llama_server
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt matplotlib
	$(BIN)/python -m loadtests.bench_peers $(ARGS)

bench-memory: env ## Memory over 10,000 requests
	$(BIN)/python -m loadtests.soak_memory $(ARGS)

check-gpu: env ## Memory, texts and layers on this host's NVIDIA GPUs
	$(BIN)/python -m loadtests.check_gpu $(ARGS)

bench-speculation: env ## Tokens/s with a draft model, with n-gram lookup, and without (hours; see --help)
	$(BIN)/python -m loadtests.bench_speculation $(ARGS)

check-equality: env ## 200 streams with speculation and without, token by token
	$(BIN)/python -m loadtests.check_equality $(ARGS)

clean: ## Remove caches and builds; the environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

distclean: clean ## Remove the environment too
	rm -rf $(VENV)
