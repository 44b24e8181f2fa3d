# Everything runs in a virtual environment of its own, made on first use. PYTHON=... names the interpreter to make it with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test test-triton test-oldest sass ptx sanitize fuzz lint docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## the main job on real weights: half a minute on a CPU once installed
	$(BIN)/python -m hybrid_mxfp8 demo

test: $(VENV)/.ready ## all tests: interpreted, compiled, and on the GPU if there is one
	.ci/test $(BIN)

# A GPU machine's environment keeps the Triton that belongs to its PyTorch.
TRITON ?= 3.6.0
test-triton: ## all tests with another Triton on the CPU, in an environment of its own: TRITON=3.6.0
	TRITON=$(TRITON) .ci/venv .venv-triton-$(TRITON)
	.ci/test .venv-triton-$(TRITON)/bin

test-oldest: ## all tests with the oldest versions that pyproject.toml allows, PyTorch aside
	TRITON=3.6.0 CONSTRAINTS=.ci/oldest.txt .ci/venv .venv-oldest
	.ci/test .venv-oldest/bin

SASS := HYBRID_MXFP8_TEST_CONFIGS=all HYBRID_MXFP8_CACHE_DIR=$(CURDIR)/build/cache/hybrid_mxfp8
sass: $(VENV)/.ready ## compile and check every kernel of the CUTLASS backend: an hour on two cores; table in docs
	$(SASS) $(BIN)/pytest -q -n 2 tests/codegen/test_cutlass_sass.py
	$(SASS) PYTHONPATH=tests/support $(BIN)/python tests/codegen/test_cutlass_sass.py

# Options of tests/ptx/suite.py: PTX="--only triton --match TEXT --out FOLDER".
PTX ?=
ptx: $(VENV)/.ready ## run every kernel's PTX in an emulator, with no GPU: an hour on two cores; report in bench/results
	$(BIN)/python tests/ptx/suite.py $(PTX)

# SEED=... of a find's line reproduces it; further options of tests/support/fuzz.py in FUZZ.
MINUTES ?= 30
SEED ?=
FUZZ ?=
fuzz: $(VENV)/.ready ## random sequences of calls, all backends compared, on all cores or the GPU: MINUTES=30 SEED=...
	$(BIN)/python tests/support/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(FUZZ)

# Options of tests/support/sanitize.py: SANITIZE="--jobs 8 --tools memcheck --out FOLDER".
SANITIZE ?=
sanitize: $(VENV)/.ready ## on a GPU: every kernel under compute-sanitizer's four tools; report in bench/results
	$(BIN)/python tests/support/sanitize.py $(SANITIZE)

lint: $(VENV)/.ready-lint ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	.ci/typecheck $(BIN)

# The pages keep their places, so that links from one to another lead where they lead in the repository.
PAGES := README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs examples bench/README.md bench/results
docs: $(VENV)/.ready-docs ## the documentation as a site, build/site/index.html; a broken link or an undocumented name fails
	$(BIN)/pytest -q tests/project/test_docs.py -k api_page
	rm -rf build/pages && mkdir -p build/pages
	tar -cf - $(PAGES) | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and everything built
	rm -rf $(VENV) .venv-triton-* .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Again when the package's metadata changes; the stamp keeps later runs from reinstalling.
$(VENV)/.ready: pyproject.toml .ci/venv
	.ci/venv $(VENV)
	touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	$(BIN)/pip install -q --ignore-installed ruff==0.17.6 mypy==2.4.1
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/pip install -q -e '.[docs]'
	touch $@
