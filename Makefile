# make demo, make test: setup included; only Python >= 3.10, git and make are required.
PYTHON ?= python3
PIP_OPTIONS ?=
RUN := .venv/bin/python
READY := .venv/.ready
PIP = $(RUN) -m pip install $(PIP_OPTIONS) --quiet --disable-pip-version-check

.NOTPARALLEL:
.PHONY: demo docs tables figures test coverage fuzz lint types check pins release codegen agreement test-matrix test-triton-smoke \
    test-processors test-processors-smoke mutants ptx ptx-mutants clean gpu gpu-there gpu-look gpu-warm gpu-test \
    gpu-stress gpu-sanitize gpu-memcheck gpu-racecheck gpu-tune gpu-bench gpu-bench-quick gpu-bench-full

# torch without a hash: which build fits depends on the machine
$(READY): pyproject.toml constraints.txt pins.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is required, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --no-deps -r pins.txt
	$(PIP) -c constraints.txt torch
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

demo: $(READY)
	$(RUN) -m triton_lstm train --compare

# The pages of docs/, perf/ and the top level, and the reference from docstrings: build/docs/docs/index.html. Offline; a
# broken link or a public name without docstring is an error
docs: $(READY)
	$(RUN) -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs

# The tables in pages, from the code and from stored results
tables: $(READY)
	$(RUN) -m cogapp -I docs -I tests/helpers -r $(shell grep -rl --include='*.md' '\[\[\[cog' README.md RELIABILITY.md docs)

# The pictures of README.md and docs/
figures: $(READY)
	$(RUN) docs/figures
	$(RUN) -m triton_lstm train --folder runs/figure --resume-or-start
	$(RUN) -m triton_lstm gradients --checkpoint runs/figure --plot docs/images/real_text.png

# RECORD=1 writes what came of it to docs/last_runs.csv, for RELIABILITY.md
test: $(READY)
	$(RUN) -m pytest -n auto --dist loadfile $(RECORDED)

RECORDED = $(if $(RECORD),--record $@)

# The same tests, and which lines and branches they run, at least 95% of both and of branches alone (tests/helpers/last_runs.py).
# --cov comes last, as a path after it would be what is measured
coverage: $(READY)
	$(RUN) -m pytest -n auto --dist loadfile $(RECORDED) --cov

# Other random calls than those of `make test`, and a thousand of them
FUZZ_CASES ?= 1000
fuzz: $(READY)
	FUZZ_CASES=$(FUZZ_CASES) $(RUN) -m pytest -n auto tests/module/test_fuzz.py $(RECORDED)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	.venv/bin/lint-imports --no-logo

types: $(READY)
	$(RUN) -m mypy

check: lint types test

# The versions of all packages that pyproject.toml asks for, on every Python, and their hashes. A version stays as it is
# while it can, with UPGRADE=1 the newest is taken; torch and triton are chosen in pyproject.toml. CUDA belongs to torch.
COMPILE = .venv/bin/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --custom-compile-command 'make pins'
pins: $(READY)
	$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml --all-extras -o constraints.txt
	sed -i -e '/^\(cuda\|nvidia\)-/d' -e '1i # What was tested together' constraints.txt
	$(COMPILE) --upgrade constraints.txt --no-deps --generate-hashes --no-emit-package torch -o pins.txt

# What a release of this commit would be, checked and tried, in dist/. It uploads nothing
release: $(READY)
	PIP_OPTIONS='$(PIP_OPTIONS)' .ci/release

# Every kernel that can be planned, compiled for six architectures: the table that test_codegen.py compares with
codegen: $(READY)
	mkdir -p perf/results
	env -u TRITON_INTERPRET $(RUN) tests/helpers/codegen.py --csv perf/results/codegen.csv
	$(RUN) -m triton_lstm.perf.step.agreement --stored

# How well the cost model orders plans, two thousand of which are compiled and modelled: an hour on two cores
agreement: $(READY)
	$(RUN) -m triton_lstm.perf.step.agreement

# Every mutant of small compiled kernels (an hour): the table of what notices them
ptx-mutants: $(READY)
	env -u TRITON_INTERPRET PYTHONPATH=tests:tests/helpers $(RUN) -W ignore -m ptx.scan --all --table docs/explanation/ptx_mutants.md

# Changes of the Python code that no test notices (hours; a stopped run goes on): docs/explanation/mutants.md
mutants: $(READY)
	nice $(RUN) tests/mutants/run.py

# Compiled kernels in the emulator: the tests of what runs them, on each GPU that it knows, and all mutants
PTX_GPUS := A100 RTX_3090 H100 B200 RTX_5090
PTX_TESTS = tests/ptx/emulated.py $(call files,layer packed packed_calls states record record_calls autograd weights) \
    -k "not T33 and not accuracy"
ptx: $(READY) $(PTX_GPUS:%=ptx-%) ptx-mutants

$(PTX_GPUS:%=ptx-%): ptx-%: $(READY)
	PTX_GPU="$(subst _, ,$*)" PTX_WEAK=1 PTX_SEEDS=5 $(RUN) -m pytest -q -n auto --dist worksteal $(PTX_TESTS)

# Kernels with the oldest Triton, and the torch of .venv
files = $(foreach name,$(1),$(or $(wildcard tests/*/test_$(name).py),$(error there is no test_$(name).py)))
SMOKE_TESTS := $(call files,record launch launcher interpreter tune codegen)

.triton/%: | $(READY)
	rm -rf $@.new
	$(PIP) --no-deps --target $@.new triton==$*
	mv $@.new $@

test-triton-smoke: .triton/3.5.0
	PYTHONPATH=.triton/3.5.0 $(RUN) -m pytest -q -n auto --dist loadfile $(SMOKE_TESTS)

# Chosen tests with other versions of Python and of the packages: docs/reference/versions.md. One environment at a time, gigabytes
# each and deleted after: all of them, or those of ENVIRONMENTS="oldest newest".
ENVIRONMENTS :=
MATRIX_TESTS := $(call files,launcher launch interpreter tune packed_calls contract compile compile_fallback onnx operators \
    policy text_cache runs doctor perf_report) \
    $(addprefix tests/training/,test_train.py::test_learns_and_reports $(addprefix test_metrics.py::test_,tensorboard wandb_offline))
test-matrix: $(READY)
	PIP_OPTIONS='$(PIP_OPTIONS)' $(RUN) tests/helpers/matrix.py $(ENVIRONMENTS:%=--environment %) $(MATRIX_TESTS)

# The libraries below PyTorch and NumPy use other code paths on other processors, which changes the last bits of every sum.
# These select such paths: the numeric tests must pass with each of them, on any machine.
PROCESSORS := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
    ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell OPENBLAS_CORETYPE=Prescott OMP_NUM_THREADS=1 OMP_NUM_THREADS=2 \
    OMP_NUM_THREADS=8
NUMERIC := $(call files,tolerance layer packed packed_calls states record record_calls record_effects exchange \
    exchange_packed parts autograd func weights contract module torch_modules train trainer tune perf_check perf_providers)
SENSITIVE := $(call files,tolerance layer perf_check)

test-processors: $(READY)
	for setting in $(PROCESSORS); do \
	    echo "$$setting"; env $$setting $(RUN) -m pytest -n auto --dist loadfile $(NUMERIC) || exit 1; done

# The most sensitive cases only
test-processors-smoke: $(READY)
	for setting in $(PROCESSORS); do \
	    echo "$$setting"; env $$setting $(RUN) -m pytest -n auto -m sensitive $(SENSITIVE) || exit 1; done

# On a machine with an NVIDIA GPU and its own torch, triton and the packages of the extras `perf` and `test`: no network,
# no .venv. Every piece can be run alone, is stopped after LIMIT seconds, and writes one CSV and one log to
# perf/results/<gpu>, or to OUT=folder; gpu-bench and gpu-tune resume where they were stopped.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# From make's command line only: OUT in the environment may mean anything
OUT :=
GPU_PYTHON := env PYTHONPATH=$(CURDIR) PYTHONUNBUFFERED=1 $(PYTHON)
LIMIT = 540
GPU = timeout --kill-after=10 $(LIMIT) $(GPU_PYTHON)
THERE := $(if $(filter command,$(origin TO)),,gpu-there)
TO = $(eval TO := $(shell $(GPU_PYTHON) -m triton_lstm.cli.machine $(OUT)))$(TO)
LOG = 2>&1 | tee $(TO)/$@.log
SANITIZER = timeout --kill-after=10 $(LIMIT) env PYTHONPATH=$(CURDIR) PYTHONUNBUFFERED=1 \
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9
TABLE = $(shell $(GPU_PYTHON) -m triton_lstm.cli.machine --table)
SHAPES := --hidden 128,256,512,768,1024 --batch 16,64,256 --dtype bf16,fp16,tf32
# The most important tests first; half of the cores are for gpu-warm; one process if pytest-xdist is missing
FIRST := $(call files,layer packed packed_calls contract weights torch_modules states compile)
TESTS := $(FIRST) $(filter-out $(FIRST) tests/kernels/test_codegen.py,$(sort $(wildcard tests/test_*.py tests/*/test_*.py)))
XDIST = $(shell $(GPU_PYTHON) -c 'import os, xdist; print("-n", max(1, min(8, os.cpu_count() // 2)), "--dist loadfile")' \
    2>/dev/null)

# Correctness in parallel, then timing on an idle GPU. A failure does not stop the other pieces, unless gpu-look found
# something BAD
gpu: gpu-look
	@beside=(); failed=0; \
	for piece in gpu-warm gpu-memcheck gpu-racecheck; do $(MAKE) TO=$(TO) $$piece & beside+=($$!); done; \
	$(MAKE) TO=$(TO) gpu-test || failed=2; \
	for process in $${beside[@]}; do wait $$process || failed=2; done; \
	$(MAKE) TO=$(TO) --keep-going gpu-bench-quick gpu-stress gpu-tune gpu-bench || failed=2; \
	exit $$failed

gpu-sanitize: gpu-memcheck gpu-racecheck

gpu-there:
	@output=$$($(GPU_PYTHON) -c 'import torch, triton, pandas, matplotlib, rich, tabulate, jinja2, filelock, pytest, \
	hypothesis' 2>&1) || { echo "$(PYTHON) lacks a package ($${output##*$$'\n'}): choose another one with PYTHON=..." >&2; exit 2; }
	@$(GPU_PYTHON) -m triton_lstm.cli.machine $(OUT) > /dev/null

gpu-look: LIMIT = 60
gpu-look: $(THERE)
	{ TRITON_LSTM_SPIN_LIMIT=20000000 $(GPU) -m triton_lstm doctor \
	    && $(GPU) -m triton_lstm.perf.stress --small --out $(TO)/$@.csv; } $(LOG)

# The kernels of the timed pieces, compiled while the tests are running
gpu-warm: LIMIT = 420
gpu-warm: $(THERE)
	nice -n 10 $(GPU) -m triton_lstm.cli.warm --suite quick --suite standard $(SHAPES) $(LOG)

gpu-test: LIMIT = 420
gpu-test: $(THERE)
	$(GPU) -m pytest $(XDIST) $(TESTS) -o faulthandler_timeout=120 --csv $(TO)/$@.csv $(LOG)

gpu-stress: LIMIT = 240
gpu-stress: $(THERE)
	$(GPU) -m triton_lstm.perf.stress --out $(TO)/$@.csv $(LOG)

gpu-memcheck gpu-racecheck: LIMIT = 420
gpu-memcheck gpu-racecheck: $(THERE)
	@if command -v compute-sanitizer; \
	then $(SANITIZER) --tool $(@:gpu-%=%) $(PYTHON) -m triton_lstm.perf.stress --small --out $(TO)/$@.csv $(LOG); \
	else echo "$@: skipped, compute-sanitizer is not installed" $(LOG); fi

# Into the checkout, so that gpu-bench measures with the table that would be shipped
gpu-tune: LIMIT = 300
gpu-tune: $(THERE)
	$(GPU) -m triton_lstm tune $(SHAPES) --budget 270s --verbose --out $(TABLE) $(LOG)

gpu-bench-quick: LIMIT = 150
gpu-bench gpu-bench-quick gpu-bench-full: $(THERE)
	$(GPU) -m triton_lstm bench --suite $(patsubst gpu-bench,standard,$(@:gpu-bench-%=%)) --out $(TO)

clean:
	rm -rf .venv .triton .matrix .coverage* build dist *.egg-info runs
