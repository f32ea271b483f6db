# Two commands need nothing but Python 3.11+: `make demo` and `make test`. Both create .venv first.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out

.PHONY: demo test check format lock clean help
help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "kpmask needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No venv module here: try 'apt install python3-venv', or set PYTHON."; exit 1; }
	$(BIN)/python -m pip install --quiet --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## generate videos, preprocess, train, animate, evaluate; prints where the page is
	$(BIN)/kpmask demo --out $(OUT)

test: $(STAMP) ## every test
	$(BIN)/python -m pytest

check: $(STAMP) ## format, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## pin every dependency again (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	  --upgrade -o requirements.lock
	@# Torch pins its CUDA packages exactly by itself, and its CPU wheels have none of them.
	sed -i -E '/^(nvidia-|cuda-|triton|torch==)/d' requirements.lock
	echo "torch==2.13.0" >> requirements.lock

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) $(OUT)
