# What one does with this checkout. `make help` prints the verbs.
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. A machine without a GPU takes the small build instead:
#   make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos audit-dp lint protos bench docs clean

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
CHAOS_FLAGS ?= --kills 100 --seed 0 --steps 200
VENV := .venv
BIN := $(VENV)/bin

# All that makes a virtual environment stale: what is asked for, the interpreter, and the folder (scripts name it).
FINGERPRINT := $(shell $(PYTHON) -c 'import hashlib, os, sys, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb")); \
	asked = [project["build-system"], project["project"], project["tool"]["setuptools"], open("constraints.txt").read()]; \
	print(hashlib.sha256(repr((asked, sys.version, os.getcwd())).encode()).hexdigest()[:16])' 2>/dev/null)
STAMP := $(VENV)/.installed-$(FINGERPRINT)

# Thousands of processes import torch here; a shell that forbids bytecode has each of them compile it, for seconds.
unexport PYTHONDONTWRITEBYTECODE

# Not compiled: Python compiles what is imported, and all of torch and transformers would take longer than the download.
PIP = $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt

PROTOS_OUT ?= .
DOCS_OUT ?= docs
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=.

help:  ## print this
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(STAMP)  ## make .venv with the versions of constraints.txt, unless it stands

$(STAMP):
	@test -n "$(FINGERPRINT)" || { echo "Cloister needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes and 2 GB, once."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	$(PIP) --no-build-isolation $(PIP_FLAGS) --editable '.[ckks,dev,postgres]'
	@touch $@

demo: setup  ## train a real model through a real node over mutual TLS, and prove the result
	$(BIN)/cloister demo

test: setup  ## run the whole test suite; `make chaos` and `make audit-dp` are its long forms
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile $(PYTEST_FLAGS)

# Kills owner and nodes 100 times at random moments, and compares the run's bits: some 20 minutes.
chaos: setup
	$(BIN)/python -m tests.chaos $(CHAOS_FLAGS)

# Tries to catch each treatment, and broken variants of it; kills an owner 200 times and holds its ledger to what left;
# has a node attack honest owners: about an hour.
audit-dp: setup
	$(BIN)/python -m tests.audit_dp
	$(BIN)/python -m tests.private_chaos --kills 200
	$(BIN)/python -m tests.fsha
	$(BIN)/python -m tests.fsha --honest --steps 150

lint: setup  ## check style, types, imports, and that what is generated is up to date
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(MAKE) --no-print-directory protos docs PROTOS_OUT="$$fresh" DOCS_OUT="$$fresh"; \
	diff -r --exclude=__pycache__ --exclude=__init__.py --exclude=py.typed --exclude='*.proto' "$$fresh/protos" protos \
		|| { echo "protos/ is not what its .proto files say: run 'make protos' and commit the stubs" >&2; exit 1; }; \
	diff "$$fresh/cli.md" docs/cli.md \
		|| { echo "docs/cli.md is not what the commands say: run 'make docs' and commit it" >&2; exit 1; }

protos: setup  ## regenerate the stubs in protos/
	$(PROTOC) --python_out=$(PROTOS_OUT) --mypy_out=quiet:$(PROTOS_OUT) protos/*.proto
	$(PROTOC) --grpc_python_out=$(PROTOS_OUT) --mypy_grpc_out=quiet:$(PROTOS_OUT) $$(grep -l '^service ' protos/*.proto)

bench: setup  ## measure against the same models trained unsplit; writes bench/RESULTS.md
	$(BIN)/python -m bench all --write

docs: setup  ## write docs/cli.md from the commands themselves
	$(BIN)/python -m docs.cli $(DOCS_OUT)/cli.md

clean:  ## remove .venv, caches and build output
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
