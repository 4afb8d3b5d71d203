# make help lists the targets. Each does its own set-up: .venv is made once, and filled again only when a pin changes.

SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
DEMO ?= demo
BIN := .venv/bin
CONSTRAINTS := -c constraints.txt

# Settings of pip. DeepSpeed is built apart from our torch: beside a CUDA torch its set-up asks for the CUDA compiler.
export PIP_USE_PEP517 := 1
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo test check format bench test-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON (now $(PYTHON)) makes .venv; DEMO (now $(DEMO)) is the folder of the demo."

# --- set-up -----------------------------------------------------------------------------------------------------------

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "error: '$(PYTHON)' is missing or older than Python 3.10: install a newer one, or name it: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot make virtual environments: install its venv package (Debian: apt install python3-venv)" >&2; exit 2; }
	@echo "set-up: .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.python constraints.txt
	@echo "set-up: $$(grep '^torch==' constraints.txt), by itself first (minutes on a slow line)"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch
	@touch $@

.venv/.base: .venv/.torch setup.py pyproject.toml
	@echo "set-up: dalle-ds, and what it needs to run, as pinned in constraints.txt"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable .
	@touch $@

.venv/.test: .venv/.torch setup.py pyproject.toml
	@echo "set-up: dalle-ds, and what it needs to run and to be tested, as pinned in constraints.txt"
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[test,dev]'
	@# The authors' release, which tests compare with, asks for packages that nothing here needs: it comes without them.
	@$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --no-deps DALL-E
	@touch .venv/.base $@

# --- from nothing to a picture ----------------------------------------------------------------------------------------

# The commands below are what a user would type; on the CPU whatever the machine has, so that the result is the same.
demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: export DS_ACCELERATOR := cpu
demo: .venv/.base ## from nothing to pictures on a CPU: made data, both stages, samples, figures, a report (into DEMO)
	@if [ -e $(DEMO) ] && [ ! -e $(DEMO)/.demo ]; then \
		echo "error: $(DEMO) exists and is no earlier demo: choose another folder, make demo DEMO=..." >&2; exit 2; fi
	@rm -rf $(DEMO) && mkdir -p $(DEMO) && date +%s > $(DEMO)/.demo
	dalle-ds make-scenes $(DEMO)/scenes --two_object_fraction 0.1
	dalle-ds train-tokenizer --data $(DEMO)/scenes/train --out $(DEMO)/tokenizer.model --vocab_size 1024
	deepspeed --quiet --num_accelerators 2 launch/train_dvae.py --deepspeed_config ds_configs/cpu_dvae.json --preset tiny \
		--data.train $(DEMO)/scenes/train --data.validation $(DEMO)/scenes/validation --out $(DEMO)/dvae
	dalle-ds encode-images --dvae $(DEMO)/dvae --data $(DEMO)/scenes/train --out $(DEMO)/tokens/train
	dalle-ds encode-images --dvae $(DEMO)/dvae --data $(DEMO)/scenes/validation --out $(DEMO)/tokens/validation
	deepspeed --quiet --num_accelerators 2 launch/train_prior.py --deepspeed_config ds_configs/cpu_zero3.json --preset tiny \
		--tokenizer $(DEMO)/tokenizer.model --data.train $(DEMO)/tokens/train --data.validation $(DEMO)/tokens/validation \
		--out $(DEMO)/prior
	dalle-ds sample --prior $(DEMO)/prior --dvae $(DEMO)/dvae --out $(DEMO)/pictures \
		--temperature 0.5 --guidance 2 "a large red circle in the top left" \
		"a small blue star in the bottom right" "a green triangle above a yellow square"
	dalle-ds evaluate --prior $(DEMO)/prior --dvae $(DEMO)/dvae --data $(DEMO)/scenes/held_out \
		--temperature 0.5 --guidance 2
	dalle-ds report $(DEMO)/prior --dvae $(DEMO)/dvae
	@echo
	@echo "The report: $(abspath $(DEMO))/prior/report.html"
	@echo "The pictures: $(abspath $(DEMO))/pictures/grid.png ($$(( $$(date +%s) - $$(cat $(DEMO)/.demo) )) seconds after the set-up)"

# --- for who changes the code -----------------------------------------------------------------------------------------

test: .venv/.test ## all tests but those that need a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not gpu"

check: .venv/.test ## ruff, formatting, mypy --strict: changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test ## put layout and imports right
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: .venv/.test ## run every benchmark of benchmarks/ (two hours; those of a GPU say that they need one)
	@shopt -s nullglob; files=(benchmarks/*.py); \
		[ $${#files[@]} -gt 0 ] || echo "benchmarks/ holds no benchmark yet"; \
		for file in "$${files[@]}"; do echo "$(BIN)/python $$file"; $(BIN)/python "$$file" || exit; done

test-gpu: .venv/.test ## the tests that need a GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "error: torch finds no GPU here: run on a machine with one; dalle-ds doctor says more" >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu

clean: ## remove the demo, caches and build leftovers (.venv stays)
	@if [ -e $(DEMO)/.demo ]; then rm -rf $(DEMO); fi
	rm -rf .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
