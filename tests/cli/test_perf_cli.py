"""bench, report and diff from the command line; bad input gives one line and no traceback."""

import os
import subprocess
import sys

import filelock
import pandas as pd
import pytest
import torch
from child import python_path

from triton_lstm.cli import bench as commands
from triton_lstm.cli import main as cli
from triton_lstm.perf import bench, floor
from triton_lstm.perf.bench import all_combinations
from triton_lstm.perf.cases import SUITES
from triton_lstm.perf.failures import DeviceLostError
from triton_lstm.perf.results import load
from triton_lstm.settings import UsageError

SMALL = [
    "--only",
    "case=fp32-T3-B2-I8-H8",
    "--only",
    "mode=inference,graph_step",
    "--only",
    "provider=triton_lstm,nn.LSTM",
]
GPU = torch.cuda.is_available()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; returns its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(floor, "floor_names", lambda device: ["copy", "matmul-fp32"])

    def call(*argv):
        try:
            status = cli.main([str(arg) for arg in argv])
        except SystemExit as leave:  # argparse
            status = leave.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def measured(tmp_path_factory, device):
    """A folder with the smoke suite's first case."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "floor_names", lambda device: ["copy", "matmul-fp32", "exchange-flag-2"])
        assert cli.main(["bench", "--suite", "smoke", *SMALL, "--out", str(folder)]) == 0
    return folder


def test_bench(run, measured):
    files = {path.name for path in measured.iterdir()}
    assert {"bench_smoke.csv", "bench_smoke.log", "report.md", "report.html"} <= files
    assert not {name for name in files if name.endswith((".running", ".tmp"))}
    before = load([measured])
    status, out, _ = run("bench", "--suite", "smoke", *SMALL, "--out", measured)
    assert status == 0 and "triton_lstm" in out and "us per step" in out
    pd.testing.assert_frame_equal(load([measured]), before)  # all was there already
    if not GPU:
        assert (
            out.count("NOT A BENCHMARK") == 2 and "CUDA graphs need a GPU" in out and "times nn.LSTM's speed" not in out
        )
        for name in ("report.md", "report.html"):
            text = (measured / name).read_text()
            assert "NOT A BENCHMARK" in text and "LOSES" not in text.replace(".LOSES", "") and "not a benchmark" in text
        assert not (measured / "speedup.png").exists()


def test_the_whole_smoke_suite(tmp_path, device):
    """In a new process, as for a user; the cold modes run once, on one case."""
    command = [sys.executable, "-m", "triton_lstm", "bench", "--suite", "smoke", "--out", str(tmp_path)]
    only = "provider=triton_lstm,nn.LSTM,step by step,FlashRNN"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path()
    done = subprocess.run([*command, "--only", only], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
    frame = load([tmp_path])
    kept = frame[frame["provider"] == "triton_lstm"]
    wanted = {(case.name, mode) for case in SUITES["smoke"]() for mode in case.modes}
    assert {(row["case"], row["mode"]) for _, row in kept.iterrows() if row["mode"] != "all"} >= {
        pair for pair in wanted if "packed" not in pair[0]
    }
    ours = kept.set_index(["case", "mode"])
    assert ours.loc["fp32-T3-B2-I8-H8", "cold"]["ms"] > 10 and ours.loc["fp32-T3-B2-I8-H8", "cold"]["runs"] == 1
    assert set(frame[frame["provider"] == "nn.LSTM"]["status"]) <= {"ok", "skipped"}
    assert set(frame[frame["provider"] == "FlashRNN"]["reason"]) == {"flashrnn is not installed"}
    assert (frame[frame["provider"] == "device"]["status"] == "ok").all() and "exchange-flag-2" in set(frame["case"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["bench", "--suite", "huge"], "invalid choice: 'huge'"),
        (["bench", "--suite", "smoke", "--only", "H"], "must be COLUMN=VALUE"),
        (["bench", "--suite", "smoke", "--only", "=3"], "must be COLUMN=VALUE"),
        (["bench", "--suite", "smoke", "--only", "speed=3"], "no column 'speed'"),
        (
            ["bench", "--suite", "smoke", "--only", "provider=cudnn"],
            "unknown provider 'cudnn'. Available: triton_lstm,",
        ),
        (["bench", "--suite", "smoke", "--only", "mode=fast"], "unknown mode 'fast'. Available: inference,"),
        (["bench", "--suite", "smoke", "--only", "H=3"], "--only matches no case of this suite"),
        (["report"], "arguments are required"),
        (["report", "nowhere.csv"], "nowhere.csv cannot be read (No such file or directory)"),
        (["report", "."], "contains no bench_*.csv"),
        (["report", "/dev/zero"], "/dev/zero is not a file"),
        (["report", "{measured}", "--columns", ""], "no column ''"),
        (["report", __file__], "cannot be read (not a CSV)"),
        (["report", "{measured}", "--columns", "ms,velocity"], "no column 'velocity'"),
        (["report", "{measured}", "--only", "H=77"], "--only matches no row"),
        (["report", "{measured}", "--out", __file__], "Choose another path"),
        (["diff", "{measured}"], "arguments are required"),
        (["diff", "{measured}", "nowhere"], "nowhere cannot be read"),
        (["diff", "{measured}", "{measured}", "--only", "provider=nn.LSTM"], "nothing to compare"),
        (["bench", "--suite", "smoke", "--out", __file__], "test_perf_cli.py: File exists. Choose another path"),
    ],
)
def test_bad_input(run, measured, argv, message):
    status, _, err = run(*(arg.format(measured=measured) if "{m" in arg else arg for arg in argv))
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert err.startswith("triton-lstm") and "Traceback" not in err


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("suite", [[], ["--suite", "standard"]])
def test_no_gpu(run, suite):
    status, _, err = run("bench", *suite)
    assert status == 2 and "only --suite smoke runs" in err and len(err.splitlines()) == 1


@pytest.mark.skipif(GPU, reason="there is a GPU")
@pytest.mark.parametrize("module", ["cli.machine", "cli.warm", "perf.stress"])
def test_no_gpu_for_the_campaign(module):
    done = subprocess.run([sys.executable, "-m", f"triton_lstm.{module}"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no usable GPU" in done.stderr


def test_a_missing_package_is_named(run, measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    status, _, err = run("report", measured)
    assert status == 2 and 'requires tabulate: pip install ".[perf]"' in err


def test_report(run, measured, tmp_path):
    status, out, _ = run("report", measured, "--out", tmp_path / "again")
    assert status == 0 and "fp32-T3-B2-I8-H8" in out
    for name in ("report.md", "report.html"):
        assert (tmp_path / "again" / name).read_text() == (measured / name).read_text()
    status, out, _ = run(
        "report", measured / "bench_smoke.csv", "--columns", "provider,mode,error_share", "--only", "B=2"
    )
    assert status == 0 and "error share" in out and "us per step" not in out


def test_diff(run, measured, tmp_path):
    status, out, _ = run("diff", measured, measured / "bench_smoke.csv")
    assert status == 0 and "same: " in out and "SLOWER" not in out
    frame = load([measured])
    frame.loc[frame["provider"] == "triton_lstm", ["ms", "p20", "p80"]] *= 9
    frame.to_csv(tmp_path / "bench_slow.csv", index=False)
    status, out, _ = run("diff", measured, tmp_path / "bench_slow.csv")
    assert status == 1 and "SLOWER: " in out
    assert run("diff", tmp_path / "bench_slow.csv", measured)[0] == 0


def test_a_selection_does_not_replace_the_report(run, measured):
    before = (measured / "report.md").read_text()
    status, out, _ = run("report", measured, "--only", "provider=triton_lstm")
    assert status == 0 and "written to" not in out and (measured / "report.md").read_text() == before


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">/dev/null 2>&-"])
def test_closed_outputs(measured, closed):
    command = f"{sys.executable} -m triton_lstm report {measured} --columns ms {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_terminal_that_cannot_encode_a_character(measured, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "triton_lstm", "report", str(measured), "--out", str(tmp_path / "\u00fc\u2603")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_retry(run, measured, tmp_path):
    frame = load([measured])
    once = (frame["provider"] == "nn.LSTM") & (frame["mode"] == "inference")
    frame.loc[once, ["status", "reason"]] = ["failed", "once"]
    frame.to_csv(tmp_path / "bench_smoke.csv", index=False)
    again = [
        "bench",
        "--suite",
        "smoke",
        "--out",
        tmp_path,
        "--only",
        "case=fp32-T3-B2-I8-H8",
        "--only",
        "mode=inference",
    ]
    run(*again, "--only", "provider=nn.LSTM")
    run(*again, "--only", "provider=triton_lstm", "--retry")  # not of those
    assert (load([tmp_path])["reason"] == "once").sum() == 1
    run(*again, "--only", "provider=nn.LSTM", "--retry")
    found = load([tmp_path])
    assert "once" not in set(found["reason"]) and len(found) == len(frame)


def test_two_at_once(run, tmp_path):
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / "bench_smoke.lock"):
        status, _, err = run("bench", "--suite", "smoke", *SMALL, "--out", tmp_path / "out")
    assert status == 2 and "another bench is writing" in err and len(err.splitlines()) == 1


def test_results_of_other_code_are_kept_apart(run, measured, tmp_path):
    frame = load([measured])
    frame.assign(sources="0123").to_csv(tmp_path / "bench_smoke.csv", index=False)
    content = (tmp_path / "bench_smoke.csv").read_bytes()
    status, _, err = run("bench", "--suite", "smoke", *SMALL, "--out", tmp_path)
    assert status == 2 and "with sources '0123'" in err and "--out" in err
    assert (tmp_path / "bench_smoke.csv").read_bytes() == content


def test_ctrl_c(run, tmp_path, monkeypatch):
    def stopped(wanted, results, device):
        results.begin({"case": "x", "provider": "y", "mode": "z"})
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", stopped)
    status, out, _ = run("bench", "--suite", "smoke", "--out", tmp_path)
    assert status == 130 and "the same command resumes" in out and not (tmp_path / "bench_smoke.running").exists()


def test_a_lost_gpu_restarts_the_process(run, tmp_path, monkeypatch):
    def lost(wanted, results, device):
        raise DeviceLostError("illegal access")

    class Replaced(BaseException):
        pass

    def execv(program, command):
        with filelock.FileLock(tmp_path / "bench_smoke.lock", timeout=0):  # the fresh process can have it
            raise Replaced(command)

    monkeypatch.setattr(bench, "run", lost)
    monkeypatch.setattr(os, "execv", execv)
    argv = ["bench", "--suite", "smoke", *SMALL, "--out", str(tmp_path), "--retry"]
    status, _, err = run(*argv)  # this process is pytest's
    assert status == 2 and "can no longer use the GPU (illegal access). The same command in a fresh process" in err
    monkeypatch.setattr(sys, "argv", ["triton-lstm", *argv])
    with pytest.raises(Replaced) as replaced:
        cli.main()
    command = replaced.value.args[0]
    assert command[1:4] == ["-m", "triton_lstm", "bench"] and "--retry" not in command  # or it would start over
    assert command[-2:] == ["--out", str(tmp_path)] and command.count("--only") == 3


def test_exit_status_1_if_ours_is_wrong(run, tmp_path, monkeypatch):
    def wrong(wanted, results, device):
        row = {"case": "fp32-T3-B2-I8-H8", "provider": "triton_lstm", "mode": "all"}
        results.add(row | {"status": "wrong", "reason": "y"})

    monkeypatch.setattr(bench, "run", wrong)
    status, out, _ = run("bench", "--suite", "smoke", "--out", tmp_path)
    assert status == 1 and "wrong: y" in out


def test_choose():
    wanted = all_combinations(SUITES["standard"]())
    some = commands.choose(wanted, {"H": ["512"], "packed": ["TRUE"], "provider": ["nn.LSTM"], "mode": ["backward"]})
    assert [(case.name, provider.name, mode) for case, provider, mode in some] == [
        ("bf16-T128-B64-I512-H512-packed", "nn.LSTM", "backward")
    ]
    assert commands.choose(wanted, {}) == wanted
    some = commands.choose(wanted, {"T": ["128"], "precision": ["bf16"], "resets": ["0", "0.001", "0.1"]})
    assert {case.name for case, _, _ in some} == {
        f"bf16-T128-B64-I512-H512-resets{percent}%" for percent in ("0", "0.1", "10")
    }
    none = commands.choose(wanted, {"resets": ["none"]})
    assert none == [item for item in wanted if item[0].resets is None] != wanted
    with pytest.raises(UsageError):
        commands.choose(wanted, {"why": ["x"]})
