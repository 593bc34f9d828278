# The commands that a user types. `make` lists them.
SHELL := /bin/bash
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A job's GPUs and recipe: make train GPUS=0,1,2,3,4 RECIPE=patent-qa SET="train.epochs=3 seed=7"
# GPUS: numbers or UUIDs; auto or auto:4 chooses GPUs with enough free memory; default: 0. LORRY_GPU_DENY=5,6,7 denies some
ARGS = "$${RECIPE:-patent-qa}" $${PROFILE:+--profile "$$PROFILE"} $${RUN:+--run "$$RUN"} $${DATA:+--data "$$DATA"} \
  $${GPUS:+--gpus "$$GPUS"} $${TARGET:+--target "$$TARGET"}
# make ends with 2 whatever a command ends with
SAY_CODE = || { code=$$?; echo "exit code $$code (docs/runs.md); make itself exits with 2" >&2; exit $$code; }
SETTINGS = LORRY_SET="$${SET:-$$LORRY_SET}"

# a value may hold blanks, quotes and `$`: recipes read it from the environment, and make expands nothing in it
$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(eval override $(name) := $$(value $(name)))\
  $(eval export $(name))))

.DEFAULT_GOAL := help
.PHONY: help setup demo preprocess train infer eval ledger images push .env k8s-run test test-fast image-test kill-test lint bench lock reference clean

help: ## list the commands
	@grep -E '^[a-z0-9. -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/^preprocess.*eval/preprocess, train, infer, eval/' | expand -t 32

setup: .venv/.ready .venv/.gptq models/.ready ## install all that a CPU needs into .venv, and make the demo's models (once)

# the run's name says what differs from the plain demo, so that no job replaces another's run
demo: .venv/.ready models/.ready ## run the demo on this CPU, from PDFs to scored answers; DATA=folder: your own (RECIPE= PROFILE= RUN= SET=)
	@$(if $(filter override,$(origin GPUS) $(if $(filter-out cpu,$(TARGET)),$(origin TARGET))), \
	  echo "error: make demo runs on the CPU; leave out GPUS and TARGET or run make train" >&2; exit 2)
	@export LORRY_TARGET=cpu CUDA_VISIBLE_DEVICES= $(SETTINGS); recipe="$${RECIPE:-patent-qa}" run=demo; \
	[ "$$recipe" = patent-qa ] || run="demo-$$(basename "$$recipe" .yaml)"; \
	[ -z "$$DATA" ] || run="$$run-$$(basename "$$DATA")-$$(realpath -m "$$DATA" | cksum | cut -d " " -f 1)"; \
	exec $(BIN)/lorry run "$$recipe" --profile "$${PROFILE:-tiny}" --run "$${RUN:-$$run}" $${DATA:+--data "$$DATA"}

preprocess train infer eval: .venv/.host ## run a stage of RECIPE (PROFILE= RUN= DATA= SET=) on GPUS=0,1 or auto:2, in a container if a Docker engine answers
	@$(SETTINGS) $(BIN)/lorry launch $@ $(ARGS) $(SAY_CODE)

ledger: .venv/.host ## list each adapter's data mix, score and vote, over all runs (RUN= SORT=score:desc OUT=ledger.html)
	@$(BIN)/lorry ledger $${RUN:+"$$RUN"} $${SORT:+--sort "$$SORT"} $${OUT:+--out "$$OUT"}

images: ## build the stage images of TARGET=a800 (STAGE=train: only one); images/targets.toml lists the targets
	@images/build.sh "$$TARGET" "$$STAGE"

push: ## tag the images of TARGET=a800 for REGISTRY=host/team and push them
	@images/build.sh --push "$$TARGET" "$$STAGE"

k8s-run: .venv/.host ## run the four stages as Kubernetes Jobs on cards of TARGET=a800 (RECIPE= PROFILE= RUN= DATA= SET= GPUS=auto:4 NAMESPACE= REGISTRY= KUBERNETES=)
	@$(SETTINGS) $(BIN)/lorry launch eval --on kubernetes $(ARGS) $${NAMESPACE:+--namespace "$$NAMESPACE"} \
	  $${REGISTRY:+--registry "$$REGISTRY"} $${KUBERNETES:+--kubernetes "$$KUBERNETES"} $(SAY_CODE)

# three processes: with two, two cores are idle for a seventh of the time
test: setup .venv/.zero .venv/.nf4 ## run the tests, with real models (11 to 12 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.ready ## run the tests that need no model, run no whole stage and start no process (about a minute on 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 120 -m "not heavy and not kill and not long and not images"

image-test: setup .venv/.zero ## build the cpu images and run the demo in them with Docker Compose; starts a Docker engine if none answers
	@tests/images/with_engine.sh $(BIN)/python -m pytest -m images --timeout 5400

kill-test: setup .venv/.zero .venv/.nf4 .venv/.trackers .venv/.v100-gptq ## run whole jobs and trainings, and kill stages, shards and nodes at any moment (35 to 40 minutes)
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

.env: ## write settings for `docker compose up infer`: your uid and TARGET=a800; with TARGET=cpu also the profile tiny
	@[ ! -e $@ ] || { echo "error: $@ exists; edit it, or delete it first" >&2; exit 2; }
	@target="$${TARGET:-a800}"; [ -f "compose/$${target//\//?}.env" ] || { exec >&2; \
	  echo "error: no target '$$target'; known targets: $(sort $(basename $(notdir $(wildcard compose/*.env))))"; exit 2; }; \
	uid=$$(id -u) gid=$$(id -g); printf '%s\n' "TARGET=$$target" "LORRY_UID=$${uid/#0/1000}" "LORRY_GID=$${gid/#0/1000}" > $@; \
	[ "$$target" != cpu ] || printf '%s\n' "# small models: a recipe's own are too large for a CPU" LORRY_PROFILE=tiny >> $@; \
	cat $@

clean: ## delete the demo's run and Python's caches; keeps .venv and models
	@rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.host: requirements/host.txt pyproject.toml
	@command -v "$${PYTHON:-python3}" > /dev/null \
	  || { echo "error: $${PYTHON:-python3}: no such command; name a Python from 3.11 on: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@"$${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $${PYTHON:-python3} is older than Python 3.11; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@"$${PYTHON:-python3}" -c 'import ensurepip, venv' \
	  || { echo "error: $${PYTHON:-python3} has no venv module; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@"$${PYTHON:-python3}" -m venv .venv
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

.venv/.nf4: requirements/nf4.txt .venv/.ready
	@$(BIN)/pip install --quiet --no-deps --require-hashes --upgrade --target .venv/nf4 -r requirements/nf4.txt && touch $@

.venv/.trackers: requirements/trackers.txt .venv/.ready
	@$(BIN)/pip install --quiet --no-deps --require-hashes --upgrade --target .venv/trackers -r requirements/trackers.txt && touch $@

# a Python of its own: the wheels of the image v100-gptq are older than those in .venv. uv, as pip would take minutes
.venv/.v100-gptq: images/train/v100-gptq.txt requirements/dev.txt .venv/.ready
	@echo "installing the wheels of v100-gptq into .venv/v100-gptq (5.6 GB)"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv/v100-gptq
	@export VIRTUAL_ENV=.venv/v100-gptq; $(BIN)/uv pip install --quiet --no-deps --require-hashes -r images/train/v100-gptq.txt \
	  && $(BIN)/uv pip install --quiet --no-deps --constraint requirements/dev.txt pytest pluggy iniconfig && touch $@

models/.ready: recipes/demo_models.py | .venv/.ready
	@$(BIN)/python recipes/demo_models.py models 2> models.log || { tail -20 models.log >&2; exit 1; }
	@rm -f models.log && touch $@
