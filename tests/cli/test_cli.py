"""Common to all commands: version, hints, dtype names, one full stop, no control sequences."""

import pytest

pytest.importorskip("pandas")
import torch
from frames import make

import triton_lstm
from triton_lstm import settings
from triton_lstm.cli import main as cli
from triton_lstm.cli.common import command_device
from triton_lstm.settings import DTYPES, UsageError

COMMANDS = ("train", "runs", "gradients", "bench", "report", "diff", "tune", "doctor")
TORCH = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        try:
            status = cli.main(list(argv))
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return call


def test_version(run):
    assert run("--version")[:2] == (0, f"triton-lstm {triton_lstm.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_refer_to_the_commands_own_help(command, run):
    needed = {"report": ["x"], "diff": ["x", "y"]}.get(command, [])
    status, _, err = run(command, *needed, "--foo", "bar")
    expected = "Unknown option: --foo" if command == "train" else "unrecognized arguments: --foo"
    expected = f"triton-lstm {command}: {expected}"
    assert status == 2 and err.startswith(expected) and err.endswith(f"See triton-lstm {command} --help.\n")


def test_unknown_commands_and_options(run):
    status, _, err = run("--foo", "train")
    assert status == 2 and err == "triton-lstm: unrecognized arguments: --foo. See triton-lstm --help.\n"


@pytest.mark.parametrize("spelling", [*DTYPES, *TORCH])
def test_one_set_of_dtype_names(spelling, run, monkeypatch):
    """Every command with dtypes accepts both spellings; all help texts list the same ones."""
    name, told = TORCH.get(spelling, spelling), []
    monkeypatch.setattr(
        "triton_lstm.training.logs.trackers.require_trackers",
        lambda config: told.append(config.execution.dtype) or refuse(),
    )
    monkeypatch.setattr("triton_lstm.perf.report.print_columns", lambda frame, columns: told.extend(frame["precision"]))
    monkeypatch.setattr("triton_lstm.perf.results.load", lambda paths: make([2.0]).assign(precision=name))

    def refuse():
        raise UsageError("enough")

    run("train", "--dtype", spelling)
    run("report", "x", "--columns", "ms", "--only", f"precision={spelling}")
    assert told and set(told) == {name}
    status, out, err = run("tune", "--dry-run", "--gpu", "H200", "--hidden", "64", "--batch", "16", "--dtype", spelling)
    assert (status == 0 and f"\n{name} " in out) or (name == "fp64" and "no kernel computes in fp64" in err)


def test_dtypes_in_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = run("train", "--help")[1].replace("│", " ").split()
    assert "[choices: fp16, bf16, tf32, fp32, fp64]" in " ".join(words)
    out = run("tune", "--help")[1]
    assert "bf16, fp16, tf32, fp32" in out and "float" not in out.replace("float32 with TF32", "")


def test_both_spellings_give_the_same_configuration():
    pytest.importorskip("pydantic")
    from triton_lstm.training.config import Execution

    assert Execution(dtype="bfloat16") == Execution(dtype="bf16")
    assert DTYPES[Execution(dtype="bfloat16").dtype] is torch.bfloat16


@pytest.mark.parametrize("allowed", ["tf32", "fp32"])
def test_train_sets_the_switch_of_its_dtype_and_restores_it(allowed, run, monkeypatch):
    seen = []
    monkeypatch.setattr("triton_lstm.cli.train._run", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or 0)
    before = torch.backends.cudnn.allow_tf32
    assert run("train", "--dtype", allowed)[0] == 0
    assert seen == [allowed == "tf32"] and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--dtype", "int8"],
        ["train", "--text", "nowhere"],
        ["train", "--resume"],
        ["gradients", "--checkpoint", "nowhere.pt"],
        ["gradients", "--plot", "a.gif"],
        ["bench", "--suite", "smoke", "--only", "provider=x"],
        ["report", "nowhere"],
        ["report", "damaged.csv"],
        ["report", "good.csv", "--columns", "x"],
        ["diff", "good.csv", "other.csv"],
        ["tune", "--gpu", "Z80"],
        ["tune", "--dry-run", "--again", "--gpu", "H200"],
    ],
    ids=lambda argv: "-".join(argv)[:40],
)
def test_every_message_ends_with_one_full_stop(argv, run, tmp_path):
    frame = make([2.0])
    frame.to_csv("good.csv", index=False)
    frame.assign(gpu="\x1b[31mred").to_csv("other.csv", index=False)
    frame.assign(T=0).to_csv("damaged.csv", index=False)
    status, _, err = run(*argv)
    assert status == 2 and err.count("\n") == 1 and "\x1b" not in err
    assert err.endswith((".\n", "?\n")) and not any(ends in err for ends in ("..", "?.", " . ", ". ."))


@pytest.mark.parametrize("text", ["it is so", "it is so.", "it is so. ", "\x1b[31mit is so.\n"])
@pytest.mark.parametrize(
    "kind", [UsageError, lambda text: OSError(5, text), lambda text: RuntimeError(f"allocate {text}")]
)
def test_errors_of_any_kind_end_with_one_full_stop(kind, text, run, monkeypatch):
    def fail(args):
        raise kind(text)

    monkeypatch.setattr("triton_lstm.cli.doctor.doctor", fail)
    status, _, err = run("doctor")
    assert status == 2 and err.count("\n") == 1 and err.endswith(".\n")
    assert ".." not in err and ". ." not in err and "\x1b" not in err


def test_a_package_that_fails_without_a_message(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise ValueError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="broken_package cannot be imported: ValueError"):
        settings.require("broken_package")


def test_a_folder_named_triton_is_not_triton(monkeypatch):
    """Python imports any folder."""
    monkeypatch.setattr(settings, "why_no_triton", lambda: "triton in /a/triton cannot be used: AttributeError")
    with pytest.raises(UsageError, match="this requires triton: triton in /a/triton cannot be used"):
        settings.require("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UsageError, match="Omit --device cuda"):
        command_device("cuda")
