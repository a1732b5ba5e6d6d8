# Each target sets up .venv by itself. `make demo` and `make test` are all a newcomer needs.
.DEFAULT_GOAL := help
.PHONY: help demo test test-heavy test-aot test-newest lint format clean
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS := -qq --disable-pip-version-check
# The compiler for GPUs is installed for the tests; where no GPU is, JAX is not to look for one.
ifeq ($(shell command -v nvidia-smi),)
export JAX_PLATFORMS ?= cpu
endif

help:
	@echo "make demo    quantize the reference model to four formats and compare them"
	@echo "make test    run the tests, but for the longest"
	@echo "make test-heavy  run those"
	@echo "make test-aot  compile every kernel for the GPUs it is meant for"
	@echo "make lint    ruff and mypy"

demo: $(VENV)/.run
	$(BIN)/qjax compare --presets fp8,int8_wo,int8,int4_wo --samples --html demo/index.html

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m "not aot and not heavy"

test-heavy: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m "heavy and not aot"

# Every kernel, compiled for the GPUs it is meant for.
test-aot: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal -q -m aot tests/aot

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The same tests on the newest versions that pyproject.toml allows, without the constraints.
test-newest: $(VENV)-newest/.test
	$(VENV)-newest/bin/python -m pytest -n auto --dist worksteal -q -m "not heavy"

$(VENV)/bin/python $(VENV)-newest/bin/python: %/bin/python:
	@python=$$(PYTHON="$(PYTHON)" scripts/find-python) && echo "creating $* with $$python" && \
	    "$$python" -m venv $*

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.run

$(VENV)-newest/.test: pyproject.toml | $(VENV)-newest/bin/python
	$(VENV)-newest/bin/python -m pip install $(PIP_FLAGS) --upgrade -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-newest demo build dist *.egg-info
