# Every target sets up what it needs, once, in a virtual environment inside the checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH  := $(VENV)/.ready-for-benchmarks

.PHONY: demo test lint bench docs clean

demo: $(READY)
	$(BIN)/mergekit-cl demo

test: lint
	$(BIN)/pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCH)
	mkdir -p .benchmarks
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only --benchmark-json=.benchmarks/latest.json --timeout=1800
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json

docs: $(READY)  # write docs/methods, and the table of methods in README.md
	$(BIN)/python tests/test_documentation.py

# torch first, and pinned: the constraint keeps pip from choosing another build for a package that needs torch
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,flax,test,torch,triton]'
	touch $@

$(BENCH): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks demo-results
