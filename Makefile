# `make help` says what there is. Everything runs in .venv, which the first target that needs it sets up.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
LONG := ^(cifar10|first_run|multi_label|own_policy|photos|warm_start|when_it_does_not_help|which_policy)\.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint check links wheel notebooks nightly unit quick test-compat hooks release matrix bench \
  bench-photos bench-policies bench-self-training torture outputs docs pages readme export format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'fixmatch_fastai needs Python 3.10 or newer: name one, for example `make PYTHON=python3.12`.' >&2; exit 1; }
	@echo 'Setting up .venv (the first time takes some minutes: torch is large) ...'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY) ## Train on digits with and without unlabelled images; options in ARGS, as in ARGS="--seeds 5"
	@$(BIN)/fixmatch_demo $(ARGS)

test: lint check links wheel notebooks unit ## Everything below that checks, one after another, to the first failure

lint: $(READY) ## Check the code with ruff
	@echo '--- style'
	@$(BIN)/ruff check --quiet

check: $(READY) ## Check that modules, pages and versions are in step with the notebooks
	@echo '--- modules, pages and versions in step with the notebooks'
	@$(BIN)/python tools/check.py

links: $(READY) ## Build the site elsewhere; a link that leads nowhere is an error
	@echo '--- links'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

wheel: $(READY) ## Build the package, install it elsewhere and import it
	@echo '--- wheel'
	@$(BIN)/python tools/check_wheel.py

notebooks: $(READY) ## Run the notebooks, but for the long tutorials
	@echo '--- notebooks'
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2 --skip-file-re '^[_.]|$(LONG)'

nightly: $(READY) ## Run the notebooks that `make notebooks` leaves out because they take long
	@OMP_NUM_THREADS=1 $(BIN)/nbdev-test nbs/tutorials --n-workers 2 --file-re '$(LONG)'

unit: $(READY) ## Run the tests in tests/
	@echo '--- tests'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

quick: $(READY) ## Run one case of each test that is not slow, in two minutes or so
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m quick

test-compat: $(READY) ## Run the tests with Kaggle's and Colab's versions; options ENV=kaggle, ARGS for pytest
	@OMP_NUM_THREADS=1 $(BIN)/python tools/compat.py $(ENV) -- $(ARGS)

matrix: $(READY) ## Train FixMatch beside everything in the compatibility matrix, and write its page (5 minutes)
	@$(BIN)/python tools/matrix_page.py $(ARGS)

bench: $(READY) ## Measure views, steps, memory, growth (15 minutes on one core); ARGS="--device cuda"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py $(ARGS)

bench-photos: $(READY) ## Measure a pool's worth to a pretrained network (a night); ARGS="--images A B --weights FILE"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/photos.py $(ARGS)

bench-policies: $(READY) ## Measure every policy (an hour on two cores); ARGS="--images cifar10/train --labels 250"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/policies.py $(ARGS)

bench-self-training: $(READY) ## Measure self-training beside FixMatch (an hour); ARGS="--only 'Noisy Student'"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/self_training.py $(ARGS)

torture: $(READY) ## Try to lose work: kill -9, Ctrl-C, damaged files, full disks (8 minutes); ARGS="--only kill"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py $(ARGS)

outputs: $(READY) ## Run all notebooks in Jupyter and save what they show
	@OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
	  $$(find nbs -name '*.ipynb' -not -path '*/.*')
	@$(BIN)/nbdev-clean

docs: pages ## Write the pages in docs/ and README.md, and build the site in _site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'The site is in _site/index.html'

pages: $(READY) # the part of `docs` that is committed
	@$(BIN)/python tools/docs.py

readme: $(READY) ## Write README.md alone
	@$(BIN)/python tools/docs.py --readme

export: $(READY) ## Clean the notebooks and write the modules from them
	@$(BIN)/nbdev-clean
	@$(BIN)/nbdev-export

format: $(READY) ## Format what is written by hand: setup.py, tools/, tests/ and benchmarks/
	@$(BIN)/ruff check --quiet --select I --fix setup.py tools tests benchmarks
	@$(BIN)/ruff format setup.py tools tests benchmarks

hooks: $(READY) ## Have git clean and merge notebooks, and, where pre-commit is installed, check each commit
	@$(BIN)/nbdev-install-hooks
	@if command -v pre-commit >/dev/null; then pre-commit install; \
	  else echo 'There is no pre-commit: `pip install pre-commit` and `make hooks` for checks before each commit.'; fi

release: ## Run everything that is checked, build sdist and wheel in dist/, and print how to upload them
	@git diff --quiet HEAD || { echo 'There are changes without a commit: commit them before a release.' >&2; exit 1; }
	@$(MAKE) --no-print-directory test
	@$(BIN)/python tools/check_wheel.py --keep dist

clean: ## Remove what can be built again; .venv stays
	@rm -rf build dist _site _proc ./*.egg-info .pytest_cache .ruff_cache
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
