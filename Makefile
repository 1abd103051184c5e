# make demo   the whole story on a drawn dataset, on any machine
# make test   the tests; make test-all: those too that kill and damage by the hundred
# Each makes .venv if it is missing and installs what it needs.

PYTHON ?= python3
BIN = .venv/bin
DEMO = --data_root sample --runs runs/demo --wandb disabled

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/python baseline_eval.py $(DEMO) --architecture tiny --name before
	$(BIN)/python train.py $(DEMO) --architecture tiny --epochs 26 --lr 1e-3 --name train
	$(BIN)/python baseline_eval.py $(DEMO) --architecture runs/demo/train --name after \
		--compare runs/demo/before
	@echo "training curve:   runs/demo/train/curve.png"
	@echo "confusion matrix: runs/demo/after/confusion.png (before: runs/demo/before/confusion.png)"
	@echo "mistakes:         runs/demo/after/mistakes.png"
	@echo "the page:         $(BIN)/streamlit run web.py -- --data_root sample --runs runs/demo"

# One process a core, one thread a process: threads of several processes would wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test: .venv/ready-dev
	$(PYTEST)

test-all: .venv/ready-dev
	$(PYTEST) -m "slow or not slow"

# One table of ratios against the peers: 35 minutes on two cores that do nothing else.
# BEFORE=PATH: a checkout of an older commit, for the rows of what starting costs.
DATA_ROOT ?= sample
bench: .venv/ready-dev
	$(BIN)/python benchmarks/table.py --data_root $(DATA_ROOT) $(if $(BEFORE),--before $(BEFORE))

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-qwen.txt requirements-4bit.txt requirements-openclip.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all bench lint
