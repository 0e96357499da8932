# make demo and make test work in a new clone: all they need is make and Python 3.10 or newer.
# A virtual environment that is active is used; otherwise .venv is made.

VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.hf-catquant-installed
# More workers than this spend their time importing torch.
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-all check fix clean

help:
	@echo "make demo      quantize small models and show what it cost"
	@echo "make test      run the tests, except the slow ones"
	@echo "make test-all  run all tests"
	@echo "make check     lint, format and type checks"
	@echo "make fix       repair what the linter and the formatter can"
	@echo "make install   install the package and its tools for development"
	@echo "make clean     remove .venv and every cache"

venv install: $(STAMP)

# The stamp holds the folder it was made from: an environment shared by two clones is installed again for the other one.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml $(wildcard setup.py) | $(PYTHON)
	@echo "installing the package and its tools into $(VENV): a few minutes, once"
	$(PYTHON) -m pip install --disable-pip-version-check --editable '.[dev]'
	@echo "$(CURDIR)" > "$@"

$(PYTHON):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, python3 is $$(python3 --version 2>&1)"; exit 1; }
	python3 -m venv "$(VENV)"

demo: $(STAMP)
	"$(VENV)/bin/catquant" demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

fix: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
