# Needs Python 3.11 or newer; choose another with `make test PYTHON=python3.12`.
#
# On Windows, run in this folder instead:
#   py -m venv .venv
#   .venv\Scripts\pip install -e ".[trainer,dev]" -c constraints.txt
#   .venv\Scripts\python -m trajectory_consistency.trainer.demo --out demo-out    (make demo)
#   .venv\Scripts\pytest                                                            (the tests of make test)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint fuzz kills bench bench-counted bench-gpu bench-quality teacher

demo: $(INSTALLED)
	$(BIN)/python -m trajectory_consistency.trainer.demo --out demo-out

# Two processes of one thread each, as most tests keep one core busy. In the second group each process starts its own
# ComfyUI, and the demo comes first, because it takes longest. tests/engine has its own environment.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/host --ignore tests/demo/test_demo.py
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/demo/test_demo.py tests/host
	$(BIN)/python tests/engine -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Reads 10,000 mangled files, in about five minutes on one core. `make test` has a short version.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz

# Kills runs fifty times, in every phase, and compares each result with a run that was never killed, in three minutes.
kills: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py

# Takes a quarter of an hour and needs ComfyUI; run nothing else meanwhile. To compare with other packs, pass the folders
# of their clones: PEERS="--pack JettHu=FOLDER --pack dfl=FOLDER --pack licyk=FOLDER".
bench: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/bench/nodes.py --out bench-out/nodes.md
	$(BIN)/python tests/bench/peers.py --out bench-out/peers.md $(PEERS)
	$(BIN)/python tests/bench/training_step.py --out bench-out/training.md
	$(BIN)/python tests/bench/host_step.py --out bench-out/host_training.md

# Counts the work of a step of models in full size, in two minutes, without a GPU.
bench-counted: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/bench/counted --out bench-out/counted.md

# Takes eight minutes on one GPU. The parts that train ComfyUI's models need its packages: for these, run the script by the
# interpreter in .venv-comfyui, or by ComfyUI's own with the trainer installed.
bench-gpu: $(INSTALLED)
	mkdir -p bench-out
	$(BIN)/python tests/bench/gpu --out bench-out/gpu.json

# Takes two to three hours on two cores. Results are kept in bench-out/quality; a second call computes only missing ones.
bench-quality: $(INSTALLED)
	$(BIN)/pip install -e '.[bench]' -c constraints.txt
	$(BIN)/python tests/bench/quality --results bench-out/quality --write

# Trains the demo's tiny model anew, from nothing, in about 70 minutes on two cores.
TEACH := $(BIN)/python -m trajectory_consistency.trainer.tiny.teach
teacher: $(INSTALLED)
	$(TEACH) --out trainer/tiny/tiny-sd.safetensors
	$(TEACH) --start trainer/tiny/tiny-sd.safetensors --seed 1 --lr 1e-3 --unet-steps 10000 \
		--out trainer/tiny/tiny-sd.safetensors

# ComfyUI loads this folder as one package. The link lets mypy do the same, under one name, whatever the folder's name is.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[trainer,dev]' -c constraints.txt
	mkdir -p .venv/packs
	ln -sfn ../.. .venv/packs/trajectory_consistency
	touch $@
