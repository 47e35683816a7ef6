# Two commands: `make reproduce` and `make test`. Nothing need be installed before but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
SCALE ?= demo
BIN := $(VENV)/bin

.PHONY: reproduce test test-all lint

# the results of SCALE: installs on first use, downloads data, ends by saying where the report is
reproduce: $(VENV)/.installed
	$(BIN)/snakemake --cores all --config scale=$(SCALE)
	@echo "The report: $(CURDIR)/results/$(SCALE)/index.html"

# what every change must pass
test: $(VENV)/.installed lint
	$(BIN)/pytest -m "not slow"

# also the tests that take long
test-all: $(VENV)/.installed lint
	$(BIN)/pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check . 2> /dev/null
	$(BIN)/snakemake --lint > /dev/null

$(VENV)/.installed: pyproject.toml envs/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c envs/constraints.txt -e ".[dev]"
	touch $@
