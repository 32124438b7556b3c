# Two commands matter: `make quickstart` and `make test`. Both make .venv and install what they need first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN ?= quickstart-$(shell date +%Y%m%d-%H%M%S)
# One thread per worker: two workers that both want all cores wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# The site's own extensions (formulas, tables of options) are in docs/.
SITE = PYTHONPATH=docs OMP_NUM_THREADS=1 $(BIN)/zensical

.DEFAULT_GOAL := help
.PHONY: help quickstart study test test-all test-long test-oldest lint docs docs-serve format clean dist

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/installed  ## Train, test and look at a small translation model on data made on the spot
	$(BIN)/python train.py fit -c configs/miniature/translation.yaml --run.name $(RUN)
	$(BIN)/python train.py test -c checkpoints/translation/$(RUN)/config_fit.yaml \
	  --ckpt_path checkpoints/translation/$(RUN)/best.ckpt

# Cells of a study: its file and axis. The same command without --only trains all others beside them.
run_cells = $(BIN)/python train.py study run configs/studies/$(1)_miniature.yaml --jobs 2 --yes --only seed=0 \
  $(addprefix --only $(2)=,none 0010 1111 deformable_0010)

study: .venv/installed  ## Compare four attentions in three tasks, on data made on the spot, within an hour; write a report
	$(call run_cells,figure_3a,attention)
	$(call run_cells,figure_3b,attention)
	$(call run_cells,figure_3c,self_attention)
	$(BIN)/python train.py study report $(foreach panel,a b c,configs/studies/figure_3$(panel)_miniature.yaml)

test: lint  ## Lint, check types, and run the tests that take minutes
	$(PYTEST)

test-all: lint  ## The same with the slow tests
	$(PYTEST) -m "not long"

test-long: .venv/installed-dev  ## Kills, damaged inputs: an hour or so, with results to read; not a part of CI
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -s tests/long tests/study

# Without the tests of the kernels in Triton's interpreter, of reports in a browser, and of what needs minutes.
OLDEST = tests/attention tests/networks tests/metrics tests/tasks tests/datamodules tests/cli tests/test_package.py

test-oldest: .venv-oldest/installed  ## Run most tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal --ignore tests/attention/kernels $(OLDEST)

dist: .venv/installed-dev  ## Build the wheel and the source archive into dist/
	$(BIN)/python -m hatchling build -d dist

lint: .venv/installed-dev docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --no-warn-unreachable lightning_attn
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .

docs: .venv/installed-dev  ## Build the documentation site, site/index.html
	$(SITE) build --strict --clean

docs-serve: .venv/installed-dev  ## Show the site while its pages are written
	$(SITE) serve

format: .venv/installed-dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and caches, never runs or data
	rm -rf .venv .venv-oldest build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[miniature]"
	touch $@

.venv/installed-dev: .venv/created pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .venv/installed

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	python3.11 -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[dev]"
	touch $@
