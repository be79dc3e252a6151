# make demo and make test do all of their own set-up, in $(VENV). Settings: PYTHON, VENV, PIP_ARGS, ARGS, JOBS.
#   make serve ARGS="--port 8080"     make test ARGS="-k scheduler"     make demo PYTHON=python3.12

VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
ARGS ?=
PROMPT ?= ROMEO:
MODEL ?= demo
DIST ?= dist
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev-installed
PIP_INSTALL := $(RUN) pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard platforms/*/pyproject.toml platforms/*/hatch_build.py platforms/*/csrc/*)

# In JOBS processes, then by file those that hold processes to a time, beside no others. 5: ARGS chose none of a part.
pytest = @first=0; last=0; \
	$(RUN) pytest -n $(JOBS) --dist worksteal -m "not alone" $(1) $(ARGS) || first=$$?; \
	$(RUN) pytest -n $(JOBS) --dist loadfile -m alone $(1) $(ARGS) || last=$$?; \
	if [ $$last -eq 5 ] || { [ $$first -ne 0 ] && [ $$first -ne 5 ]; }; then exit $$first; fi; exit $$last

# Those that end in minutes on their own; kernels.py and compare.py are longer, and said what to measure.
BENCHES := $(filter-out benchmarks/kernels.py benchmarks/compare.py,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-full check bench chaos wheels clean

help:
	@echo 'make demo       install into $(VENV) and watch the embedded model write'
	@echo 'make serve      the same, as an HTTP server on 127.0.0.1:8000 (ARGS="--port 8080")'
	@echo 'make test       every test at its quick count (ARGS="-k name")'
	@echo 'make test-full  every test at its full count; this takes up to two hours'
	@echo 'make check      format, lint, types, packaging and import rules'
	@echo 'make bench      the benchmarks'
	@echo 'make chaos      what the server promises under faults, measured (ARGS="R1 R4 --full")'
	@echo 'make wheels     build wheels of all distributions into $(DIST)'
	@echo 'make clean      remove $(VENV)'

demo: $(INSTALLED)
	@$(BIN)/python -c "import torch; print('PyTorch', torch.__version__, '(CPU build)' if not (torch.version.cuda or torch.version.hip or torch.version.xpu) else '(accelerator build; a CPU build is gigabytes smaller, see README.md)')"
	$(BIN)/fairlead run $(MODEL) "$(PROMPT)" $(ARGS)

serve: $(INSTALLED)
	$(BIN)/fairlead serve $(MODEL) $(ARGS)

test: $(DEV_INSTALLED)
	$(call pytest,)

test-full: export FAIRLEAD_TEST_FULL = 1
test-full: $(DEV_INSTALLED)
	$(call pytest,--timeout=7200)

check: $(DEV_INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) pytest -q tests/packaging

bench: $(INSTALLED)
	@for script in $(BENCHES); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; done

chaos: $(INSTALLED)
	$(BIN)/python benchmarks/reliability/chaos.py $(ARGS)

# For machines without an index: pip install --no-index --no-deps $(DIST)/*.whl. Hatchling is in the development group,
# so nothing is downloaded for it; the same makes the build of the CPU's kernels use this environment's Python.
wheels: $(DEV_INSTALLED)
	@rm -rf "$(DIST)"
	$(RUN) pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --no-index --wheel-dir "$(DIST)" . $(dir $(wildcard platforms/*/pyproject.toml))
	@ls -l "$(DIST)"

clean:
	rm -rf "$(VENV)"

# A virtual environment that is already there is used as it is, so a PyTorch that was put into it first stays.
$(BIN)/python:
	@set -e; for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || { needs_venv="$$python"; continue; }; \
	  echo "creating $(VENV) with $$("$$python" --version) ($$python)"; \
	  exec "$$python" -m venv "$(VENV)"; \
	done; \
	if [ -n "$$needs_venv" ]; then \
	  echo "error: $$needs_venv cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; \
	else \
	  echo "error: Fairlead needs Python 3.11 or newer; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1). Install one and name it: make demo PYTHON=python3.11" >&2; \
	fi; exit 1

# One pip call, so that fairlead[cpu] finds fairlead-cpu in platforms/cpu.
$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || echo 'installing PyTorch and the other dependencies (minutes)'
	@$(PIP_INSTALL) -e ".[cpu]" -e platforms/cpu
	@touch $@

# What needs a device installs without one, too: its tests run it on a fake one.
DEVICE_PLATFORMS := $(addprefix -e ,$(filter-out platforms/cpu,$(patsubst %/pyproject.toml,%,$(wildcard platforms/*/pyproject.toml))))

# The development group of pyproject.toml, read here because pip knows --group only from version 25.1 on.
$(DEV_INSTALLED): $(INSTALLED)
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['dev'], sep='\n')" > $(VENV)/dev-requirements.txt
	@$(PIP_INSTALL) --quiet -r $(VENV)/dev-requirements.txt
	@$(PIP_INSTALL) --quiet --no-deps --no-build-isolation $(DEVICE_PLATFORMS)
	@touch $@
