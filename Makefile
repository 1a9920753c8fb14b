# make demo     train a small student from the zoo's teachers on a CPU and evaluate both: minutes; weights and images are here
# make reproduce  the paper's ablation with the zoo's teachers: hours on a CPU; IMAGES and TEST_IMAGES for more than the sample
# make test     every test
# make lint     ruff
# make bench    benchmarks (GPU rows are skipped without a GPU)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: env demo reproduce test lint bench

env: $(STAMP)

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: " + sys.executable + " is Python " + sys.version.split()[0] + "; kpu_fast needs 3.10 or newer: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	@touch $(STAMP)

demo: env
	rm -rf runs/demo
	$(BIN)/python -m kpu_fast.reproduce --runs kpu --seeds 1 --steps 200 --mosaics 800 --train-limit 1000 --test-limit 500 --out runs/demo

reproduce: env
	$(BIN)/python -m kpu_fast.reproduce $(if $(IMAGES),--images '$(IMAGES)') $(if $(TEST_IMAGES),--test-images '$(TEST_IMAGES)') --report docs/reproduction.md

test: env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: env
	$(BIN)/pytest bench/ --benchmark-only
