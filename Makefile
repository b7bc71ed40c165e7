# Needs Python 3.11 or newer; choose another with `make test PYTHON=python3.12`.
#
# On Windows type instead, in this folder:
#   py -m venv .venv
#   .venv\Scripts\pip install -e .[trainer,dev] -c constraints.txt
#   .venv\Scripts\python -m trainer.demo --out demo-out     (for make demo)
#   .venv\Scripts\pytest                                    (for make test)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint

demo: $(INSTALLED)
	$(BIN)/python -m trainer.demo --out demo-out

test: lint
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The host loads this folder as one package, and so must mypy, whatever the folder is called: hence the link.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[trainer,dev]' -c constraints.txt
	mkdir -p .venv/packs
	ln -sfn ../.. .venv/packs/trajectory_consistency
	touch $@
