# The two commands: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/digits

.PHONY: demo test bench gpu aot lint clean

# Set-up is stamped by extra, so that `make demo` installs only what the demo needs.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --editable

$(VENV)/.stamp-examples: setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing di4c_fast with its examples into $(VENV) (about a minute) ..."
	@$(PIP_INSTALL) '.[examples]'
	@touch $@

$(VENV)/.stamp-dev: setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing di4c_fast with its development tools into $(VENV) (about two minutes) ..."
	@$(PIP_INSTALL) '.[dev]'
	@touch $@ $(VENV)/.stamp-examples

# Train a teacher on handwritten digits, distil it, compare; resumes where it was interrupted.
demo: $(VENV)/.stamp-examples
	$(BIN)/python -m examples.digits --run-dir $(RUN_DIR) $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --quiet tests di4c_fast -m "not gpu" $(ARGS)

# What needs a GPU, and registers, shared memory and spills of every kernel (needs none).
gpu: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest --quiet tests -m gpu $(ARGS)

aot: $(VENV)/.stamp-dev
	env -u TRITON_INTERPRET $(BIN)/python -m di4c_fast.kernels.compile_report $(ARGS)

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
