PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/tl-3.9.txt
RUN = $(VENV)/bin

.PHONY: help install demo notebooks docs test shapes slow long lint types check clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /'

install: $(VENV)/.installed  ## make the virtual environment and install everything into it

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(RUN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: install  ## forget a topic of the embedded world with each method and make a page of it (two to three minutes)
	$(RUN)/mrp-lens demo --out runs/demo --overwrite

notebooks: install  ## start Jupyter on the notebooks
	$(RUN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[notebooks]'
	$(RUN)/jupyter notebook notebooks

docs: install  ## build the documentation site into site/, with strict links; its pictures are drawn from the demo model
	$(RUN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict

test: install  ## the test suite (without the tests marked slow), a process a core
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "not slow" -n auto --dist loadfile

shapes: install  ## the tests of metrics, data and training with the shape of every tensor checked at run time
	MRP_LENS_CHECK_SHAPES=1 OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "not slow" -n auto --dist loadfile tests/data tests/metrics tests/training

slow: install  ## the tests that take longer: the demo, the notebooks, killed sweeps, pages in a browser, half precision
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "slow and not long" -n auto --dist worksteal --timeout 900

long: install  ## the tests for the day of a release: what continuous integration leaves out of both model classes, more kills, more methods
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m long -n auto --dist worksteal --timeout 900

lint: install  ## linter and formatter, checking only
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: install  ## type checker
	$(RUN)/mypy

check: lint types test  ## all of the above

clean:  ## remove environments, runs and caches
	rm -rf .venv .venv-tl4 runs site .docs_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
