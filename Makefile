# Needs Python 3.11 or newer; choose another with `make test PYTHON=python3.12`.
#
# On Windows type instead, in this folder:
#   py -m venv .venv
#   .venv\Scripts\pip install -e .[trainer,dev] -c constraints.txt
#   .venv\Scripts\python -m trajectory_consistency.trainer.demo --out demo-out     (for make demo)
#   .venv\Scripts\pytest                                    (for make test)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench bench-quality

demo: $(INSTALLED)
	$(BIN)/python -m trajectory_consistency.trainer.demo --out demo-out

# The host and the demo work on all cores, and so by themselves.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --ignore tests/host --ignore tests/demo/test_demo.py
	$(BIN)/pytest tests/host tests/demo/test_demo.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Takes a quarter of an hour, wants the machine for itself, and a ComfyUI. Other packs are compared with where
# PEERS="--pack JettHu=FOLDER --pack dfl=FOLDER --pack licyk=FOLDER" says where their clones are.
bench: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/bench/nodes.py --out bench-out/nodes.md
	$(BIN)/python tests/bench/peers.py --out bench-out/peers.md $(PEERS)
	$(BIN)/python tests/bench/training_step.py --out bench-out/training.md

# Takes two to three hours on two cores; what is done already is in bench-out/quality, and is not done again.
bench-quality: $(INSTALLED)
	$(BIN)/pip install -e '.[bench]' -c constraints.txt
	$(BIN)/python tests/bench/quality --results bench-out/quality --write

# The host loads this folder as one package, and so must mypy, whatever the folder is called: hence the link.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[trainer,dev]' -c constraints.txt
	mkdir -p .venv/packs
	ln -sfn ../.. .venv/packs/trajectory_consistency
	touch $@
