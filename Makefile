# make demo, make test: all set-up included; only Python >= 3.10, git and make are needed.
PYTHON ?= python3
PIP_OPTIONS ?=
RUN := .venv/bin/python
READY := .venv/.ready

.NOTPARALLEL:
.PHONY: demo figures test lint types check codegen test-triton-versions test-triton-smoke clean gpu gpu-there gpu-test \
    gpu-test-layer gpu-test-plans gpu-test-packed gpu-test-dropin gpu-test-perf gpu-test-rest gpu-stress gpu-sanitize \
    gpu-memcheck gpu-racecheck gpu-tune gpu-bench gpu-bench-quick gpu-bench-full

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install $(PIP_OPTIONS) --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) -m triton_lstm train --compare

# The pictures of README.md
figures: $(READY)
	$(RUN) -m triton_lstm train
	mkdir -p docs
	$(RUN) -m triton_lstm gradients --checkpoint runs --plot docs/gradients.png

test: $(READY)
	$(RUN) -m pytest -n auto --dist loadfile

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

check: lint types test

# Every kernel that the plan can choose, compiled for six architectures: the table that test_codegen.py compares with
codegen: $(READY)
	mkdir -p perf/results
	env -u TRITON_INTERPRET $(RUN) tests/codegen.py --csv perf/results/codegen.csv

# Other versions of Triton beside the one in .venv, under its torch: the oldest that a GPU's torch brings, and the newest
TRITON_VERSIONS ?= 3.6.0 3.9.0
PACKED := tests/test_packed.py tests/test_packed_calls.py
KERNEL_TESTS := tests/test_layer.py $(PACKED) tests/test_states.py tests/test_record.py tests/test_exchange.py \
    tests/test_exchange_packed.py tests/test_autograd.py tests/test_codegen.py tests/test_tune.py tests/test_launch.py \
    tests/test_interpreter.py
SMOKE_TESTS := $(foreach name,record launch interpreter tune codegen,tests/test_$(name).py)

.triton/%: | $(READY)
	rm -rf $@.new
	$(RUN) -m pip install $(PIP_OPTIONS) --quiet --disable-pip-version-check --no-deps --target $@.new triton==$*
	mv $@.new $@

test-triton-versions: $(TRITON_VERSIONS:%=.triton/%)
	for version in $(TRITON_VERSIONS); do \
	    echo "Triton $$version"; \
	    PYTHONPATH=.triton/$$version $(RUN) -m pytest -n auto --dist loadfile $(KERNEL_TESTS) || exit 1; done

test-triton-smoke: .triton/3.6.0
	PYTHONPATH=.triton/3.6.0 $(RUN) -m pytest -q -n auto --dist loadfile $(SMOKE_TESTS)

# On a machine with an NVIDIA GPU and its own torch, triton and the packages of the extras `perf` and `test`: no network,
# no .venv. Every piece can be called alone, ends within ten minutes or is stopped, and leaves one CSV and one log in
# perf/results/<gpu>, or in OUT=folder. gpu-bench goes on where it was stopped.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
GPU_PYTHON := env PYTHONPATH=$(CURDIR) $(PYTHON)
GPU := timeout --kill-after=10 540 $(GPU_PYTHON)
TO = $(eval TO := $(shell $(GPU_PYTHON) -m triton_lstm.perf.machine $(OUT)))$(TO)
LOG = | tee $(TO)/$@.log
SANITIZER := timeout --kill-after=10 540 env PYTHONPATH=$(CURDIR) PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    TRITON_LSTM_SPIN_LIMIT=10000000 compute-sanitizer --error-exitcode 9
PIECES := gpu-test-layer gpu-test-plans gpu-test-packed gpu-test-dropin gpu-test-perf gpu-test-rest gpu-stress \
    gpu-memcheck gpu-racecheck gpu-tune gpu-bench
TABLE = $(shell $(GPU_PYTHON) -m triton_lstm.perf.machine --table)
# What nn.LSTM promises and what it cannot do
DROPIN := $(foreach name,contract weights torch_modules states compile compile_fallback operators func cuda_graphs convert \
    convert_report parallel,tests/test_$(name).py)
SHAPES := --hidden 128,256,512,768,1024 --batch 16,64,256 --dtype bf16,fp16,tf32

# All pieces run, also after one that failed
gpu: gpu-there
	$(MAKE) --keep-going $(PIECES)

gpu-test: gpu-test-layer gpu-test-plans gpu-test-packed gpu-test-dropin gpu-test-perf gpu-test-rest

gpu-sanitize: gpu-memcheck gpu-racecheck

gpu-there:
	@told=$$($(GPU_PYTHON) -c 'import torch, triton, pandas, matplotlib, rich, tabulate, jinja2, filelock, pytest, \
	hypothesis' 2>&1) || { echo "$(PYTHON) lacks a package ($${told##*$$'\n'}): give another as PYTHON=..." >&2; exit 2; }
	@$(GPU_PYTHON) -m triton_lstm.perf.machine $(OUT) > /dev/null

gpu-test-layer: gpu-there
	$(GPU) -m pytest tests/test_layer.py -k against_nn_lstm --csv $(TO)/$@.csv $(LOG)

gpu-test-plans: gpu-there
	$(GPU) -m pytest tests/test_layer.py -k 'not against_nn_lstm' --csv $(TO)/$@.csv $(LOG)

gpu-test-packed: gpu-there
	$(GPU) -m pytest $(PACKED) --csv $(TO)/$@.csv $(LOG)

gpu-test-dropin: gpu-there
	$(GPU) -m pytest $(DROPIN) --csv $(TO)/$@.csv $(LOG)

gpu-test-perf: gpu-there
	$(GPU) -m pytest tests/test_perf_*.py --csv $(TO)/$@.csv $(LOG)

gpu-test-rest: gpu-there
	$(GPU) -m pytest $(patsubst %,--ignore=%,tests/test_layer.py tests/test_codegen.py $(PACKED) $(DROPIN)) \
	    --ignore-glob='*/test_perf_*' --csv $(TO)/$@.csv $(LOG)

gpu-stress: gpu-there
	$(GPU) -m triton_lstm.perf.stress --out $(TO)/$@.csv $(LOG)

gpu-memcheck gpu-racecheck: gpu-there
	@if command -v compute-sanitizer; \
	then $(SANITIZER) --tool $(@:gpu-%=%) $(PYTHON) -m triton_lstm.perf.stress --small --out $(TO)/$@.csv $(LOG); \
	else echo "$@: skipped, compute-sanitizer is not installed" $(LOG); fi

# Into the checkout, so that gpu-bench measures what would be shipped; goes on where it was stopped
gpu-tune: gpu-there
	$(GPU) -m triton_lstm tune $(SHAPES) --budget 450s --verbose --out $(TABLE) $(LOG)

gpu-bench gpu-bench-quick gpu-bench-full: gpu-there
	$(GPU) -m triton_lstm bench --suite $(patsubst gpu-bench,standard,$(@:gpu-bench-%=%)) --out $(TO)

clean:
	rm -rf .venv .triton build *.egg-info runs
