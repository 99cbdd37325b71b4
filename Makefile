# make setup    .venv with everything, and the package in it, compiled
# make demo     setup, what this machine can do, then a small model trained and sampled from
# make test     all tests (with CUDA kernels compiled where nvcc is found)
# make lint     ruff, clang-format and mypy      make format   rewrite the sources as lint wants them
# make docs     the site, into build/site; a broken link fails
# make bench    measure every op on this machine into benchmarks/results/
# make wheel    a manylinux wheel into dist/, checked and tried in a new environment; CUDA=0 and 1 say whether with CUDA
# make hub      the tree that Hugging Face's `kernels` package loads, into build/hub
# make build    compile the extension in place      make clean    remove what was built
# make extension    the same without torch, beside `make setup`, for which `make tools` has to be done
#
# PYTHON chooses the interpreter of a new .venv, TORCH what is installed as torch: make setup PYTHON=python3.11 TORCH='torch>=2.10'
# TRITON is the version that tests/gpu_code/triton_table.csv was written with; its interpreter needs numpy below 2.4.
# Packages come without bytecode, so whoever imports one first has to write it.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0 numpy<2.4
EXTRAS := build/transformers-4.57 build/antiberty build/kernels build/peft build/tensorboard
OPS ?= attention_fwd attention_bwd masked_loss unmask generate train
BIN := .venv/bin
# no bytecode, because Python writes that of the modules it loads, a fraction; all of torch's takes 15 s
QUIETLY := --quiet --no-compile
PIP := $(BIN)/python -m pip install $(QUIETLY)
BUILDERS := "pip>=25" "setuptools>=77" "ninja>=1.11" wheel
TOOLS := .venv/.tools
REQUIRED := .venv/.required
INSTALLED := .venv/.installed
WORKERS ?= 2

# Without a GPU, CUDA code is compiled only for the tests.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
HAS_NVCC := $(shell { test -n "$$NVCC" || command -v nvcc || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; } >/dev/null 2>&1 && echo 1 || echo 0)

CXX_SOURCES = $(shell git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$')

.PHONY: tools setup demo test collect extension extras lint format docs bench wheel hub build clean
setup: $(INSTALLED)

tools: $(TOOLS)

# what compiles the extension, without torch; and a pip that takes half as long as Python 3.11's over what follows. Here
# PYTHON's own installs them if it has one: all waits for this, and to unpack Python's into .venv first takes 4 s.
$(TOOLS):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make setup PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install $(QUIETLY) $(BUILDERS) || ($(PYTHON) -m venv .venv && $(PIP) $(BUILDERS))
	touch $@

# Prints what the package and its extras need.
define LIST_REQUIREMENTS
try: import tomllib
except ImportError: from pip._vendor import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = "model tokenizers test bench lint docs release".split()
print(*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra]), sep="\n")
endef
export LIST_REQUIREMENTS

# apart from the package, because pip would unpack none of it before the package is built
$(REQUIRED): pyproject.toml | $(TOOLS)
	$(BIN)/python -c "$$LIST_REQUIREMENTS" >$@.txt
	$(PIP) "$(TORCH)" $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(foreach package,$(TRITON),"$(package)")) --requirement $@.txt
	touch $@

$(INSTALLED): pyproject.toml setup.py $(REQUIRED)
	ILLADA_CUDA=$${ILLADA_CUDA-$(if $(filter 0,$(HAS_GPU)),0,)} $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m illada_kernels doctor
	$(BIN)/illada demo

COMPILE = ILLADA_CUDA=$${ILLADA_CUDA-$(if $(filter 1,$(HAS_NVCC)),1,0)} $(BIN)/python -m illada_kernels._build

build: setup
	$(COMPILE)

extension: tools
	$(COMPILE)

# One thread per worker; the tests that are about threads set their own number. Threads that wait sleep, because a core
# that another worker needs is no place to spin.
test: build extras
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# imports what the tests do: broken imports show early, and workers that start together find the bytecode; pytest finds
# the package in the checkout, so this runs beside the compilers
collect: $(REQUIRED)
	mkdir -p build
	$(BIN)/python -m pytest --collect-only --quiet >build/collected || (tail -n 50 build/collected; exit 1)

# packages that tests want beside the environment's
extras: $(EXTRAS)

# the other version that tests/integrations runs with, and what it needs older than the environment has it
build/transformers-4.57: pyproject.toml | $(TOOLS)
	rm -rf $@ $@.part
	$(PIP) --no-deps --target $@.part "transformers==4.57.*" "huggingface-hub>=0.34,<1" "tokenizers>=0.22,<=0.23"
	mv $@.part $@

# a pretrained masked language model, for examples/antibodies.py; skipped where the package index lacks it
build/antiberty: | $(TOOLS)
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part antiberty==0.1.3 && mv $@.part $@ || echo "no antiberty here"

# Hugging Face's kernels, apart because transformers 4.57 would import it; what it needs to load a local tree is there
build/kernels: pyproject.toml | $(TOOLS)
	rm -rf $@ $@.part
	$(PIP) --no-deps --target $@.part "kernels==0.17.*"
	mv $@.part $@

# peft, for illada train --lora, and TensorBoard's writer; their tests are skipped where the package index lacks them
build/peft: | $(TOOLS)
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part "peft==0.21.*" && mv $@.part $@ || echo "no peft here"

build/tensorboard: | $(TOOLS)
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part "tensorboard==2.21.*" protobuf absl-py && mv $@.part $@ || echo "no tensorboard here"

# lm-evaluation-harness with all that it needs; its tests are skipped where the package index lacks it
build/lm-eval-0.4: | $(TOOLS)
	rm -rf $@.part
	$(PIP) --target $@.part "lm_eval==0.4.13" "numpy<2.4" && mv $@.part $@ || echo "no lm_eval here"

build/lm-eval-0.5: | build/lm-eval-0.4
	rm -rf $@.part
	$(PIP) --no-deps --target $@.part lm_eval==0.5.0.dev1 && mv $@.part $@ || echo "no lm_eval 0.5 here"

lint: $(REQUIRED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	! grep -nE '^.{121}' $(CXX_SOURCES)  # comments, which clang-format leaves as they are
	$(BIN)/mypy

format: $(REQUIRED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# --quiet would hide its warnings from --strict
docs: $(REQUIRED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	for op in $(OPS); do $(BIN)/python -m benchmarks.run --op $$op || exit 1; done
	$(BIN)/python -m benchmarks.quality.accuracy
	$(BIN)/python -m benchmarks.quality.caches
	$(BIN)/python -m benchmarks.report.plot
	$(BIN)/python -m benchmarks.report.readme

wheel: setup
	$(BIN)/python -m release.wheel --cuda $(or $(CUDA),$(HAS_NVCC))

hub: build
	$(BIN)/python -m release.hub

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache illada_kernels/_C*.so illada_kernels/_build_info.json
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
