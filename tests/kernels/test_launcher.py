"""What arrives at CUDA: Triton's own driver and launcher, over a stand-in for libcuda that runs nothing."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from triton_lstm.planning.devices import GPUS, KIB
from triton_lstm.planning.limits import shared_bytes
from triton_lstm.planning.plan import Plan
from triton_lstm.planning.problem import Problem

HELPERS = Path(__file__).parents[1] / "helpers"
TOO_LARGE = 720  # CUDA's answer to a cooperative launch of more programs than run at once
ALONE = Plan("none", True, True, 16, 32, 32, 1, 1, 4)
FLAG = Plan("flag", True, True, 16, 16, 32, 1, 1, 4)
BARRIER = dataclasses.replace(FLAG, exchange="barrier", groups=2)
STEPS = dataclasses.replace(FLAG, one_launch=False)
CROWDED = dataclasses.replace(FLAG, warps=8, groups=40)  # 80 programs a direction; an H100 has 132 processors
SPLIT = dataclasses.replace(FLAG, block_h=32, splits=2)
HEAVY = Plan("flag", True, True, 16, 32, 64, 1, 1, 4)  # 68 KiB with 256 units


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    cooperative: bool = True
    steps: tuple[int, int] = (0, 3)
    answer: int = 0


EACH_DIRECTION = [Launch((2, 1, 1))] * 2  # of kernels that differ
EACH_STEP = [Launch((2, 1, 2), cooperative=False, steps=(t, t + 1)) for t in range(3)]
USUAL = dict(T=3, B=5, H=32, D=1, packed=False, offset=0, limit=0, offers=[(None, None)])
# The plan, what is unusual about the calls, and the launches of each call
CASES = {
    "alone": (ALONE, {}, [[Launch((1, 1, 1), cooperative=False)]]),
    "flag": (FLAG, {}, [[Launch((2, 1, 1))]]),
    "barrier": (BARRIER, dict(packed=True, B=40), [[Launch((2, 2, 1))]]),
    "split": (SPLIT, dict(D=2, B=20, limit=9), [[Launch((2, 1, 2))]]),
    "both directions": (FLAG, dict(D=2), [[Launch((2, 1, 2))]]),
    "one direction at a time": (CROWDED, dict(D=2), [[e._replace(grid=(2, 40, 1)) for e in EACH_DIRECTION]]),
    "step by step": (STEPS, dict(D=2), [EACH_STEP]),
    "refused": (  # 3 processors for 4 programs that wait for each other; the second call has 2 at a time
        FLAG,
        dict(D=2, offers=[(3, None), (3, None)]),
        [[Launch((2, 1, 2), answer=TOO_LARGE), *EACH_STEP], EACH_DIRECTION],
    ),
    "spin limit": (BARRIER, dict(limit=9), [[Launch((2, 2, 1))]]),
    "heavy": (HEAVY, dict(H=256), [[Launch((8, 1, 1))]]),
    "streamed": (HEAVY, dict(H=256, offers=[(None, 64 * KIB)]), [[Launch((8, 1, 1))]]),
    "misaligned": (FLAG, dict(offset=1), [[Launch((2, 1, 1))]]),
    "other sizes": (FLAG, dict(T=16, B=1), [[Launch((2, 1, 1), steps=(0, 16))]]),
}
WARNINGS = {"refused": r"too many blocks in cooperative launch.*every time step separately", "streamed": "are streamed"}
BACKWARD = ("alone", "flag", "barrier", "both directions")  # too
RUNS = [("H100", name, backward) for name in CASES for backward in (False, True) if name in BACKWARD or not backward]
RUNS.remove(("H100", "split", False))  # there is none
RUNS += [("H100", "split", True), ("A100", "flag", False), ("A100", "streamed", False)]
RUNS.remove(("H100", "streamed", False))  # "heavy" is there already, and a kernel is loaded once


def described(name, backward):
    plan, unusual, _ = CASES[name]
    return USUAL | unusual | dict(plan=dataclasses.astuple(plan), backward=backward)


def compiler():
    """The C compiler that Triton takes. Skips, with the reason, where there is none or nothing to compile with it."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: kernels are launched there, not on a stand-in")
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this Triton has no backend for NVIDIA")
    chosen = os.environ.get("CC")
    program = shutil.which("gcc") or shutil.which("clang") if chosen is None else shutil.which(chosen)
    if program is None:
        pytest.skip("no C compiler: " + ("neither gcc nor clang" if chosen is None else f"CC={chosen} is not there"))
    look = [program, "-I" + sysconfig.get_path("include", "posix_prefix"), "-E", "-x", "c", "-"]
    looked = subprocess.run(look, input="#include <Python.h>", capture_output=True, text=True)
    if looked.returncode:
        pytest.skip(f"{program} cannot include Python.h: {looked.stderr.strip()}")
    return program


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What arrived, by run; one process for each GPU."""
    program, folder = compiler(), tmp_path_factory.mktemp("cuda")
    headers = "-I" + str(Path(importlib.util.find_spec("triton.backends.nvidia").origin).parent / "include")
    source, library = HELPERS / "stand_in_cuda.c", folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([program, headers, *options, "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library)  # to which Triton 3.5 links
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_LIBCUDA_PATH"] = str(folder)
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    found = {}
    for gpu in ("H100", "A100"):
        runs = [run for run in RUNS if run[0] == gpu]
        cases = json.dumps([described(name, backward) for _, name, backward in runs])
        command = [sys.executable, str(HELPERS / "stand_in_gpu.py"), gpu, cases]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        rows = done.stdout.splitlines()
        assert done.returncode == 0, f"{runs[len(rows)]} ended with {done.returncode}. {done.stderr}"
        found |= zip(runs, map(json.loads, rows), strict=True)
    return found


def expected(case, call, launch):
    """A launch as CUDA has to see it, but for the shared memory and which kernel it is."""
    begin, end = launch.steps
    numbers = dict(step_begin=begin, step_end=end, T=case["T"], B=case["B"])
    parameters = [[name, 8, address] for name, address in call["pointers"].items()]
    parameters += [[name, 4, number] for name, number in numbers.items()]
    parameters.sort(key=lambda parameter: call["arguments"].index(parameter[0]))
    return dict(
        name="lstm_backward_kernel" if case["backward"] else "lstm_forward_kernel",
        result=launch.answer,
        grid=list(launch.grid),
        block=[32 * Plan(*case["plan"]).warps, 1, 1],
        cluster=[1, 1, 1],
        cooperative=int(launch.cooperative),
        attributes=int(launch.cooperative),  # and no other one
        stream=call["stream"],
        parameters=[*parameters, ["global scratch", 8, 0], ["profile scratch", 8, 0]],  # Triton's, null where unused
    )


def arrived(launch, names):
    """The same of what came, its parameters named; a name or a parameter too many stands alone."""
    plain = {key: value for key, value in launch.items() if key not in ("kernel", "shared", "counted")}
    named = [[name, *(parameter or ())] for name, parameter in zip_longest(names, launch["parameters"])]
    return plain | dict(parameters=named)


@pytest.mark.parametrize("gpu, name, backward", RUNS)
def test_what_arrives(gpu, name, backward, reports):
    """Every launch in full, after the exchange was made ready; and a warning, once, where it is not the planned one."""
    case, calls = described(name, backward), reports[gpu, name, backward]
    for call, launches in zip(calls, CASES[name][2], strict=True):
        wanted = [expected(case, call, launch) for launch in launches]
        names = [name for name, _, _ in wanted[0]["parameters"]]
        assert [arrived(launch, names) for launch in call["launches"]] == wanted
        assert call["ready"]
    told = [text for call in calls for text in call["warnings"] if re.search("refused|streamed", text)]
    assert len(told) == (name in WARNINGS) and all(re.search(WARNINGS[name], text) for text in told)


@pytest.mark.parametrize("gpu, name, backward", RUNS)
def test_shared_memory(gpu, name, backward, reports):
    """As many bytes as the compiler counted and no more than planned; for more than 48 KiB, CUDA has to be asked."""
    case = described(name, backward)
    plan = dataclasses.replace(CASES[name][0], resident=name != "streamed")
    planned = shared_bytes(Problem(GPUS[gpu], "bf16", case["B"], case["H"], backward, case["D"]), plan)
    for launch in (launch for call in reports[gpu, name, backward] for launch in call["launches"]):
        assert 0 < launch["shared"] == launch["counted"] <= planned
        assert (launch["shared"] > 48 * KIB) == (name == "heavy")


def test_which_kernel_is_launched(reports):
    """For another T and B the same one; for a pointer that is not aligned another one, which does not rely on it."""
    names = "flag", "other sizes", "misaligned"
    usual, other_sizes, misaligned = (reports["H100", name, False][0]["launches"][0] for name in names)
    assert usual["kernel"] == other_sizes["kernel"] != misaligned["kernel"]
    assert [launch["parameters"][0][1] % 16 for launch in (usual, misaligned)] == [0, 2]


@pytest.mark.parametrize("name", ["one direction at a time", "refused"])
def test_each_direction_alone_has_a_kernel_of_its_own(name, reports):
    forward, against_time = reports["H100", name, False][-1]["launches"]
    assert forward["kernel"] != against_time["kernel"]
