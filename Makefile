# Two commands need nothing but Python 3.11+: `make demo` and `make test`. Both create .venv first.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-out
# Tests start Ray, Prefect and object stores of their own: more than two at a time want a large machine.
JOBS ?= 2

# What `make weights` makes: videos of people who are not in the demo (it has seed 0), and the
# system that is to be called `demo`. WEIGHTS_TRAIN is for a GPU: --set use_gpu=true
WEIGHTS_OUT ?= weights-out
WEIGHTS_VIDEOS ?= 240
WEIGHTS_SEED ?= 1
WEIGHTS_BEST ?= kpmask-plus
WEIGHTS_TRAIN ?=

.PHONY: demo test test-long check format lock clean help weights
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

test: $(STAMP) ## the tests, two files at a time
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(STAMP) ## those that take minutes each: chaos, a million rows, two hours of video
	$(BIN)/python -m pytest -m long

check: $(STAMP) ## format, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

weights: $(STAMP) ## train the bundled weights again, for hours, on drawn videos (kpmask/weights)
	$(BIN)/kpmask demo --videos-only --varied --num-videos $(WEIGHTS_VIDEOS) --seed $(WEIGHTS_SEED) \
	  --out $(WEIGHTS_OUT)/videos
	$(BIN)/kpmask demo --videos-only --out $(WEIGHTS_OUT)/demo-videos
	set -e; for part in "" demo-; do $(BIN)/kpmask preprocess --preset demo-weights \
	  --metadata $(WEIGHTS_OUT)/$${part}videos/metadata.csv --raw $(WEIGHTS_OUT)/$${part}videos/raw \
	  --out $(WEIGHTS_OUT)/$${part}dataset --set download.enabled=false; done
	set -e; for system in heatmap kpmask-plus; do \
	  $(BIN)/kpmask train --preset demo-weights --system $$system $(WEIGHTS_TRAIN) \
	    --data $(WEIGHTS_OUT)/dataset --out $(WEIGHTS_OUT)/$$system; \
	  $(BIN)/kpmask evaluate --checkpoint $(WEIGHTS_OUT)/$$system/weights.safetensors \
	    --data $(WEIGHTS_OUT)/demo-dataset --out $(WEIGHTS_OUT)/$$system-scores; \
	done
	set -e; for entry in demo-heatmap:heatmap demo:$(WEIGHTS_BEST); do \
	  name=$${entry%%:*}; system=$${entry##*:}; \
	  $(BIN)/kpmask checkpoint release $(WEIGHTS_OUT)/$$system/weights.safetensors \
	    --out kpmask/weights/$$name.safetensors --name $$name --scores $(WEIGHTS_OUT)/$$system-scores \
	    --command "make weights WEIGHTS_VIDEOS=$(WEIGHTS_VIDEOS) WEIGHTS_SEED=$(WEIGHTS_SEED)"; \
	done
	$(BIN)/kpmask checkpoint list

lock: ## pin every dependency again (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	  --upgrade -o requirements.lock
	@# Torch pins its CUDA packages exactly by itself, and its CPU wheels have none of them.
	sed -i -E '/^(nvidia-|cuda-|triton|torch==)/d' requirements.lock
	echo "torch==2.13.0" >> requirements.lock

clean: ## remove the environment and the demo's output
	rm -rf $(VENV) $(OUT) $(WEIGHTS_OUT)
