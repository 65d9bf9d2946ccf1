# make demo    quantize a real model to 4 bit, load it again, and compare
# make belle   generate data, filter, train, quantize and compare, all in small, as a page
# make test    of each test the corners of its cases: what would catch a mistake, in minutes
# make lint    ruff and mypy
# make docs    the documentation as a site, in .cache/site
# make wheel   the wheel of a release, in dist, tried in an empty environment (needs nvcc)
# make clean   remove the environments and everything downloaded or built
#
# make test-rest        the cases that `make test` leaves out
# make test-all         every case, in one run
# make test-installed   what pip installs of the wheel of the source archive, in an empty environment,
#                       with the oldest of everything that pyproject.toml allows but torch
# make test-oldest      the same with the oldest torch, too, and more tests
# make test-extras      what needs optional packages: serving, adapters, lm-eval; in an environment
#                       that adds them to this one, made again when pyproject.toml changes
# make test-slow        the slow cases that compile nothing and take less than three minutes
# make mutants          small changes to the modules that guard data which no test notices; an hour
#
# PYTHON=python3.12   the interpreter that the environment is made with
# VENV=path           an environment that has everything already; nothing is installed into it
# TORCH=torch==2.11.0 another torch than the one chosen below

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# On x86 Linux PyPI's own torch brings gigabytes of CUDA libraries. Where there is no GPU the build
# without them is preferred; an index that has it (PIP_EXTRA_INDEX_URL, or pip's configuration) is
# listed on pytorch.org under "CPU".
GPU := $(shell command -v nvidia-smi 2>/dev/null)
TORCH ?= torch$(if $(GPU),,==2.13.0)

# Nothing here runs the CUDA kernels without a GPU: one target then shows that they compile. The
# slow test of tests/quant_cuda/test_cuda_compile.py compiles all of them.
CUDA_TARGETS ?= $(if $(GPU),,sm_80)

# The test files are shared out over several processes, where pytest-xdist is there.
SPREAD := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo belle test test-rest test-all test-installed test-oldest test-extras test-slow mutants lint docs wheel clean venv

demo: venv
	@$(RUN) -m benchmarks.demo

belle: venv
	@$(RUN) -m benchmarks.miniature

# What the corners are: tests/helpers/selection.py.
test: CASES := corners
test-rest: CASES := rest
test-all: CASES := all
test test-rest test-all: venv
	@$(RUN) -m pytest --cases $(CASES) $$($(RUN) -c "import xdist; print('$(SPREAD)')" 2>/dev/null)

# Each in an environment of its own, with tests that need nothing of the checkout. None of them runs
# a CUDA kernel: those are compiled for `test` already, and there is no nvcc in BARE. ninja, which
# compiles the rest, would take the flags of make for its own.
test-installed: NEWER := torch
test-installed: WANTED := "$(TORCH)"
test-installed: EXTRAS := data
test-installed: FILES := cli/test_run checkpoints/test_convert checkpoints/test_gguf_format checkpoints/test_gguf_tokenizer inference/test_hf
test-oldest: WANTED := openai httpx
test-oldest: EXTRAS := data,serve,train,report
test-oldest: FILES := blockwise checkpoints cli data files inference models pipeline/test_blocks project/test_nn serving
test-oldest: CHOSEN := -m "not slow and not peers" -k "not lm_eval and not of_the_page"
test-installed test-oldest: BARE = .cache/$@
test-installed test-oldest: venv
	@rm -rf $(BARE)
	@$(PYTHON) -m venv $(BARE)
	@$(RUN) tests/helpers/floors.py | grep -v "^$(NEWER)==" > $(BARE)/floors.txt
	@MAKEFLAGS= CUDA_HOME="$(abspath $(BARE))" $(RUN) -m build --outdir $(BARE)/dist . > $(BARE)/build.log
	@$(BARE)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(BARE)/floors.txt $(WANTED) "$$(echo $(BARE)/dist/*.whl)[$(EXTRAS)]" "accelerate>=1.5" "pytest>=8"
	@cd tests && ../$(BARE)/bin/python -c "import gptq; assert 'site-packages' in gptq.__file__"
	@cd tests && ../$(BARE)/bin/pytest $(CHOSEN) $(foreach file,$(FILES),$(if $(findstring test_,$(file)),$(file).py,$(file)))

EXTRAS_ENV := .cache/extras
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
test-extras: $(EXTRAS_ENV)/ready
	@PYTHONPATH=. $(EXTRAS_ENV)/bin/python -m pytest -m extras

$(EXTRAS_ENV)/ready: pyproject.toml | venv
	@rm -rf $(EXTRAS_ENV)
	@$(RUN) -m venv $(EXTRAS_ENV)
	@echo "import site; site.addsitedir('$$($(RUN) -c '$(SITE)')')" \
		> $$($(EXTRAS_ENV)/bin/python -c '$(SITE)')/base.pth
	@$(EXTRAS_ENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(RUN) tests/helpers/floors.py serve train report | sed 's/==/>=/') \
		openai httpx "lm_eval>=0.4.9"
	@touch $@

# What compiles kernels, and a run that ends at every change to a file, are left to `-m slow`.
SLOW := pipeline/test_team
test-slow: venv
	@$(RUN) -m pytest -m slow $(SLOW:%=tests/%.py)

mutants: venv
	@$(RUN) tests/helpers/mutants.py

lint: venv
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

docs: venv
	@$(RUN) -m mkdocs build --strict --quiet

# For all GPUs of setup.py unless CUDA_TARGETS is given: the default above is for tests.
wheel: venv
	@$(if $(filter file,$(origin CUDA_TARGETS)),,CUDA_TARGETS="$(CUDA_TARGETS)") \
		PYTHON="$(PYTHON)" CHECKOUT="$(RUN)" tools/wheel.sh

clean:
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# What the compiled libraries are made of: they are not used if it has changed.
COMPILED := setup.py quant_cuda/sources.py $(wildcard quant_cuda/csrc/*.h quant_cuda/csrc/*/*)

ifeq ($(VENV),.venv)
venv: .venv/built

.venv/built: $(COMPILED) | .venv/ready
	@test -z "$$(find $^ -newer .venv/ready)" || \
		CUDA_TARGETS="$(CUDA_TARGETS)" $(PIP) --no-deps --editable .
	@touch $@

.venv/ready: pyproject.toml
	@echo "setting up .venv (minutes, the first time)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)"
	@CUDA_TARGETS="$(CUDA_TARGETS)" $(PIP) --editable ".[test]"
	@touch $@
else
venv:
	@test -x $(RUN) || { echo "error: $(VENV) is no environment: $(RUN) is not there"; exit 2; }
endif
