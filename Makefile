# Each target does the whole set-up on a fresh machine: a .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
export PYTHONDONTWRITEBYTECODE = 1

.PHONY: help setup demo test check

help:
	@echo "make demo   sweep generated data, fill a run database, draw the trade-off (under 5 minutes)"
	@echo "make test   the test suite"
	@echo "make check  formatting, lint, types, import directions, spelling, compose file, Dockerfile"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/srsweep generate --users 3000 --items 5000 --out demo/data/demo --overwrite
	$(BIN)/srsweep launch grids/demo.yaml --data-dir demo/data --db sqlite:///demo/runs.db
	$(BIN)/srsweep runs --db sqlite:///demo/runs.db --sort ndcg_at_10 --limit 5
	$(BIN)/srsweep report --db sqlite:///demo/runs.db --out demo/report

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint Dockerfile
