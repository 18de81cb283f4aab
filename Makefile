# The two commands: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with a GPU, the Python that has its PyTorch; nothing is installed there.
GPU_PYTHON ?= $(PYTHON)
RUN_DIR ?= runs/digits

.PHONY: demo text antibody test sanitize bench report gpu aot count docs lint clean

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

# The same on English text, character by character.
text: $(VENV)/.stamp-examples
	$(BIN)/python -m examples.text --run-dir runs/text $(ARGS)

# A student of AntiBERTy, a pretrained model, which fills in antibody loops; downloads 97 MB once.
antibody: $(VENV)/.stamp-dev
	$(BIN)/python -m examples.antibody --run-dir runs/antibody $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

MARKS ?= not gpu and not slow
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n 2 --dist loadfile --no-loadscope-reorder --durations 15 \
		tests di4c_fast -m "$(MARKS)" $(ARGS)

# The C++ passes under GCC's sanitizers of addresses and undefined behaviour, on every instruction
# set. Python does not know them, so they are loaded before it; what it never frees is no leak.
SANITIZED_SETS ?= plain avx2 avx512
SANITIZED_TESTS = tests/test_loss_conformance.py tests/test_loss_op.py \
	tests/test_draw_conformance.py tests/test_cpu_passes.py tests/test_cpu_vectors.py
sanitize: $(VENV)/.stamp-dev
	@export CXX="env -u LD_PRELOAD g++" XDG_CACHE_HOME=$(CURDIR)/build/sanitized ASAN_OPTIONS=detect_leaks=0 \
		DI4C_FAST_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
		LD_PRELOAD="$$(for name in asan ubsan stdc++; do \
			printf '%s ' "$$(g++ -print-file-name=lib$$name.so)"; done)" OMP_NUM_THREADS=1; \
	$(BIN)/python -m kernels.cpu.build && for name in $(SANITIZED_SETS); do \
		echo "$$name:"; DI4C_FAST_CPU=$$name $(BIN)/python -m pytest --quiet --capture no \
			$(SANITIZED_TESTS) -k "cpu and not memory" $(ARGS) || exit; \
	done

# What needs a GPU: its tests, the tuning of launch parameters, the benchmarks (under 8 minutes).
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# Registers, shared memory and spills of every kernel for every target; needs no GPU.
aot: $(VENV)/.stamp-dev
	env -u TRITON_INTERPRET $(BIN)/python -m tools.compile_report $(ARGS)

# Instructions of the kernels per logit and what they take at least, computed; needs no GPU.
count: $(VENV)/.stamp-dev
	env -u TRITON_INTERPRET $(BIN)/python -m tools.count $(ARGS)

# Everything under benchmarks/ in at most 11 minutes; results go to benchmarks/results/.
bench: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.run $(ARGS)

# Tables of the newest complete results; ARGS=--write puts them into docs/speed.md and README.md.
report: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.report $(ARGS)

# The documentation as a searchable site in site/.
docs:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) '.[docs]'
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in site/: python -m http.server --directory site"

clean:
	rm -rf site $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
