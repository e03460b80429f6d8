# Each target works on a fresh clone with only python3 (3.11+) and make.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
# Installed first and by itself: on a machine whose package index has a CPU build, that one is taken.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quick demo view study test slow fuzz bench bench-quality check lint help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("cratescope needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt -e '.[view]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt -e '.[dev,hub,view]'
	touch $@

quick: $(VENV)/installed ## explained neurons of two trained models that come with cratescope (about 3 minutes)
	$(BIN)/cratescope study studies/quick.toml --out quick
	$(BIN)/cratescope show zoo/crate-2l-seed3 0 74
	$(BIN)/cratescope show zoo/crate-2l-seed3 1 267
	$(BIN)/cratescope show zoo/gpt2-2l-seed3 1 479

demo: $(VENV)/installed ## train CRATE and GPT-2, explain and score their neurons, write a report (9 to 20 minutes)
	$(BIN)/cratescope study studies/demo.toml --out $(OUT)
	@echo 'Look around: make view, or $(BIN)/cratescope view $(OUT)/runs/*'

view: $(VENV)/installed ## browse the neurons of the demo, type text, steer, in the browser
	@test -d $(OUT)/runs || { echo '$(OUT): no runs there yet; make demo first'; exit 2; }
	$(BIN)/cratescope view $(OUT)/runs/* --open

study: $(VENV)/installed ## two seeds of both families and their untrained copies, for docs/results (hours)
	$(BIN)/cratescope study studies/paper-cpu.toml --out study

test: $(VENV)/installed-dev ## the tests
	$(BIN)/python -m pytest

$(VENV)/installed-sae: pyproject.toml # SAELens, in an environment of its own
	$(PYTHON) -m venv $(VENV)/sae
	$(VENV)/sae/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/sae/bin/python -m pip install --quiet --disable-pip-version-check '.[sae]'
	touch $@

slow: $(VENV)/installed-dev $(VENV)/installed-sae ## the slow tests: lm-eval on our models, Ray, SAELens in an environment of its own
	$(PIP) -c constraints.txt -e '.[eval,ray]'
	SAE_PYTHON=$(VENV)/sae/bin/python $(BIN)/python -m pytest -m slow

fuzz: $(VENV)/installed ## damaged files, odd options and odd servers: over 1,000 bad inputs (at most 10 minutes)
	$(BIN)/python benchmarks/fuzz.py

bench: $(VENV)/installed $(VENV)/installed-sae ## speed and memory, side by side: training, collecting, scoring, preparing, dictionaries
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/collect.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/sae.py --saelens $(VENV)/sae/bin/python

bench-quality: $(VENV)/installed ## planted neurons and dictionaries: how well the explainer, list-pmi, the measures and `sae` do (at most 10 minutes)
	$(BIN)/cratescope prepare offline --out $(OUT)/data --tokenizer bpe:4096 --max-megabytes 16 --validation 0.04 --heldout 0.12
	$(BIN)/python benchmarks/quality.py --data $(OUT)/data --out $(OUT)/quality
	$(BIN)/python benchmarks/planted_dictionary.py

lint: $(VENV)/installed-dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test ## what CI runs
