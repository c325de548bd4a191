# Everything runs in .venv, made on first use from requirements.lock. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Small models: one thread a process is the fastest and the most repeatable setting.
export OMP_NUM_THREADS ?= 1
# Threads that wait must not spin: on a busy machine that costs ten times the work itself.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help book test lint bench refresh lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qgen-lab needs Python 3.11 or newer; say which with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[book,test,vision]'
	touch $@

book: $(READY)  ## build the book into _build/html, warnings are errors
	rm -rf _build/html _build/.doctrees
	$(BIN)/jupyter-book build . --warningiserror --nitpick --keep-going
	@echo "Open file://$(CURDIR)/_build/html/index.html"

test: $(READY)  ## unit tests, every chapter through nbval, the built book in a browser
	$(BIN)/python -m pytest tests --ignore tests/browser
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 300 book
	$(BIN)/python -m pytest tests/browser

lint: $(READY)  ## style and the one-way imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(READY)  ## benchmark tables
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

refresh: $(READY)  ## re-execute every chapter and store its outputs in place
	$(BIN)/python book/refresh.py

lock:  ## pin every dependency anew; TORCH and TORCHVISION name the pair to pin
	rm -rf _build/lock && $(PYTHON) -m venv _build/lock
	_build/lock/bin/pip install torch==$(or $(TORCH),2.13.0) torchvision==$(or $(TORCHVISION),0.28.0) --editable '.[book,test,cluster,corruptions,vision]'
	_build/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove what was built, and .venv
	rm -rf _build .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache qgen_lab.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
