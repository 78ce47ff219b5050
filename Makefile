# Every target sets up what it needs in .venv; `make help` lists them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# cuda13 or tpu: the accelerator that jax is installed for.
ACCELERATOR ?=
# The extra that tests run in: dev has all that test has.
TEST ?= test
comma := ,
EXTRAS = $(1)$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
PAPERS = reddi_2018 step_bound defects kingma_ba_2015 loshchilov_hutter_2019 liu_2020 dozat_2016
STAMP = $(VENV)/installed-$(1)$(if $(ACCELERATOR),-$(ACCELERATOR))

.DEFAULT_GOAL := help
.PHONY: help mnist test check check-native check-ahead ptx lint soak mutants clients bench experiments playground scale \
  docs wheel format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

mnist: $(call STAMP,experiments) ## train the Flax CNN on MNIST with jadam.adam
	$(RUN) -m experiments.mnist

test: $(call STAMP,$(TEST)) ## run all tests
	$(RUN) -m pytest -n auto --dist loadfile

lint: $(call STAMP,dev) ## ruff, ruff format and pyright
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

check: ## what continuous integration runs: lint, test, check-native in its short form, check-ahead
	$(MAKE) lint test TEST=dev
	$(MAKE) check-native SHORT=1
	$(MAKE) check-ahead

check-native: $(call STAMP,dev) ## the native kernel by itself, optimised and with sanitizers; SHORT=1
	@PATH="$(abspath $(VENV)/bin):$$PATH"; for sanitize in $(if $(SHORT),,"") address,undefined thread; do \
	  dir=build/native-$${sanitize:-plain}$(if $(SHORT),-short); \
	  cmake -S tests/native -B $$dir -DSANITIZE=$$sanitize -DSHORT=$(SHORT) \
	    -DPython3_EXECUTABLE=$(abspath $(RUN)) && \
	  cmake --build $$dir --target check --parallel && \
	  $$dir/check $(if $(SHORT),--short) || exit 1; \
	done

check-ahead: $(call STAMP,dev) ## steps compiled ahead of time for TPUs and GPUs that are not there
	$(RUN) .ci/ahead.py build/ahead
	PYTHONPATH=build/ahead $(RUN) -m pytest tests/test_ahead.py \
	  tests/test_tpu.py::test_a_step_is_one_pass_on_a_tpu

ptx: ## the CUDA kernels compiled, into jadam/_kernels/native/gpu/kernel.ptx: with nvcc 13.0
	.ci/ptx.sh

soak: $(call STAMP,test) ## the long forms of the tests, and 12,000 random programs: hours
	$(RUN) -m pytest -m soak
	$(RUN) -m tests.programs

mutants: $(call STAMP,mutants) ## small faults, one at a time: do the tests find them? hours; SAMPLE=10
	$(RUN) -m tests.mutants $(if $(SAMPLE),--sample $(SAMPLE))
	$(RUN) -m tests.mutants --kernel
	$(RUN) -m tests.mutants --again
	$(RUN) -m tests.mutants.report

clients: $(call STAMP,clients) ## programs of others with jadam's Adam, each in its own environment; AGAIN=1
	$(RUN) -m experiments.clients $(if $(AGAIN),--again)
	$(RUN) -m docs.tables

bench: $(call STAMP,bench) ## accuracy and speed beside optax, torch and others, as tables and JSON
	$(RUN) -m experiments.bench

experiments: $(call STAMP,experiments) ## all pictures and figures of the experiments, into runs/: hours on 2 cores
	$(RUN) -m experiments.trajectories
	for paper in $(PAPERS); do $(RUN) -m experiments.papers.$$paper || exit 1; done
	$(RUN) -m experiments.mnist.presets --out runs/presets

playground: $(call STAMP,playground) ## a page of sliders on localhost
	$(RUN) -m experiments.playground

scale: $(call STAMP,experiments) ## memory and communication of large models, from their shapes
	$(RUN) -m experiments.scale

docs: $(call STAMP,docs) ## the documentation as a site, in build/site
	$(RUN) -m docs.tables
	$(RUN) -m mkdocs build --strict --config-file docs/mkdocs.yml

wheel: $(call STAMP,wheel) ## a wheel with the kernel, in dist/, tried where there is no compiler
	rm -rf build/wheel build/bare
	$(RUN) -m build --wheel --outdir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" \
	  $(RUN) -m auditwheel repair --wheel-dir build/wheel/repaired build/wheel/*.whl
	$(RUN) -m venv build/bare
	cd build && PATH=$(abspath build/bare/bin) bare/bin/python -m pip install --quiet \
	  --only-binary :all: wheel/repaired/*.whl
	cd build && PATH=$(abspath build/bare/bin) bare/bin/python -c "import jadam; \
	  kernel = jadam.kernels()['cpu']; print(kernel); assert kernel.startswith('native'), kernel"
	mkdir -p dist && cp build/wheel/repaired/*.whl dist/

format: $(call STAMP,dev) ## format the code and mend what ruff can mend
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean: ## remove the environment, caches and results
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or \
	  sys.exit(f"jadam needs Python 3.11 or newer, $(PYTHON) is {v.major}.{v.minor}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(RUN)
	@$(RUN) .ci/install.py $(subst -,$(comma),$*)
	@touch $@
