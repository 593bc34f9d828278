# The commands that a user types. `make` lists them.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A job's GPUs and recipe: make train GPUS=0,1,2,3,4 RECIPE=patent-qa SET="train.epochs=3 seed=7"
# GPUS: numbers or UUIDs; auto or auto:4 chooses GPUs with enough free memory; default: 0. LORRY_GPU_DENY=5,6,7 denies some
RECIPE ?= patent-qa
ARGS = $(RECIPE) $(if $(PROFILE),--profile $(PROFILE)) $(if $(RUN),--run $(RUN)) $(if $(DATA),--data $(DATA)) \
  $(foreach setting,$(SET),--set $(setting)) $(if $(GPUS),--gpus $(GPUS)) $(if $(TARGET),--target $(TARGET))

.DEFAULT_GOAL := help
.PHONY: help setup demo preprocess train infer eval ledger images push .env k8s-run test test-fast image-test kill-test lint bench lock reference clean

help: ## list the commands
	@grep -E '^[a-z0-9. -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/^preprocess.*eval/preprocess, train, infer, eval/' | expand -t 32

setup: .venv/.ready .venv/.gptq models/.ready ## install all that a CPU needs into .venv, and make the small models (once)

demo: setup ## run the demo on this CPU, from PDFs to scored answers; DATA=folder has your own documents and questions
	@export LORRY_TARGET=cpu CUDA_VISIBLE_DEVICES=; if [ -n "$(DATA)" ]; then \
	  exec $(BIN)/lorry run patent-qa --profile tiny --data "$(DATA)" --run "demo-$$(basename "$(DATA)")-$$(realpath "$(DATA)" | cksum | cut -d " " -f 1)"; \
	else exec $(BIN)/lorry run patent-qa --profile tiny --run demo; fi

preprocess train infer eval: .venv/.host ## run a stage of RECIPE (PROFILE= RUN= DATA= SET=) on GPUS=0,1 or auto:2, in a container if a Docker engine answers
	@$(BIN)/lorry launch $@ $(ARGS)

ledger: .venv/.host ## list each adapter's data mix, score and vote, over all runs (RUN= SORT=score:desc OUT=ledger.html)
	@$(BIN)/lorry ledger $(RUN) $(if $(SORT),--sort $(SORT)) $(if $(OUT),--out "$(OUT)")

images: ## build the stage images of TARGET=a800 (STAGE=train: only one); images/targets.toml lists the targets
	@images/build.sh "$(TARGET)" "$(STAGE)"

push: ## tag the images of TARGET=a800 for REGISTRY=host/team and push them
	@REGISTRY="$(REGISTRY)" images/build.sh --push "$(TARGET)" "$(STAGE)"

k8s-run: ## run the four stages as Kubernetes Jobs on cards of TARGET=a800, with images from REGISTRY
	@REGISTRY="$(REGISTRY)" k8s/run.sh "$(TARGET)" $(NAMESPACE)

# three processes: with two, two cores are idle for a seventh of the time
test: setup .venv/.zero ## run the tests, with real models (12 to 15 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.ready ## run the tests that need no model, run no whole stage and start no process (under a minute on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 120 -m "not heavy and not kill and not long and not images"

image-test: setup .venv/.zero ## build the cpu images and run the demo in them with Docker Compose; starts a Docker engine if none answers
	@tests/images/with_engine.sh $(BIN)/python -m pytest -m images --timeout 5400

kill-test: setup .venv/.zero ## run whole jobs, and kill stages, shards and nodes at any moment and compare with an undisturbed run (20 to 25 minutes)
	@$(BIN)/python -m pytest -m "kill or long" --timeout 3600

lint: setup ## check style, types, import rules, Dockerfiles and shell scripts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	@$(BIN)/hadolint images/*/Dockerfile && $(BIN)/shellcheck images/*.sh images/base/*.sh images/base/cc k8s/*.sh \
	  tests/images/*.sh requirements/lock.sh .ci/run

bench: setup ## run the benchmarks that need no GPU and no images (benchmarks/README.md lists all)
	@$(BIN)/python -m benchmarks.all

reference: setup ## write docs/recipe-reference.md from the recipe's schema
	@$(BIN)/python docs/make_reference.py

lock: setup ## write the locked requirements of host and images from their inputs
	@PATH="$$PWD/$(BIN):$$PATH" sh requirements/lock.sh && PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python images/lock.py

.env: ## write settings for `docker compose up infer`: your uid and TARGET=a800
	@[ ! -e $@ ] || { echo "error: $@ exists; edit it, or delete it first" >&2; exit 2; }
	@# never root: uid 0 becomes 1000, the user of the images
	@uid=$$(id -u) gid=$$(id -g); printf 'TARGET=%s\nLORRY_UID=%s\nLORRY_GID=%s\n' "$(or $(TARGET),a800)" \
	  "$${uid/#0/1000}" "$${gid/#0/1000}" > $@ && cat $@

clean: ## delete the demo's run and Python's caches; keeps .venv and models
	@rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.host: requirements/host.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/host.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.ready: requirements/cpu.txt requirements/dev.txt .venv/.host
	@echo "installing into .venv (some minutes, 4.8 GB)"
	@# torch is not locked, as its build depends on the machine (docs/development.md); all else is locked with hashes
	@$(BIN)/pip install --quiet torch==2.13.0
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/dev.txt
	@touch $@

# only GPTQ bases need a compiler and Python's headers; without these they are left out
.venv/.gptq: requirements/gptq.txt .venv/.ready
	@if command -v cc >/dev/null && [ -e "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; \
	then $(BIN)/pip install --quiet --no-deps --no-build-isolation --require-hashes -r requirements/gptq.txt && touch $@; \
	else echo "GPTQ is left out: it needs a C compiler and Python's headers (Debian: apt-get install gcc python3-dev)"; fi

.venv/.zero: requirements/zero.txt .venv/.ready
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --require-hashes --upgrade --target .venv/zero \
	  -r requirements/zero.txt && touch $@

models/.ready: recipes/demo_models.py | .venv/.ready .venv/.gptq
	@$(BIN)/python recipes/demo_models.py models 2> models.log || { tail -20 models.log >&2; exit 1; }
	@rm -f models.log && touch $@
