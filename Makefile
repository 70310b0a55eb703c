# `make` lists the verbs. All of them work from a bare clone and keep what they install in .venv.

PYTHON ?= python3
VENV := .venv
# Extras of setup.cfg to install, such as EXTRAS=dev,peers to measure against other frameworks.
EXTRAS ?= dev
# Further arguments: of the experiment in `make demo`, of pytest in `make test`, of the benchmark in `make bench`.
ARGS ?=

comma := ,
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(subst $(comma),+,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench

help:
	@echo "make setup   create $(VENV) and install everything there (EXTRAS=dev,peers adds other frameworks)"
	@echo "make demo    train a humanoid to balance, and write curves, checkpoints and a video"
	@echo "make test    run the checks below, then every test"
	@echo "make check   lint, formatting, types, and which package imports which"
	@echo "make bench   measure steps per second against the number of environments, quickly"
	@echo
	@echo "setup is part of every other verb. ARGS=\"...\" passes arguments on: make demo ARGS=--help"

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "setup: $(PYTHON) was not found. Install Python 3.11 or newer (Debian: apt install python3 python3-venv)," \
	         "or name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "setup: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name a newer one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "setup: $(PYTHON) has no venv module. Install it (Debian: apt install python3-venv) and try again." >&2; \
	    exit 1; }
	@echo "setup: creating the virtual environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing rlcore[$(EXTRAS)] at the versions in constraints.txt (some minutes the first time)"
	@$(RUN) -m pip --disable-pip-version-check install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "setup: done"

demo: setup
	@echo "demo: training a humanoid to balance"
	$(RUN) -m experiments.ppo_humanoid_balance $(ARGS)

test: check
	@echo "test: running every test (leave out the slow ones: make test ARGS='-m \"not slow\"')"
	$(RUN) -m pytest -n auto --maxprocesses 8 $(ARGS)

check: setup
	@echo "check: lint"
	@$(RUN) -m ruff check .
	@echo "check: formatting"
	@$(RUN) -m ruff format --check .
	@echo "check: types"
	@$(RUN) -m mypy
	@echo "check: imports between packages"
	@$(RUN) -m pytest --durations=0 tests/test_imports.py

bench: setup
	@echo "bench: steps per second against the number of environments"
	$(RUN) -m benchmarks.throughput --quick $(ARGS)
