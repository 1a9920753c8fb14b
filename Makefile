# make demo     train a small student on a CPU: real photographs, no downloads of weights, minutes
# make test     every test
# make lint     ruff
# make bench    benchmarks (GPU rows are skipped without a GPU)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: env demo test lint bench

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: " + sys.executable + " is Python " + sys.version.split()[0] + "; kpu_fast needs 3.10 or newer: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	@touch $(STAMP)

demo: env
	rm -rf runs/random
	$(BIN)/python kpu_fast/train.py --config configs/random.json

test: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: env
	$(BIN)/pytest bench/ --benchmark-only
