# Every target does all its own set-up, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint docs clean

# Train a Tf-FD student on handwritten digits, export it, load the export with timm and evaluate it. No network data.
quickstart: .venv/installed
	$(BIN)/accelerate launch -q --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/train_cifar100.py quickstart
	$(BIN)/python -m tffd_zoo.eval local-dir:runs/quickstart-tffd_resnet20-s0/export --data digits --split test

test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The API reference, into build/docs.
docs: .venv/installed
	$(BIN)/pdoc --docformat google --output-directory build/docs tffd_zoo

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
