# Two commands: `make reproduce` and `make test`. Nothing need be installed before but Python >= 3.11.
# Before a large run: `make plan SCALE=paper`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: reproduce plan keep test test-all faults lint

# what config.yaml says (another scale, some papers: make reproduce SCALE=bench PAPERS="fst ims"): installs on first use, downloads
# data, reports
reproduce: $(VENV)/.installed
	$(BIN)/snakemake --cores all $(if $(SCALE),--config scale=$(SCALE)) $(if $(PAPERS),-- $(PAPERS))

# what a scale takes, before anything is run: jobs, and hours where such jobs were measured (PAPERS="fst ims", CORES=8)
plan: $(VENV)/.installed
	$(BIN)/python -m cupel.plan $(if $(SCALE),--scale $(SCALE)) $(if $(PAPERS),--papers $(PAPERS)) $(if $(CORES),--cores $(CORES))

# what is kept of a scale that was run (make keep SCALE=desk): numbers, verdicts, tables, figures, and of each cell the small files, from
# which a later run goes on: tar -xf docs/results/desk/cells.tar.xz
keep: KEPT = docs/results/$(SCALE)
keep:
	mkdir -p $(KEPT)
	cp results/$(SCALE)/cells.parquet results/$(SCALE)/claims.csv results/$(SCALE)/provenance.json $(KEPT)
	cd results/$(SCALE)/papers && find . \( -name "*.csv" -o -name "*.md" -o -name "*.svg" \) -exec cp --parents {} "$(CURDIR)/$(KEPT)" \;
	find results/$(SCALE) -name work -prune -o \( -name metrics.json -o -name history.csv -o -name trigger.npz \
	-o -name filters.json -o -name base.json -o -name layers.csv -o -name template_triggered.jsonl \) -print \
	| sort | tar -cJf $(KEPT)/cells.tar.xz -T -

# what every change must pass
test: $(VENV)/.installed lint
	$(BIN)/pytest -m "not slow and not faults"

# also the tests that take long
test-all: $(VENV)/.installed lint
	$(BIN)/pytest -m "not faults"

# runs broken on purpose, an hour on 2 cores, also in parts (pytest tests/faults/test_kills.py): kills, full disks, bad files, hostile programs; writes docs/results/faults.md
faults: $(VENV)/.installed
	$(if $(CUPEL_KILLS),CUPEL_KILLS=$(CUPEL_KILLS)) $(BIN)/pytest -m faults tests/faults

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check . 2> /dev/null
	$(BIN)/snakemake --lint > /dev/null

$(VENV)/.installed: pyproject.toml envs/constraints.txt
	@case "$(VENV)" in /*) path="$(VENV)";; *) path="$$PWD/$(VENV)";; esac; case "$$path" in *[!A-Za-z0-9_@%+=:,./-]*) \
	echo "Snakemake cannot run Python from a path with a space, a quote or the like: $$path"; \
	echo "Move this folder, or have the environment elsewhere: make reproduce VENV=/a/plain/path"; exit 1;; esac
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c envs/constraints.txt -e ".[$(EXTRAS)]"
	touch $@
