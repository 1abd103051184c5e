# make demo: the whole story on a drawn dataset, on any machine.   make test: the tests (test-all: the slow ones too).   All make .venv when it is missing.
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/python baseline_eval.py --data_root sample --architecture tiny --runs runs/demo --name before --wandb disabled
	$(BIN)/python train.py --data_root sample --architecture tiny --epochs 26 --lr 1e-3 --runs runs/demo --name train --wandb disabled
	$(BIN)/python baseline_eval.py --data_root sample --architecture runs/demo/train --runs runs/demo --name after --compare runs/demo/before --wandb disabled
	@echo "training curve:   runs/demo/train/curve.png"
	@echo "confusion matrix: runs/demo/after/confusion.png (before: runs/demo/before/confusion.png)"
	@echo "mistakes:         runs/demo/after/mistakes.png"

test: .venv/ready-dev
	$(BIN)/python -m pytest -q

test-all: .venv/ready-dev
	$(BIN)/python -m pytest -q -m "slow or not slow"

# one table of ratios against the peers, half an hour on two cores that do nothing else
DATA_ROOT ?= sample
bench: .venv/ready-dev
	$(BIN)/python benchmarks/table.py --data_root $(DATA_ROOT)

lint: .venv/ready-dev
	$(BIN)/ruff check .

.venv/ready: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt requirements-qwen.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all bench lint
