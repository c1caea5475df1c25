# Everything a newcomer needs: `make train` and `make test` set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
INSTALL := $(PIP) install --no-deps --no-compile
# The editable install knows each folder by name.
FOLDERS := $(foreach house,parallel checkpoint elastic trainer launch,$(wildcard $(addprefix $(house)/,__init__.py */__init__.py */*/__init__.py)))
SOURCES := pyproject.toml $(FOLDERS) $(wildcard csrc/*.cpp csrc/*.h csrc/*.inl csrc/*.txt csrc/*.py csrc/*.pyi)

# Where bytecode is not written, every process compiles torch again, for longer than a small test takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-dev train test test-quick lint docs bench gpu gpu-wheels soak wheel-test clean

setup: .venv/base.stamp
setup-dev: .venv/dev.stamp

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# The lock files are complete, so nothing is resolved; bytecode is made of what is imported, when it is. The extension
# compiles while the rest is unpacked.
.venv/base.stamp: requirements/build.txt requirements/base.txt $(SOURCES) | .venv/bin/python
	$(INSTALL) -r requirements/build.txt
	$(INSTALL) -r requirements/base.txt & rest=$$!; \
	  $(INSTALL) --no-build-isolation -e .; built=$$?; wait $$rest && exit $$built
	@touch $@

.venv/dev.stamp: requirements/dev.txt .venv/base.stamp
	$(INSTALL) -r requirements/dev.txt
	@touch $@

.venv/bench.stamp: requirements/bench.txt .venv/dev.stamp
	$(INSTALL) -r requirements/bench.txt
	@touch $@

train: setup
	$(BIN)/holdfast train examples/tiny.toml --prove

# Most tests wait for processes: three at a time use two cores well. A file's tests stay together, long files come first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: setup-dev
	$(PYTEST)

# The fast part: starts no process and asks no other framework.
test-quick: setup-dev
	$(PYTEST) -m "not mp and not slow and not chaos and not gpu"

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# The API reference, from docstrings; every warning is an error.
docs: setup-dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/api.cache docs/api build/api

bench: .venv/bench.stamp
	$(BIN)/python benchmarks/run_all.py

# Every test and benchmark that needs a GPU, in nine minutes, with the Python that is there; without a GPU, what that is.
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

gpu:
	$(GPU_PYTHON) benchmarks/gpu

# What a GPU machine without a registry may lack: build/gpu/wheels, to be carried there with the checkout.
gpu-wheels:
	$(PYTHON) benchmarks/gpu/installation.py

soak: setup-dev
	HYPOTHESIS_PROFILE=soak HOLDFAST_SOAK_S=1800 $(BIN)/python -m pytest --timeout 1800

# Builds the wheel, installs it beside what running needs and no more, and tests it outside the checkout.
WHEEL := build/wheel-test
TESTED_WITH := pytest|pytest-timeout|hypothesis|iniconfig|pluggy|pygments|packaging|sortedcontainers|attrs
wheel-test: setup-dev
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(PIP) wheel --no-build-isolation --no-deps -w $(WHEEL)/dist .
	$(BIN)/python -m venv --without-pip $(WHEEL)/venv
	$(BIN)/python .ci/link_packages.py $(WHEEL)/venv \
	  $$(sed '/^#/d' requirements/base.txt) $$(grep -E '^($(TESTED_WITH))==' requirements/dev.txt)
	$(PIP) --python $(WHEEL)/venv/bin/python install --no-deps --no-compile $(WHEEL)/dist/holdfast-*.whl
	$(PIP) --python $(WHEEL)/venv/bin/python check
	cp -r tests examples pyproject.toml $(WHEEL)/
	cd $(WHEEL) && venv/bin/python -m pytest -q tests/native tests/checkpoint/convert/test_mapping.py \
	  tests/launch/test_command.py -k "native or mapping or promises or (torchrun and not module) or plan_prints"

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
