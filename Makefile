# make demo, make test: all set-up included; only Python >= 3.10, git and make are needed.
PYTHON ?= python3
PIP_OPTIONS ?=
RUN := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test lint types check gpu gpu-test gpu-test-layer gpu-test-plans gpu-test-rest gpu-stress gpu-times clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install $(PIP_OPTIONS) --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(RUN) -m triton_lstm train --compare --checkpoint runs/demo.pt --overwrite

test: $(READY)
	$(RUN) -m pytest -n auto --dist loadfile

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m mypy

check: lint types test

# On a machine with an NVIDIA GPU and its own torch, triton, pandas, tqdm and pytest: no network, no .venv.
# OUT=folder puts the results there instead of perf/results/<gpu>. Each piece ends within ten minutes or is stopped.
GPU := timeout --kill-after=10 590 env PYTHONPATH=$(CURDIR) $(PYTHON)
TO := $(if $(OUT),--out $(OUT))

# All pieces run, also after one that failed
gpu:
	$(MAKE) --keep-going gpu-test-layer gpu-test-plans gpu-test-rest gpu-stress gpu-times

gpu-test: gpu-test-layer gpu-test-plans gpu-test-rest

gpu-test-layer:
	$(GPU) -m pytest tests/test_layer.py -k against_nn_lstm

gpu-test-plans:
	$(GPU) -m pytest tests/test_layer.py -k 'not against_nn_lstm'

gpu-test-rest:
	$(GPU) -m pytest --ignore=tests/test_layer.py --ignore=tests/test_codegen.py

gpu-stress:
	$(GPU) -m triton_lstm.perf.gpu stress $(TO)

gpu-times:
	$(GPU) -m triton_lstm.perf.gpu times $(TO)

clean:
	rm -rf .venv build *.egg-info runs
