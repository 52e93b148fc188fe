# Two commands are all a newcomer types:
#   make mini   set everything up, run four methods on the embedded scenario, print the table and draw the picture
#   make test   set everything up and pass every test that needs no GPU
# Every later command is .venv/bin/clk …

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := $(shell find csrc -type f)
RUNS   ?= runs/mini
SEED   ?= 0
ORDER  ?= I
UNIT   := "not interpreter and not aot and not slow"
METHODS := zero_shot,finetune,zscl,moe_adapters

.PHONY: install mini test lint test-together test-apart test-unit test-training test-interpreter test-aot test-install test-slow sanitize fuzz faults bench wheel clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel ninja pybind11 numpy

# torch comes first and alone: the build below compiles against it. --no-build-isolation keeps pip from fetching a second one.
$(STAMP): $(BIN)/python constraints.txt pyproject.toml setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[methods,triton,dev]"
	touch $@

mini: install
	$(BIN)/clk run --method $(METHODS) --scenario mini --order $(ORDER) --seed $(SEED) --output $(RUNS) --overwrite

# Two lanes side by side, about as long as each other, each one process at a time: most of the tests themselves, then the interpreter's;
# and those of training, which start processes and wait for them, then compilation for GPUs, and those of an installation of their own.
test: lint
	$(MAKE) --no-print-directory -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=line) test-together test-apart

test-together: install
	$(MAKE) --no-print-directory test-unit
	$(MAKE) --no-print-directory test-interpreter

test-apart: install
	$(MAKE) --no-print-directory test-training
	$(MAKE) --no-print-directory test-aot
	$(MAKE) --no-print-directory test-install

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cl_kernels python/cl_methods

test-unit: install
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -m $(UNIT) --ignore tests/training

test-training: install
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -m $(UNIT) tests/training

test-interpreter: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -m "interpreter and not slow"

test-aot: install
	$(BIN)/pytest -m "aot and not slow"

test-install: install
	bash tests/packaging/check_without_compiler.sh $(BIN)/python

# Slower checks, by hand: every method on several processes, the compiled kernels under sanitizers, many random cases, faults of every kind on every method, and
# how fast everything is.
CASES ?= 100000

test-slow: install
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/pytest -m slow

sanitize: install
	bash tests/packaging/check_sanitizers.sh $(BIN)/python

fuzz: install
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz/fuzz_cases.py --cases $(CASES)

faults: install
	folder=$$(mktemp -d) && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python tests/training/faults.py $$folder; \
	status=$$?; if [ $$status -eq 0 ]; then rm -r $$folder; else echo "what the runs left is in $$folder"; fi; exit $$status

bench: install
	$(BIN)/pytest -c benchmarks/pytest.ini benchmarks --benchmark-json=benchmark.json

wheel: install
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist

clean:
	rm -rf build dist *.egg-info cl_kernels/*.so cl_kernels/_build.json $(VENV)
