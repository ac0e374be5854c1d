# Two commands do everything: `make reproduce-table2` and `make test`. `make help` lists the rest.
PYTHON ?= python3
PROFILE ?= quick
TABLE ?= table2
SET ?=
LOCK ?= requirements.hashes
BIN := .venv/bin
export REPLIB_SET := $(value SET)
export REPLIB_EXECUTOR := $(value EXECUTOR)
export REPLIB_SLURM := $(value SLURM)

.DELETE_ON_ERROR:
.PHONY: help setup reproduce repeat weights list reports proofs figure bench bench-gpu latency lab test test-all \
	test-slurm test-faults fuzz test-wheel check hashes licences clean

## help                 this list
help:
	@grep '^## ' $(firstword $(MAKEFILE_LIST)) | sed 's/^## //'

## reproduce-ID         train what is missing and leave reports/ID-PROFILE.html
##                      [PROFILE=quick] [SET="key=value key=value"]
##                      [EXECUTOR=slurm [SLURM="partition=P time=MINUTES gpus=1"]]: on a cluster
reproduce-%: .venv/ready
	@$(BIN)/python -m replib reproduce '$*' --profile '$(PROFILE)'

## reproduce            the same for several at once: TABLES="ID ID ..." [PROFILE=quick] [SET=...]
reproduce: .venv/ready
	@$(if $(TABLES),,echo 'TABLES is empty: say which, as TABLES="table2 table3"; make list has them.' >&2; exit 2)
	@$(BIN)/python -m replib reproduce $(TABLES) --profile '$(PROFILE)'

## repeat               train cells a second time and compare, to the bit: [TABLE=table2] [PROFILE=quick]
##                      [ROWS="control official"] [SEEDS="0 1"]; nothing said: all that has evidence
repeat: .venv/ready
	@$(BIN)/python -m replib repeat '$(TABLE)' --profile '$(PROFILE)' $(if $(ROWS),--rows $(ROWS)) $(if $(SEEDS),--seeds $(SEEDS))

## weights              the trained networks of a table as files, in weights/: [TABLE=table2]
##                      [PROFILE=quick] [SET=...]; trains what is missing
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
	@$(BIN)/python -m replib figure table2 --profile cifar10-folder --out docs/table2-cifar10-folder.png

## bench                measure speed and memory side by side, 12 minutes: reports/bench.html
##                      [CASES="a1/ cycle"] [FRESH=1]; killed, the same command goes on
bench: .venv/ready
	@$(BIN)/python -m replib bench --profile --budget-seconds 700 $(if $(CASES),--cases $(CASES)) $(if $(FRESH),--fresh)
	@$(BIN)/python -m replib reproduce bench

## bench-gpu            the same on a GPU, 9 minutes; torch and torchvision are all it needs
bench-gpu: .venv/ready
	@$(BIN)/python -m replib bench --device cuda --profile --budget-seconds 540 $(if $(FRESH),--fresh)
	@$(BIN)/python -m replib reproduce bench

## latency              measure networks after training, 6 minutes: reports/latency.html
##                      [FRESH=1]; killed, the same command goes on
latency: .venv/ready
	@$(BIN)/python -m replib latency $(if $(FRESH),--fresh)
	@$(BIN)/python -m replib reproduce latency

## lab                  JupyterLab on the notebooks
lab: .venv/ready
	$(BIN)/jupyter lab notebooks

## test                 the fast tests
test: .venv/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

## test-all             all tests
test-all: .venv/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal

## test-slurm           the tests on a Slurm of their own, on this machine (docs/cluster.md)
test-slurm: .venv/ready
	REPLIB_TEST_SLURM=1 $(BIN)/python -m pytest -q -rs tests/test_slurm.py

## test-faults          kills, full disks, damaged files, two runs at once: 10 minutes
test-faults: .venv/ready
	REPLIB_KILLS=50 $(BIN)/python -m pytest -q -n 0 -m faults

## fuzz                 10,000 hostile inputs of every kind: params, notebooks, checkpoints, ...
fuzz: .venv/ready
	REPLIB_FUZZ=10000 $(BIN)/python -m pytest -q -n auto -m fuzz

## test-wheel           build the wheel, install it without the notebooks' packages, train with it
test-wheel: .venv/ready
	REPLIB_INDEX=1 $(BIN)/python -m pytest -q -n 0 tests/test_supply.py -k wheel

## check                formatting, lint, known vulnerabilities of what is locked
check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(BIN)/python .ci/audit.py

## hashes               requirements.hashes: the lock with the hash of every file; wants uv
hashes:
	@command -v uv >/dev/null || { echo 'uv is not here: pip install uv' >&2; exit 2; }
	uv pip compile --quiet --no-deps --generate-hashes --universal --python-version 3.12 \
		--no-annotate --no-header --output-file requirements.hashes requirements.lock

## licences             docs/licences.md: the licences of what is locked
licences: .venv/ready
	$(BIN)/python .ci/licences.py

## setup                the environment in .venv (done by the others when needed), every file checked
##                      by its hash; LOCK=requirements.lock takes what an index has built itself
setup: .venv/ready
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; say which with PYTHON=/path/to/python3.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

## clean                forget this machine's runs and pages; published evidence stays
clean:
	rm -rf reports/runs reports/*.html .pytest_cache .ruff_cache .hypothesis
