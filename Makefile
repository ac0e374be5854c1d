# Two commands do everything: `make reproduce-table2` and `make test`. `make help` lists the rest.
PYTHON ?= python3
PROFILE ?= quick
SET ?=
BIN := .venv/bin
export REPLIB_SET := $(value SET)

.DELETE_ON_ERROR:
.PHONY: help setup reproduce weights list reports proofs figure bench bench-gpu lab test test-all check clean

## help                 this list
help:
	@grep '^## ' $(firstword $(MAKEFILE_LIST)) | sed 's/^## //'

## reproduce-ID         train what is missing and leave reports/ID-PROFILE.html
##                      [PROFILE=quick] [SET="key=value key=value"]
reproduce-%: .venv/ready
	@$(BIN)/python -m replib reproduce '$*' --profile '$(PROFILE)'

## reproduce            the same for several at once: TABLES="ID ID ..." [PROFILE=quick] [SET=...]
reproduce: .venv/ready
	@$(if $(TABLES),,echo 'TABLES is empty: say which, as TABLES="table2 table3"; make list has them.' >&2; exit 2)
	@$(BIN)/python -m replib reproduce $(TABLES) --profile '$(PROFILE)'

## weights              the trained networks of a table as files, in weights/: [TABLE=table2]
##                      [PROFILE=quick] [SET=...]; trains what is missing
TABLE ?= table2
weights: .venv/ready
	@$(BIN)/python -m replib weights '$(TABLE)' --profile '$(PROFILE)'

## list                 every table and figure of the papers: status, command; profiles
list: .venv/ready
	@$(BIN)/python -m replib list

## reports              render every page that has evidence; trains nothing
reports: .venv/ready
	@$(BIN)/python -m replib reports

## proofs               render the proofs and explanations: reports/proof-*.html, why-*.html
proofs: .venv/ready
	@$(BIN)/python -m replib proofs

## figure               draw README's picture again, from the published evidence
figure: .venv/ready
	@$(BIN)/python -m replib figure table2 --profile quick --out docs/table2-quick.png

## bench                measure speed and memory side by side, 12 minutes: reports/bench.html
##                      [CASES="a1/ cycle"] [FRESH=1]; killed, the same command goes on
bench: .venv/ready
	@$(BIN)/python -m replib bench --profile --budget-seconds 700 $(if $(CASES),--cases $(CASES)) $(if $(FRESH),--fresh)
	@$(BIN)/python -m replib reproduce bench

## bench-gpu            the same on a GPU, 9 minutes; torch and torchvision are all it needs
bench-gpu: .venv/ready
	@$(BIN)/python -m replib bench --device cuda --profile --budget-seconds 540 $(if $(FRESH),--fresh)
	@$(BIN)/python -m replib reproduce bench

## lab                  JupyterLab on the notebooks
lab: .venv/ready
	$(BIN)/jupyter lab notebooks

## test                 the fast tests
test: .venv/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

## test-all             all tests
test-all: .venv/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal

## check                formatting and lint
check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

## setup                the environment in .venv (done by the others when needed)
setup: .venv/ready
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; say which with PYTHON=/path/to/python3.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

## clean                forget this machine's runs and pages; published evidence stays
clean:
	rm -rf reports/runs reports/*.html .pytest_cache .ruff_cache .hypothesis
