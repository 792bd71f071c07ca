# Two commands do all the set-up, always: `make demo` and `make test`.
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3 2>/dev/null))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c envs/constraints.txt
# cpu or cuda: which build of PyTorch. What is installed stays, unless this is given.
WHEELS ?= $(if $(wildcard $(VENV)/cuda.stamp),cuda,cpu)
STAMP := $(VENV)/$(WHEELS).stamp
# A folder that `make wheelhouse` made: the environment comes from it alone, without a network.
WHEELHOUSE ?=
FROM_WHEELS = $(BIN)/python envs/wheelhouse.py install "$(WHEELHOUSE)" --environment $(WHEELS)
# First and alone: nothing that is installed later may bring another build.
FIRST = $(if $(filter cpu,$(WHEELS)),$(PIP) torch==2.13.0 &&)
CONFIG_HOME := $(or $(XDG_CONFIG_HOME),$(HOME)/.config)
STUDY ?= config/grids/demo.yaml
# 0 takes a free one.
PORT ?= 5000
SOURCES := abf kernels benchmarks envs tests
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONDONTWRITEBYTECODE :=
# Threads are set by each job from its config; libraries must not start their own.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help demo test check ui bench bench-gpu kernels-report setup wheelhouse clean format reference slurm-box slurm-box-down reliability
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# --- environment: stamps, so that the second call does no work ---------------------------------
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or newer found; set PYTHON=/path/to/python" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; set PYTHON=" >&2; exit 1; }; \
	$(PYTHON) -m venv $(VENV)

$(STAMP): envs/$(WHEELS).txt envs/cpu.txt envs/constraints.txt pyproject.toml | $(BIN)/python
	@began=$$(date +%s); \
	echo "set-up: filling $(VENV), $$($(BIN)/python --version), $(WHEELS) (about two minutes)"; \
	$(if $(WHEELHOUSE),$(FROM_WHEELS),$(FIRST) $(PIP) -r envs/$(WHEELS).txt) && \
	$(PIP) --no-deps --no-build-isolation -e . && \
	rm -f $(VENV)/cpu.stamp $(VENV)/cuda.stamp && \
	touch $@ && echo "set-up: $$(( $$(date +%s) - began )) s"

# A wheelhouse has these tools, too; pip then finds them installed and asks nobody.
$(VENV)/dev.stamp: $(STAMP) envs/dev.txt
	@$(PIP) -r envs/dev.txt
	@touch $@

wheelhouse: | $(BIN)/python  ## wheels for all of envs/ into WHEELHOUSE=FOLDER; WHEELS=cuda for GPUs
	@$(BIN)/python envs/wheelhouse.py build "$(or $(WHEELHOUSE),wheelhouse/$(WHEELS))" --environment $(WHEELS)

# --- the two commands --------------------------------------------------------------------------
demo: $(STAMP)  ## a small real study on this machine, to results/report/demo/index.html
	@began=$$(date +%s); \
	snakemake --profile profiles/local --config study=$(STUDY) && \
	echo "demo: $$(( $$(date +%s) - began )) s; open results/report/demo/index.html, or run 'make ui'"

test: $(VENV)/dev.stamp  ## the tests
	@pytest -n 2 --dist worksteal

# --- for those who change it -------------------------------------------------------------------
check: $(VENV)/dev.stamp  ## lint, format, types, import contracts, workflow lint, generated files
	ruff check $(SOURCES)
	ruff format --check $(SOURCES)
	pyright
	lint-imports --no-logo
	snakefmt --check workflow
	python tests/workflow/lint.py
	python -m benchmarks.performance --check
	abf config --check config config/tiny.yaml config/lists.yaml config/smollm2.yaml config/grids/*.yaml

format: $(VENV)/dev.stamp  ## format code and workflow
	ruff check --fix $(SOURCES)
	ruff format $(SOURCES)
	snakefmt workflow

reference: $(STAMP)  ## rewrite config/config.yaml and config/schema.json
	@abf config --write config

ui: $(STAMP)  ## the MLflow UI on 127.0.0.1:PORT, filled from what is on disk
	@abf ui --port $(PORT)

bench: $(STAMP)  ## benchmarks: ratios measured side by side, to benchmarks/results/
	@python -m benchmarks

bench-gpu: $(STAMP)  ## the kernels on an NVIDIA GPU beside their peers, to benchmarks/results/ (WHEELS=cuda)
	@python -m benchmarks.gpu $(ARGS)

kernels-report: $(VENV)/dev.stamp  ## registers, shared memory and instructions of the kernels, to benchmarks/results/
	@python -m abf_kernels.ahead benchmarks/results/kernels_ahead.csv

setup: $(STAMP)  ## environment, and the Snakemake profile name `leonardo`
	@abf link-profile leonardo --config-home "$(CONFIG_HOME)"

slurm-box: $(VENV)/dev.stamp  ## a Slurm cluster on this machine (Debian, root)
	@tests/slurm/install.sh && python -m tests.slurm.box up

slurm-box-down: $(VENV)/dev.stamp  ## end it and delete its state
	@python -m tests.slurm.box down

reliability: $(VENV)/dev.stamp  ## faults on a Slurm in a box, to docs/reliability.md
	@rows=$$(mktemp) && ABF_RELIABILITY=$$rows pytest -n 2 --dist worksteal tests/slurm/test_faults.py tests/slurm/test_launch.py \
	tests/slurm/test_endings.py tests/slurm/test_profile_run.py && python -m tests.slurm.reliability $$rows; rm -f $$rows

clean:  ## caches and logs; results/ is never touched
	rm -rf .snakemake logs build .pytest_cache .ruff_cache .hypothesis *.egg-info
