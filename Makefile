# The verbs a person types. `make` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test kill-test lint bench lock clean

help: ## list the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready models/.ready ## install what a CPU needs into .venv and make the small models (once)

demo: setup ## PDFs to scored answers on this CPU; DATA=folder takes your own documents and questions
	@export LORRY_TARGET=cpu CUDA_VISIBLE_DEVICES=; if [ -n "$(DATA)" ]; then \
	  exec $(BIN)/lorry run patent-qa --profile tiny --data "$(DATA)" --run "demo-$$(basename "$(DATA)")-$$(realpath "$(DATA)" | cksum | cut -d " " -f 1)"; \
	else exec $(BIN)/lorry run patent-qa --profile tiny --run demo; fi

test: setup ## the tests, real models included (about 10 minutes on 2 cores)
	@$(BIN)/python -m pytest

kill-test: setup ## kill every stage at random moments and compare with an undisturbed run (about 15 minutes)
	@$(BIN)/python -m pytest tests/kill -m '' --timeout 3600

lint: setup ## style, types and the one-way import rule
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: setup ## measure every figure of the README again (benchmarks/README.md)
	@$(BIN)/python -m benchmarks.all

lock: ## write requirements/*.txt again from requirements/*.in (needs uv)
	@sh requirements/lock.sh

clean: ## delete the demo's run and what Python leaves behind; keeps .venv and models
	@rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.ready: requirements/cpu.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into .venv (some minutes, 4.3 GB)"
	@$(PYTHON) -m venv .venv
	@# torch by itself: which build suits is the machine's affair (README, "Set-up"); all else is locked with hashes
	@$(BIN)/pip install --quiet torch==2.13.0
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/dev.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

models/.ready: recipes/demo_models.py | .venv/.ready
	@$(BIN)/python recipes/demo_models.py models 2> models.log || { tail -20 models.log >&2; exit 1; }
	@rm -f models.log && touch $@
