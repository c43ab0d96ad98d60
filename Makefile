# `make help` lists the targets. Each makes .venv first if it is missing.
PYTHON ?= python3
CONFIG ?= configs/digits.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-slow test-cluster test-drills cluster-up cluster-shell cluster-status cluster-down dist eval docs lint bench

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## make .venv with the package and everything that it needs

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the whole path on real handwritten digits, on this machine, in some minutes
	$(BIN)/dsno-cluster demo --launcher local $(ARGS)

# two at a time: most of a test is waiting for processes to start
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(READY)  ## the tests, in some thirteen minutes on two idle cores
	$(PYTEST) -m "not slow and not cluster" $(ARGS)

test-gpu: $(READY)  ## the tests that need a GPU, which all others hide; some minutes
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-slow: $(READY)  ## the tests that `make test` leaves out, in half an hour: more faults, stages and precisions
	$(PYTEST) -m slow $(ARGS)

test-cluster: $(READY)  ## the stages and their faults on four real Slurm nodes on this machine; needs root and Debian's Slurm
	$(BIN)/python -m pytest -m "cluster and not drill" $(ARGS)

test-drills: $(READY)  ## the longer faults on such a cluster: frozen, slow, full and preempted nodes
	$(BIN)/python -m pytest -m drill $(ARGS)

cluster-up: $(READY)  ## start that cluster to try things by hand: a login host, four nodes, an S3 server
	$(BIN)/python tests/cluster/testbed.py up $(ARGS)

cluster-shell: $(READY)  ## a shell on its login host
	$(BIN)/python tests/cluster/testbed.py shell

cluster-status: $(READY)  ## its nodes and jobs
	$(BIN)/python tests/cluster/testbed.py status

cluster-down: $(READY)  ## end it and remove everything that belongs to it
	$(BIN)/python tests/cluster/testbed.py down

dist: $(READY)  ## the sdist and the wheel, in dist/, checked as PyPI does
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

eval: $(READY)  ## evaluate the newest student of CONFIG (default configs/digits.yaml)
	$(BIN)/dsno-cluster eval $(CONFIG) $(ARGS)

docs: $(READY)  ## write docs/configuration.md from the models of the configuration
	$(BIN)/python docs/make_configuration.py

lint: $(READY)  ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

# the peers of benchmarks/reader.py want older libraries than diffusers does, so they have an environment of their own
PEERS := .venv-bench
PEERS_READY := $(PEERS)/.ready

$(PEERS_READY): pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet --editable '.[bench]'
	@touch $@

bench: $(READY) $(PEERS_READY)  ## every benchmark; each prints the figure that it measures
	@failed=; for file in benchmarks/*.py; do echo "== $$file"; \
	  case $$file in benchmarks/reader.py) python=$(PEERS)/bin/python;; *) python=$(BIN)/python;; esac; \
	  $$python $$file $(ARGS) || failed="$$failed $$file"; done; \
	  [ -z "$$failed" ] || { echo "not measured:$$failed" >&2; exit 1; }
