"""Compiled kernels on emulated GPUs, without TRITON_INTERPRET: this folder's cases, and other tests as they are."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU that is here", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LAYER, PACKED, STATES = "tests/operator/test_layer.py", "tests/module/test_packed.py", "tests/module/test_states.py"
RECORD, AUTOGRAD = "tests/gradients/test_record.py", "tests/operator/test_autograd.py"
OWN = "tests/ptx/emulated.py"
# A GPU, whether its memory is weak, files, and which of their tests; `make ptx` runs all of them on every GPU
CASES = {
    "A100": (True, [OWN], ""),
    "H100": (
        True,
        [OWN, STATES],
        "wgmma or of_this_gpu or nan_in or (recompute_against and False-dtype1 and not layers)",
    ),
    "B200": (True, [OWN, AUTOGRAD, LAYER], "of_this_gpu or double_backward_of or (several and T2 and H64) or infinite"),
    "RTX 3090": (True, [LAYER, PACKED], "(several and T5 and H64) or (different_lengths and flag and groups1)"),
    "RTX 5090": (True, [OWN, RECORD], "turn or streamed or (norms_only and backendtriton and layoutdense)"),
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("gpu", CASES)
def test_on_an_emulated(gpu, tmp_path):
    weak, files, which = CASES[gpu]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment |= {"PTX_GPU": gpu, "PTX_WEAK": str(int(weak))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--csv",
        str(tmp_path / "tests.csv"),
        *files,
    ]
    done = subprocess.run([*command, "-k", which], cwd=ROOT, env=environment, capture_output=True, text=True)
    with (tmp_path / "tests.csv").open(newline="") as file:
        outcomes = [row["outcome"] for row in csv.DictReader(file)]
    assert done.returncode == 0 and outcomes.count("passed") >= 3, done.stdout[-6000:] + done.stderr[-2000:]
