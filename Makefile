# Every target works in a fresh clone: it makes .venv, and makes it again when it is outdated or broken.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The Python of .venv; override with `make PYTHON=/path/to/python3.12 demo`.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)
endif
# The interpreter behind it, also where PYTHON is that of an activated environment.
BASE_PYTHON := $(shell "$(PYTHON)" -c 'import sys; print(sys._base_executable)' 2>/dev/null)
IMAGE ?= ncsn-python:0.1.0
# The tag in Dockerfile, by the digest of its multi-platform index: `docker buildx imagetools inspect TAG` prints it.
BASE_IMAGE ?= python:3.11.16-slim-bookworm@sha256:0bee7276f83efd4a1ee05bbbf4281d95ed28e079220a9457f25a93e3f1e3c31b
CONFIG ?= configs/digits_edm.yaml
PYTEST_ARGS ?=
LOCK_ARGS ?=
# Processes that run the tests, each whole files; 0 = only this one. More than cores, since many tests wait.
WORKERS ?= 3
PARTS ?=

BIN := .venv/bin
IN_PARALLEL = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Some images set it; hundreds of processes would each compile the tests and the code again.
unexport PYTHONDONTWRITEBYTECODE
# A hash of what decides the installation: a change of content, not of a file's date, renews .venv.
# Of Python the file behind its links, which an activated .venv and pyenv name differently.
WHICH := 'import os, sys; print(os.path.realpath(sys.executable), sys.version)'
KEY := $(shell { cat pyproject.toml constraints.txt; pwd; "$(BASE_PYTHON)" -c $(WHICH); } 2>&1 | cksum | tr ' ' -)
STAMP := .venv/current-$(KEY)

.PHONY: help
help: ## List the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: venv
venv: $(STAMP) ## Install into .venv only

.PHONY: demo
demo: $(STAMP) ## Set up, then run the whole pipeline on real handwritten digits and register the model
	@$(BIN)/ncsn run --config $(CONFIG)

.PHONY: test
test: lint ## Set up, then check style, types and layers and run every test that takes seconds
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: test-all
test-all: lint ## The same with the tests that take minutes, as other processors compute, and with the newest releases
	@$(BIN)/python -m pytest -m "" $(IN_PARALLEL) $(PYTEST_ARGS)
	@bash scripts/test_processors.sh $(IN_PARALLEL) $(PYTEST_ARGS)
	@bash scripts/test_newest.sh $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: test-processors
test-processors: $(STAMP) ## The quick tests of what computes, with the kernels of two older kinds of processor
	@bash scripts/test_processors.sh $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: test-newest
test-newest: $(STAMP) ## The quick tests with the newest releases that pyproject.toml allows
	@bash scripts/test_newest.sh $(IN_PARALLEL) $(PYTEST_ARGS)

.PHONY: test-cluster
test-cluster: $(STAMP) ## Run the tests of a real cluster: the one of KUBECONFIG, with the image NCSN_IMAGE
	@$(BIN)/python -m pytest tests/cluster_live $(PYTEST_ARGS)

.PHONY: bench
bench: $(STAMP) ## Measure performance next to its targets (PARTS=... for some)
	@$(BIN)/python -m benchmarks $(PARTS)

.PHONY: lint
lint: $(STAMP) ## Check style (ruff), types (mypy) and layers (import-linter)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: format
format: $(STAMP) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: ui
ui: $(STAMP) ## Open MLflow on the runs, curves, images and registered models
	@$(BIN)/ncsn ui --config $(CONFIG)

.PHONY: image
image: ## Build the three images, tagged by version and by commit (needs docker; IMAGE=name:tag, TORCH_INDEX_URL=...)
	@commit=$$(git describe --always --dirty --exclude '*' --abbrev=12); image=$(IMAGE); \
	for target in slim ray full; do end=-$$target; end=$${end%-full}; (set -x; \
	docker build --target $$target --tag "$$image$$end" --tag "$${image%:*}:$$commit$$end" \
		--build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg REVISION="$$(git rev-parse HEAD)" \
		--build-arg PIP_INDEX_URL --build-arg TORCH_INDEX_URL .); done

.PHONY: lock
lock: ## Write constraints.txt: what stands there if pyproject.toml still allows it (LOCK_ARGS=--upgrade: the newest)
	@[ -x $(BIN)/uv ] || $(MAKE) venv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --all-extras \
		--group image --custom-compile-command "make lock" --output-file constraints.txt $(LOCK_ARGS) pyproject.toml

.PHONY: clean
clean: ## Remove caches and build outputs; .venv and the store .ncsn stay
	@rm -rf build dist local_outputs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(STAMP):
	@bash scripts/make_venv.sh "$(or $(BASE_PYTHON),$(PYTHON))" "$@"
