# make demo, make test: all set-up included; only Python >= 3.10, git and make are needed.
PYTHON ?= python3
PIP_OPTIONS ?=
RUN := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test lint types check gpu gpu-test gpu-stress gpu-times clean

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

# On a machine with an NVIDIA GPU and its own torch and triton; no network, no .venv.
OUT ?= perf/results/$(shell $(PYTHON) -m perf.gpu name)

gpu: gpu-test gpu-stress gpu-times

gpu-test:
	$(PYTHON) -m pytest -p no:xdist --junitxml=$(OUT)/tests.xml

gpu-stress:
	$(PYTHON) -m perf.gpu stress --out $(OUT)

gpu-times:
	$(PYTHON) -m perf.gpu times --out $(OUT)

clean:
	rm -rf .venv build *.egg-info runs
