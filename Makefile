# Two commands: `make demo` and `make test`. Each makes its own .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export JAX_PLATFORMS ?= cpu
# The tests start many processes: each would compile all of our modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long soak soak-faults compilers clients serve lint proto clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m examples.demo

# Half of the quick tests' time is XLA compiling programs that run for milliseconds: here without what costs most of
# it, in test-long with all.
test: $(VENV)/.installed lint
	XLA_FLAGS="$${XLA_FLAGS-$$($(BIN)/python tests/quick_xla_flags.py)}" $(BIN)/python -m pytest -n 3 --dist loadfile -m 'not long and not compilers and not clients' tests

test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -n 3 --dist worksteal -m long tests

# Half an hour of more than a server can do, while everything around it changes; `make soak MINUTES=5` is shorter.
# On a busy machine it takes up to ten minutes more; the last line says how it went.
MINUTES ?= 30
soak: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python tests/serving/soak.py --minutes $(MINUTES)

# Faults drawn from a seed, over four agents under load.
FAULTS ?= 1000
SEED ?= 0
soak-faults: $(VENV)/.installed
	$(BIN)/python -m bench faults --faults $(FAULTS) --seed $(SEED)

# All that wants the compilers of absent chips, the kernels' cycles first; an environment of its own, so that
# `make test` is as quick as without them.
compilers:
	$(PYTHON) -m venv $(VENV)-compilers
	$(VENV)-compilers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,compile]'
	$(VENV)-compilers/bin/python -m pytest -m 'not long' tests/pallas_kernels/test_cycles.py tests/parallel/test_compile_check.py
	$(VENV)-compilers/bin/python -m pytest -n 2 tests/pallas_kernels/test_mosaic_gpu_compiles.py
	$(VENV)-compilers/bin/python -m pytest -m compilers tests/bench

# Clients as others publish them, against the server, and the chat templates of published packages; an environment
# of its own, since what they need is much.
clients:
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' openai langchain-openai 'lm-eval[api]' 'tritonclient[grpc]' guidellm
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps trl axolotl
	$(VENV)-clients/bin/python -m pytest -m clients tests/clients

serve: $(VENV)/.installed
	$(BIN)/python -m examples.demo --serve_only

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

proto:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[proto]'
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. serving/v1/jblock.proto
	$(BIN)/python -m grpc_tools.protoc -I. --descriptor_set_out=serving/open_inference/inference.binpb serving/open_inference/inference.proto

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run
