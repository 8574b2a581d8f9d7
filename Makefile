# Everything on a fresh machine (Linux, macOS) with Python >= 3.10:   make demo   |   make test
# Another PyTorch than the one pinned in constraints.txt:             make TORCH=torch==2.9.0 demo
# Linux without a GPU, PyTorch's smaller CPU build:                   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
BIN := .venv/bin
RUN := runs/toy
SEED ?= 0
# one process per core, each with one thread: the tensors of the tests are too small for two
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test quick coverage lint clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	sed 's/^torch==.*/$(TORCH)/' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable ".[plot,hf,bench,judge,dev]"
	touch $@

demo: .venv/.installed
	$(BIN)/python train_sft.py --data toy --out $(RUN)/sft --overwrite --seed $(SEED)
	$(BIN)/python train_dpo.py --data toy --init $(RUN)/sft --out $(RUN)/dpo --overwrite --seed $(SEED)
	$(BIN)/python -m experiments.evaluate --policy $(RUN)/dpo --reference $(RUN)/sft --data toy --reward toy --samples-per-prompt 4 --max-new-tokens 96 --seed $(SEED) --json $(RUN)/evaluation.json
	@echo "curves: $(RUN)/dpo/curves.png   report: $(RUN)/dpo/report.md"

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST)

# the mathematics, the data and the loop
quick: .venv/.installed
	$(PYTEST) tests/test_loss.py tests/test_theory.py tests/test_data.py tests/test_house.py tests/test_invariants.py

coverage: .venv/.installed
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --ignore=tests/test_mistakes.py  # which runs broken copies
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .venv
