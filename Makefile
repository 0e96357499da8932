# make demo and make test work in a new clone: all they need is make and Python 3.10 or newer.
# A virtual environment that is active is used; otherwise .venv is made.

VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.hf-catquant-installed
# More workers than this spend their time importing torch.
PYTEST := $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-all test-native check fix clean

help:
	@echo "make demo      quantize small models and show what it cost"
	@echo "make test      run the tests, except the slow ones"
	@echo "make test-all  run all tests"
	@echo "make test-native  run the C kernels under sanitizers, and those of Arm in an emulator if there is one"
	@echo "make check     lint, format and type checks"
	@echo "make fix       repair what the linter and the formatter can"
	@echo "make install   install the package and its tools for development"
	@echo "make clean     remove .venv and every cache"

venv install: $(STAMP)

# The stamp holds the folder it was made from: an environment shared by two clones is installed again for the other one.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml setup.py $(wildcard hf_catquant/kernels/csrc/*) | $(PYTHON)
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

# The same sources without Python. setup.py says which files and flags there are; here they meet the sanitizers.
CSRC := hf_catquant/kernels/csrc
NATIVE := build/native
NATIVE_FLAGS := -std=c11 -D_GNU_SOURCE -O1 -g -pthread -fopenmp-simd -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror -DPRODUCTS_A_THREAD=1 -I$(CSRC)
NATIVE_COMMON := $(addprefix $(CSRC)/,bits.c columns.c decode.c float_rows.c floats.c layout.c linear.c measure.c path_scalar.c pool.c scratch.c unpack.c)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
AVX2 := -mavx2 -mfma -mf16c
AVX512 := $(AVX2) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
HAS_X86 := -DCQ_HAS_AVX2 -DCQ_HAS_AVX512 -DCQ_HAS_LOOKUP -DCQ_HAS_AMX
ARM_CC := aarch64-linux-gnu-gcc
ARM_RUN := qemu-aarch64 -L /usr/aarch64-linux-gnu

test-native:
	mkdir -p $(NATIVE)
ifeq ($(shell uname -m),x86_64)
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(AVX2) -c $(CSRC)/path_avx2.c -o $(NATIVE)/avx2.o
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(AVX512) -c $(CSRC)/path_avx512.c -o $(NATIVE)/avx512.o
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(AVX512) -mavx512vbmi -c $(CSRC)/lookup.c -o $(NATIVE)/lookup.o
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(AVX512) -mamx-tile -mamx-int8 -c $(CSRC)/amx.c -o $(NATIVE)/amx.o
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(HAS_X86) $(NATIVE_COMMON) $(CSRC)/dispatch.c tests/native/products.c \
		$(NATIVE)/avx2.o $(NATIVE)/avx512.o $(NATIVE)/lookup.o $(NATIVE)/amx.o -o $(NATIVE)/products -lm
else
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(NATIVE_COMMON) $(CSRC)/dispatch.c tests/native/products.c -o $(NATIVE)/products -lm
endif
	$(NATIVE)/products
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(CSRC)/bits.c $(CSRC)/pool.c tests/native/bits.c -o $(NATIVE)/bits
	$(NATIVE)/bits
	$(CC) $(NATIVE_FLAGS) $(SANITIZE) $(CSRC)/columns.c $(CSRC)/pool.c tests/native/columns.c -o $(NATIVE)/columns -lm
	$(NATIVE)/columns
	@if command -v $(ARM_CC) > /dev/null && command -v $(firstword $(ARM_RUN)) > /dev/null; then \
		set -ex; \
		$(ARM_CC) $(NATIVE_FLAGS) -march=armv8.2-a+dotprod -c $(CSRC)/path_neon.c -o $(NATIVE)/neon.o; \
		$(ARM_CC) $(NATIVE_FLAGS) -DCQ_HAS_NEON $(NATIVE_COMMON) $(CSRC)/dispatch.c tests/native/products.c \
			$(NATIVE)/neon.o -o $(NATIVE)/products-arm -lm; \
		$(ARM_RUN) $(NATIVE)/products-arm; \
		$(ARM_RUN) -cpu cortex-a53 $(NATIVE)/products-arm; \
		$(ARM_CC) $(NATIVE_FLAGS) $(CSRC)/bits.c $(CSRC)/pool.c tests/native/bits.c -o $(NATIVE)/bits-arm; \
		$(ARM_RUN) $(NATIVE)/bits-arm; \
		$(ARM_CC) $(NATIVE_FLAGS) $(CSRC)/columns.c $(CSRC)/pool.c tests/native/columns.c -o $(NATIVE)/columns-arm -lm; \
		$(ARM_RUN) $(NATIVE)/columns-arm; \
	else echo "the NEON kernels are not run: there is no $(ARM_CC) with qemu-aarch64 here"; fi

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

fix: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
