# make demo     compile a real language model, end to end, and show what it cost and lost
# make test     lint, types and tests
# make lint     lint and types only
# make test-triton  the CUDA kernels in Triton's interpreter, in an environment of their own of 1 GB more
# make bench-X  benchmarks/X.py, ours beside a peer
# make consumers  what we export, loaded by GPTQModel, in an environment of its own (built from source: minutes)
# make clean    remove the environments and the caches; run folders stay

PYTHON ?= python3
# More flags of `python -m venv`; --system-site-packages keeps a torch that is already installed.
VENV_FLAGS ?=
# Where PyTorch's CPU or CUDA builds are, where the default index has not the one that is wanted.
TORCH_INDEX_URL ?=
# Exact versions; empty: anything in the ranges of pyproject.toml.
CONSTRAINTS ?= constraints.txt
# Test processes.
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
TRITON := .venv-triton
PIP = $(BIN)/python -m pip install $(addprefix -c ,$(CONSTRAINTS))
STAMP := $(VENV)/installed

# GPTQModel pins other versions than ours, so it has its own environment; torch is the one of the constraints file.
CONSUMERS := .venv-consumers
CONSUMERS_PIP := $(CONSUMERS)/bin/python -m pip install

.PHONY: demo test test-triton lint consumers clean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/qlora-pipe run examples/smollm2.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: more threads than cores is what makes torch slow.
test: lint
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Beside the other environment, whose packages it sees.
test-triton: $(STAMP)
	$(BIN)/python -m venv $(TRITON)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$($(TRITON)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	$(TRITON)/bin/python -m pip install --no-deps 'triton>=3.4'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(TRITON)/bin/python -m pytest tests/kernels

# GPTQModel wants at least two workers, and on two cores gives itself one.
consumers: $(CONSUMERS)/installed
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_NUM_THREADS=1 GPTQMODEL_CPU_WORKERS=2 \
		$(CONSUMERS)/bin/python -m pytest tests/consumers/test_gptqmodel.py

bench-%: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/$*.py $(ARGS)

# The stamp comes last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX_URL)) torch
	$(PIP) -e '.[dev]'
	$(BIN)/python -m pip install --no-deps -r requirements-data.txt
	touch $@

$(CONSUMERS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) $(CONSUMERS)
	$(CONSUMERS_PIP) $(addprefix --extra-index-url ,$(TORCH_INDEX_URL)) $(shell grep '^torch==' constraints.txt)
	$(CONSUMERS_PIP) -e '.[dev,gptq]'
	touch $@

clean:
	rm -rf $(VENV) $(TRITON) $(CONSUMERS) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
