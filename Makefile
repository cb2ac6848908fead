# make train | test | test-parity | chaos | lint | lock | clean.  PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
PYTEST_ARGS ?=

.PHONY: train test test-parity chaos lint format lock clean
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(BIN)/python -m jaxmoe.train $(ARGS)

# Two processes: compiling, most of the time, uses little more than a core.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# Against transformers on torch's CPU side: about 2 GB to install, minutes to run.
test-parity: $(VENV)/installed-parity
	$(BIN)/python -m pytest -m parity -s tests/parity $(PYTEST_ARGS)

# Real runs of one and of two processes, killed KILLS times at random moments.
KILLS ?= 104
chaos: $(VENV)/installed
	JAXMOE_KILLS=$(KILLS) $(BIN)/python -m pytest -s -m slow tests/run/test_chaos.py $(PYTEST_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is written last: an install that was cut off is done again.
$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxmoe needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/installed-parity: $(VENV)/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[parity]'
	touch $@

# One lock for all: versions with markers, no host names. uv comes from the package index.
lock:
	$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet uv
	( echo "# Versions only: made by 'make lock' from pyproject.toml, for Python 3.11 and 3.12+ (environment markers)."; \
	  build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header \
	  --no-annotate --no-emit-index-url pyproject.toml ) > build/requirements.lock
	mv build/requirements.lock requirements.lock

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache
