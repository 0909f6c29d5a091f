# Development commands. `make` alone lists them; CONTRIBUTING.md explains them.
#
#   make setup PYTHON=/path/to/python     choose the interpreter (3.11 or newer)
#   make test ARGS="-k splits"            pass options to pytest
#   make test WORKERS=0                   in one process (to debug); more than 2 on a large machine

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
ARGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARITY := .venv-parity
TORCH := 2.13.0

# Large wheels on a slow line need more than uv's 30 seconds.
UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_TIMEOUT

# Python keeps the bytecode of what it has compiled, whatever the shell asks for: without it every process of the tests, of which there are
# many, spends six seconds more on its imports.
unexport PYTHONDONTWRITEBYTECODE

# The stamp says where and from which PYTHON= the environment was made. Another interpreter was asked for, the checkout
# has moved (its scripts hold absolute paths), or the interpreter is gone: build it anew.
MADE_FOR := $(strip $(shell sed -n 1p $(READY) 2>/dev/null))
MADE_WITH := $(strip $(shell sed -n 2p $(READY) 2>/dev/null))
REBUILD := $(if $(wildcard $(READY)),$(strip \
  $(if $(filter-out $(MADE_FOR),$(CURDIR)),moved) \
  $(if $(filter-out $(MADE_WITH),$(PYTHON)),other) \
  $(shell $(BIN)/python -c '' >/dev/null 2>&1 || echo broken)))

.PHONY: help setup demo test parity lint typecheck format bench clean rebuild

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## prepare .venv (skipped when it is up to date)

demo: $(READY) ## run the main job on the embedded data and show the result
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/demo.py

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

parity: $(PARITY)/.ready ## compare the models with PyTorch (Python 3.11 and a CPU build of torch, in .venv-parity)
	XLA_FLAGS= $(PARITY)/bin/python -m pytest tests/parity $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

typecheck: $(READY) ## check types
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(READY) ## format the code and fix what can be fixed
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

bench: $(READY) ## run the benchmarks (docs/benchmarks.md)
	@found=; for file in tools/bench/*.py; do \
	  [ -f "$$file" ] || continue; \
	  found=yes; echo "== $$file"; \
	  python=$(BIN)/python; \
	  if grep -q 'Needs torch\|import torch' "$$file"; then \
	    python=$(PARITY)/bin/python; \
	    [ -f $(PARITY)/.ready ] || { echo "skipped: it compares with PyTorch; make parity sets that up"; continue; }; \
	  fi; \
	  $$python "$$file" $(ARGS) || exit 1; \
	done; [ -n "$$found" ] || echo "no benchmarks in tools/bench"

clean: ## remove caches and build products (.venv, prepared and runs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find instructrec_jax tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------- environment

$(READY): pyproject.toml $(if $(REBUILD),rebuild)
	@set -e; \
	version='import sys; print("%d.%d.%d" % sys.version_info[:3])'; \
	runs() { "$$1" -c "import sys; sys.exit(not $$2)" >/dev/null 2>&1; }; \
	if [ -z "$(REBUILD)" ] && [ '$(PYTHON)' = '$(if $(PYTHON),$(MADE_WITH))' ] && runs $(BIN)/python 'sys.version_info >= (3, 11)'; then \
	  rm -f $@; \
	  echo "updating $(VENV) (Python $$($(BIN)/python -c "$$version"))"; \
	else \
	  python='$(PYTHON)'; \
	  if [ -n "$$python" ]; then \
	    runs "$$python" 'sys.version_info >= (3, 11)' || { \
	      echo "error: PYTHON=$$python does not run, or is older than Python 3.11" >&2; exit 1; }; \
	  else \
	    pyenv=$$(pyenv root 2>/dev/null) || pyenv=; \
	    for found in python3.13 python3.12 python3.14 "$${pyenv:-/nowhere}"/versions/3.1[2-9]*/bin/python python3; do \
	      if [ "$$found" = python3 ]; then least=11; else least=12; fi; \
	      if runs "$$found" "sys.version_info >= (3, $$least)"; then python=$$found; break; fi; \
	    done; \
	    [ -n "$$python" ] || { \
	      echo "error: no Python 3.11 or newer was found; install one, or name it: make setup PYTHON=/path/to/python" >&2; \
	      exit 1; }; \
	  fi; \
	  rm -f $@; \
	  echo "making $(VENV) with $$python (Python $$("$$python" -c "$$version"))"; \
	  log=$$("$$python" -m venv --clear $(VENV) 2>&1) \
	    || { rm -rf $(VENV); "$$python" -m virtualenv --quiet $(VENV) >/dev/null 2>&1; } \
	    || { rm -rf $(VENV); uv venv --quiet --seed --python "$$("$$python" -c 'import sys; print(sys.executable)')" $(VENV) 2>/dev/null; } \
	    || { echo "$$log" >&2; rm -rf $(VENV); \
	         echo "error: $$python cannot make a virtual environment" >&2; \
	         echo "  remedy: install its venv module (Debian, Ubuntu: apt install python3-venv), or pip install virtualenv," >&2; \
	         echo "  or choose another interpreter: make setup PYTHON=/path/to/python" >&2; exit 1; }; \
	fi; \
	if ! $(BIN)/python -m uv --version >/dev/null 2>&1; then \
	  $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || { \
	    echo "error: $(VENV) has no pip; remove $(VENV) and run make setup again" >&2; exit 1; }; \
	  echo "getting uv"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; \
	fi; \
	index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null || true)}}; \
	if [ -n "$$index" ]; then UV_DEFAULT_INDEX=$$index; export UV_DEFAULT_INDEX; fi; \
	echo "installing instructrec_jax and its development tools"; \
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	printf '%s\n' '$(CURDIR)' '$(or $(PYTHON),$(if $(REBUILD),,$(MADE_WITH)))' > $@; \
	echo "$(VENV) is ready: jax $$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("jax"))')"

# PyTorch stands apart: the stack runs without it, and its usual Linux wheel brings gigabytes of CUDA. What pip would take
# is looked at before anything is downloaded.
$(PARITY)/.ready: pyproject.toml
	@set -e; rm -f $@; python=; pyenv=$$(pyenv root 2>/dev/null) || pyenv=; \
	for found in python3.11 "$${pyenv:-/nowhere}"/versions/3.11*/bin/python; do \
	  if "$$found" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; then python=$$found; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "error: make parity needs Python 3.11" >&2; exit 3; }; \
	echo "making $(PARITY) with $$python"; \
	"$$python" -m venv --clear $(PARITY); pip="$(PARITY)/bin/python -m pip --disable-pip-version-check"; \
	$$pip install --quiet --dry-run --report $(PARITY)/torch.json torch==$(TORCH); \
	if grep -qE '"name": *"(nvidia|cuda|triton)' $(PARITY)/torch.json; then \
	  echo "error: pip would install a CUDA build of torch" >&2; \
	  echo "  remedy: name the index of CPU builds that pytorch.org gives, as PIP_EXTRA_INDEX_URL, and ask for" >&2; \
	  echo "  make parity TORCH=$(TORCH)+cpu" >&2; exit 3; fi; \
	$$pip install --quiet torch==$(TORCH); \
	$$pip install --quiet -e '.[dev,torch-parity]'; \
	touch $@

rebuild:
	@true
