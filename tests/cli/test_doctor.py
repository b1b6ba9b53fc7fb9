"""The command doctor: its findings and remedies."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from triton_lstm.cli import doctor
from triton_lstm.cli import main as cli
from triton_lstm.planning.devices import GPUS, file_name
from triton_lstm.tuning import tables
from triton_lstm.tuning.table_file import LayerTime, update

H200 = GPUS["H200"]


@pytest.fixture
def run(capsys):
    def call():
        status = cli.main(["doctor"])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_here(run, device):
    status, out, _ = run()
    assert status == 0 and "no problems found" in out and "agrees with nn.LSTM" in out


@pytest.mark.parametrize(
    "name, value", [("BACKEND", "best"), ("AUTOTUNE", "yes"), ("SPIN_LIMIT", "-1"), ("FP32", "tf16")]
)
def test_a_bad_variable_is_named(name, value, run, monkeypatch):
    monkeypatch.setenv(f"TRITON_LSTM_{name}", value)
    status, out, _ = run()
    assert status == 1 and f"-> unset TRITON_LSTM_{name}" in out


def test_a_wrong_result_is_bad(run, device, monkeypatch):
    shipped = doctor.triton_lstm.LSTM.forward

    def wrong(self, *args):
        output, states = shipped(self, *args)
        return output * 1.5, states

    monkeypatch.setattr(doctor.triton_lstm.LSTM, "forward", wrong)
    status, out, _ = run()
    assert status == 1 and "BAD  forward, backward" in out and "times the allowed error" in out


def test_a_check_that_raises_is_bad_not_a_traceback(run, monkeypatch):
    def broken(device):
        raise RuntimeError("nvcc ate it\nsecond line")

    monkeypatch.setattr(doctor, "_results", broken)
    status, out, err = run()
    assert status == 1 and "RuntimeError: nvcc ate it" in out and "Traceback" not in out + err


@pytest.mark.skipif(torch.cuda.is_available(), reason="changes the environment of a run without a GPU")
def test_without_triton():
    code = "import sys; sys.modules['triton'] = None\nfrom triton_lstm.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 1 and "pip install triton" in done.stdout and "Traceback" not in done.stderr


def test_tables_are_found_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv(tables.FOLDER, str(tmp_path))
    path = tmp_path / file_name(H200.name)
    assert any("none for NVIDIA H200" in finding.text for finding in doctor._tables())
    update(path, "x", LayerTime("training", "bf16", 24, 16, 4.0, 6.0))
    assert any(f"{path}: 0 configs, 1 layer times" in finding.text for finding in doctor._tables())
    path.write_text("?")
    assert any(finding.state == "BAD" and str(path) in finding.text for finding in doctor._tables())


def test_the_tables_folder_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setenv(tables.FOLDER, str(tmp_path))
    update(tmp_path / "a_gpu.json", "a gpu", LayerTime("training", "bf16", 24, 16, 4.0, 6.0))
    assert f"{tables.FOLDER}={tmp_path}: a_gpu.json" in run()[1]
    monkeypatch.setenv(tables.FOLDER, str(tmp_path / "a_gpu.json"))
    status, out, _ = run()
    assert status == 1 and "is not a folder" in out


def test_the_tables_folder_below_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    update(tmp_path / "tables" / "a_gpu.json", "a gpu", LayerTime("training", "bf16", 24, 16, 4.0, 6.0))
    monkeypatch.setenv(tables.FOLDER, "~/tables")
    assert doctor._named_folder().text == f"{tables.FOLDER}=~/tables: a_gpu.json"
    monkeypatch.setenv(tables.FOLDER, "~/none")
    assert doctor._named_folder().text == f"{tables.FOLDER}=~/none: no tables yet"


def test_an_unreadable_tables_folder_is_bad(run, tmp_path, monkeypatch):
    monkeypatch.setenv(tables.FOLDER, "~no_such_user_here/tables")
    status, out, err = run()
    assert status == 1 and "the home folder of a user that does not exist" in out and "Traceback" not in err
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv(tables.FOLDER, str(tmp_path / "link"))
    finding = doctor._named_folder()
    assert finding.state == "BAD" and "is a broken symbolic link" in finding.text
    monkeypatch.setenv(tables.FOLDER, str(tmp_path / ("long" * 100)))
    finding = doctor._named_folder()
    assert finding.state == "BAD" and "cannot be read: File name too long" in finding.text


@pytest.mark.parametrize("version, state", [("2.8.1", "BAD"), ("2.13.0+cpu", "ok")])
def test_an_old_torch_is_bad(version, state, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._torch().state == state


@pytest.mark.parametrize(
    "outcome, state, says",
    [
        (RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"), "BAD", "MPS"),
        (None, "ok", "wait for each other"),
    ],
    ids=["refused", "accepted"],
)
def test_the_cooperative_launch(outcome, state, says, monkeypatch):
    class Loop:
        def __init__(self, programs, *args, **kwargs):
            assert programs == H200.processors

        def run(self):
            if outcome:
                raise outcome

        def complete(self):
            return True

    monkeypatch.setattr("triton_lstm.kernels.device_facts", lambda device: H200)
    monkeypatch.setattr("triton_lstm.perf.exchange_loop.ExchangeLoop", Loop)
    finding = doctor._cooperative(torch.device("cuda", 0))
    assert finding.state == state and says in finding.text + finding.remedy


@pytest.mark.parametrize("driver", ["", "580.159"])
def test_a_gpu_is_described(driver, monkeypatch):
    properties = types.SimpleNamespace(name=H200.name, total_memory=141 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(doctor, "machine", lambda: {"driver": driver})
    text = "NVIDIA H200, 141 GiB, 132 processors" + (f", driver {driver}" if driver else "")
    assert doctor._gpu() == doctor.Finding("GPU", "ok", text)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [finding.remedy for finding in doctor._environment()] == ["unset TRITON_INTERPRET"]


@pytest.mark.parametrize("build, says", [(None, "CPU-only build"), ("13.0", "check its driver")])
def test_no_gpu_is_a_note(build, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    finding = doctor._gpu()
    assert finding.state == "note" and says in finding.text + finding.remedy


def test_programs_that_do_not_see_each_other_are_bad(monkeypatch):
    loop = types.SimpleNamespace(run=lambda: None, complete=lambda: False)
    monkeypatch.setattr("triton_lstm.kernels.device_facts", lambda device: H200)
    monkeypatch.setattr("triton_lstm.perf.exchange_loop.ExchangeLoop", lambda *args, **kwargs: loop)
    finding = doctor._cooperative(torch.device("cuda", 0))
    assert finding.state == "BAD" and "132 programs did not see each other's stores" in finding.text


def test_results_are_not_run_where_no_kernel_can(monkeypatch):
    monkeypatch.setattr("triton_lstm.dispatch.why_torch", lambda *_: "the GPU is too old")
    finding = doctor._results(torch.device("cpu"))
    assert finding.state == "BAD" and finding.text.endswith("not run: the GPU is too old")


def test_no_folder_for_tables_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H200.name)
    monkeypatch.delenv(tables.FOLDER, raising=False)
    monkeypatch.setattr(doctor, "user_folder", lambda: None)
    assert list(doctor._tables())[-1].remedy == f"set {tables.FOLDER} to a folder"


@pytest.mark.parametrize("there, state", [(True, "ok"), (False, "note")])
def test_cudnn(there, state, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    finding = doctor._cudnn()
    assert finding.state == state and finding.text.startswith("91900" if there else "not available")


def test_another_error_of_a_launch_is_an_error(monkeypatch):
    def run():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr("triton_lstm.kernels.device_facts", lambda device: H200)
    loop = types.SimpleNamespace(run=run)
    monkeypatch.setattr("triton_lstm.perf.exchange_loop.ExchangeLoop", lambda *args, **kwargs: loop)
    with pytest.raises(RuntimeError, match="illegal"):
        doctor._cooperative(torch.device("cuda", 0))
