"""Several real processes train as one does, and what keeps them from it is one line of rank 0."""

import contextlib
import shutil
from unittest import mock

import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
pytest.importorskip("cyclopts", reason="the options of `train` need cyclopts")
pytest.importorskip("safetensors", reason="checkpoints need safetensors")
import torch
from training import assert_same, content, last, losses, read, rows

from triton_lstm.core.tolerance import errors, worst_share
from triton_lstm.settings import UsageError
from triton_lstm.training.run_folder import RunFolder

CASES = {
    "streams": [],
    "windows": ["--batches", "windows", "--no-reset"],
    "accumulation and clipping": ["--accumulate", 2, "--clip", 0.1],
    "an epoch's end": ["--seq-len", 60],
    "recomputing, with workers": ["--recompute", "--workers", 1],
}
EXACT = ["--dtype", "fp64", "--validate-every", 2]


def alone(run, monkeypatch, *args):
    """Trains in this process alone, with PyTorch's own LSTM."""
    monkeypatch.setenv("TRITON_LSTM_BACKEND", "torch")
    status, _, err = run("--device", "cpu", *args)
    assert status == 0, err


def all_succeed(results):
    assert [result.status for result in results] == [0] * len(results), results
    return results


def values(folder):
    """All numbers in metrics.csv."""
    return torch.tensor([[float(value or 0) for value in row.values()] for row in rows(folder)], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_as_one_process_with_the_whole_batch(options, strategy, size, ranks, run, tmp_path, monkeypatch):
    """Losses, gradient norms, validations, the weights, moments and states at the end."""
    steps = ["--steps", 5, *EXACT, *options]
    alone(run, monkeypatch, *steps, "--folder", "one")
    found = all_succeed(ranks(size, *steps, "--strategy", strategy, "--folder", "many"))
    assert [result.out == "" for result in found] == [False] + [True] * (size - 1)
    torch.testing.assert_close(values(tmp_path / "many"), values(tmp_path / "one"), rtol=1e-9, atol=1e-12)
    state, tensors = read(last(tmp_path / "many"))
    expected, whole = read(last(tmp_path / "one"))
    torch.testing.assert_close(tensors, whole, rtol=1e-7, atol=1e-9)
    assert (state["step"], state["updates"]) == (expected["step"], expected["updates"])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_rounding_is_within_the_tolerance(strategy, size, ranks, run, tmp_path, monkeypatch):
    """The losses in float32, by the one rule: PyTorch's error is that of one process."""
    steps = ["--steps", 6, "--lr", 0.01, "--warmup", 0]
    for dtype in ("fp32", "fp64"):
        alone(run, monkeypatch, *steps, "--dtype", dtype, "--folder", dtype)
    all_succeed(ranks(size, *steps, "--strategy", strategy, "--folder", "many"))
    one, exact, many = (torch.tensor(losses(tmp_path / name)).double() for name in ("fp32", "fp64", "many"))
    assert worst_share(many.float(), exact, errors([one - exact])) <= 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_with_the_kernels(strategy, ranks, run, tmp_path, monkeypatch, interpreter):
    steps = ["--steps", 2, *EXACT]
    alone(run, monkeypatch, *steps, "--folder", "one")
    found = all_succeed(ranks(2, *steps, "--strategy", strategy, "--folder", "many", backend="triton"))
    assert "Triton kernels" in found[0].out and f"2 processes, {strategy}" in found[0].out
    torch.testing.assert_close(values(tmp_path / "many"), values(tmp_path / "one"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_scaled_loss_that_overflows_in_one_process(strategy, ranks, tmp_path):
    """All leave the step out: the scale falls for all."""
    steps = ["--dtype", "fp16", "--schedule", "constant", "--folder", "a", "--strategy", strategy]
    found = ranks(2, "--steps", 3, *steps, each=lambda rank: Overflowing(rank, 1))
    all_succeed(found)
    state, tensors = read(last(tmp_path / "a"))
    assert (state["step"], state["updates"]) == (3, 2) and state["scaler"]["scale"] == 2**15
    assert all(tensor.isfinite().all() for tensor in tensors.values())


class Overflowing:
    """A rank whose loss is infinite in its second step."""

    def __init__(self, rank, chosen):
        self.wanted = rank == chosen

    @contextlib.contextmanager
    def __call__(self):
        from triton_lstm.training.model import Loss

        forward, calls = Loss.forward, []

        def infinite(self, *batch):
            calls.append(1)
            loss, h, c = forward(self, *batch)
            return (loss * 1e30 if len(calls) == 2 else loss), h, c

        with mock.patch.object(Loss, "forward", infinite if self.wanted else forward):
            yield


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("before, after", [(2, 2), (2, 1), (2, 4), (1, 2)])
def test_resuming_with_another_number(before, after, strategy, ranks, run, tmp_path, monkeypatch):
    """Bit for bit with the same number, dropout included; else as close as the sums' order allows."""
    same = before == after
    options = [*EXACT, *(["--dropout", 0.4] if same else []), "--accumulate", 2, "--strategy", strategy]
    steps = ["--steps", 6, *options]
    all_succeed(ranks(2, *steps, "--folder", "whole"))
    parts = [*steps, "--folder", "parts", "--save-every", 3, "--keep", 9]
    all_succeed(ranks(2, *parts)) if before == 2 else alone(run, monkeypatch, *parts)
    shutil.rmtree(tmp_path / "parts/checkpoints/step_00000006")
    resume = ["--resume", "--folder", "parts"]
    if after == 1:
        assert run(*resume, text=None)[0] == 0
    else:
        all_succeed(ranks(after, *resume))
    if same:
        assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
        assert_same(last(tmp_path / "parts"), last(tmp_path / "whole"))
    else:
        torch.testing.assert_close(values(tmp_path / "parts"), values(tmp_path / "whole"), rtol=1e-9, atol=1e-12)


def test_each_rank_has_random_numbers_of_its_own(ranks, tmp_path):
    """With dropout another loss than if all had the same ones."""
    losses = []
    for name in ("own", "shared"):
        options = ["--steps", 3, "--dtype", "fp64", "--dropout", 0.5, "--folder", name]
        all_succeed(ranks(2, *options, each=SameNumbers if name == "shared" else None))
        losses.append(values(tmp_path / name))
    assert not torch.equal(*losses)


class SameNumbers:
    def __init__(self, rank):
        pass

    @contextlib.contextmanager
    def __call__(self):
        from triton_lstm.training import trainer

        numbers = trainer.random_numbers
        with mock.patch.object(trainer, "random_numbers", lambda *keys: numbers(*keys[:2])):
            yield


REFUSED = {
    "rows": (["--batch", 6], "--batch 6 cannot be divided between 4 processes. Choose a multiple"),
    "comparison": (["--compare"], "--compare needs a single process"),
    "compiled shards": (["--strategy", "fsdp", "--compile"], "--strategy fsdp has neither --compile nor"),
    "a name": (["--strategi", "fsdp"], "Did you mean --strategy?"),
    "no text": (["--separator", "zzz", "--held-out", 0.9, "--seq-len", 9999], "are too few"),
    "a size": (["--hidden", 1 << 31], "Lower --hidden, --layers or --embed"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_once(options, message, ranks, tmp_path):
    found = ranks(4, "--steps", 1, *options)
    refused_once(found, message)
    assert not (tmp_path / "runs").exists()


def refused_once(results, message):
    assert [result.status for result in results] == [2] * len(results), results
    assert message in results[0].err and results[0].err.count("\n") == 1
    assert all(result.out == result.err == "" for result in results[1:])


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    from triton_lstm.cli import train
    from triton_lstm.training.config import Config
    from triton_lstm.training.processes import Processes

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    processes = Processes()
    processes.local_rank, processes.local_size = 1, 2
    assert train._device(Config(), processes) == torch.device("cuda", 1) == chosen[0]
    processes.local_size = 3
    with pytest.raises(UsageError, match="3 processes on a machine with 2 GPUs"):
        train._device(Config(), processes)


def test_help_is_shown_once(ranks):
    found = all_succeed(ranks(2, "--help"))
    assert "--strategy" in found[0].out and found[1].out == found[1].err == ""


def test_a_rank_with_another_option_or_text_is_refused(ranks, tmp_path):
    (tmp_path / "other.txt").write_bytes(b"something else\n" * 40)
    found = ranks(2, "--steps", 1, each=lambda rank: ["--lr", 0.5] if rank else [])
    refused_once(found, "rank 1 has another --lr than rank 0: 0.5, not 0.015. Give all processes the same")
    found = ranks(2, "--steps", 1, each=lambda rank: ["--text", "other.txt"] if rank else [])
    refused_once(found, "rank 1 has another text than rank 0")
    found = ranks(2, "--steps", 1, each=lambda rank: ["--text", "missing.txt"] if rank else [])
    refused_once(found, "rank 1: cannot read the text ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("values", [({"--a": 1}, {"--a": 1, "--b": 2}), ({"--a": 1, "--b": 2}, {"--a": 1})])
def test_an_option_that_only_one_rank_has_is_refused(values, monkeypatch):
    from triton_lstm.training.processes import Processes

    processes = Processes()
    monkeypatch.setattr(processes, "gather", lambda own: list(values))
    with pytest.raises(UsageError, match="rank 1 has another --b than rank 0: "):
        processes.check_alike(values[0])


def test_a_rank_with_another_version_is_refused(ranks, tmp_path):
    found = ranks(2, "--steps", 1, each=OtherVersion)
    refused_once(found, "rank 1 has another version of triton_lstm than rank 0: ")
    assert not (tmp_path / "runs").exists()


class OtherVersion:
    def __init__(self, rank):
        self.rank = rank

    def __call__(self):
        from triton_lstm.system import machine

        return mock.patch.object(machine, "hash_of", return_value=f"{self.rank}" * 12)


def test_two_runs_in_one_folder_are_refused(ranks, tmp_path):
    all_succeed(ranks(2, "--steps", 1, "--folder", "a"))
    refused_once(ranks(2, "--steps", 1, "--folder", "a"), "a exists. Continue it with --resume, or choose another")
    with RunFolder(tmp_path / "a").locked():
        refused_once(ranks(2, "--resume", "--folder", "a", "--steps", 2), "a is in use by another process")


def test_a_damaged_file_that_only_one_rank_reads(ranks, tmp_path):
    all_succeed(ranks(2, "--steps", 1, "--folder", "a"))
    for name in ("shard-00001", "shard-00002"):
        (file,) = last(tmp_path / "a").glob(f"{name}*")
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([255 - before[-1]]))
        refused_once(ranks(2, "--resume", "--folder", "a", "--steps", 2), f"{file.name} has changed. Start over")
        file.write_bytes(before)
    all_succeed(ranks(2, "--resume", "--folder", "a", "--steps", 2))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_disk_that_is_full_for_one_rank(strategy, rank, ranks, tmp_path):
    steps = ["--steps", 4, "--save-every", 2, "--strategy", strategy]
    found = ranks(2, *steps, "--folder", "a", each=lambda own: FullDisk(own == rank))
    where = "rank 1: " if rank else ""
    refused_once_after_output(found, f"{where}cannot write the checkpoint a/checkpoints/step_00000004: No space left")
    assert "Free some space, and continue with: torchrun --nproc-per-node 2 -m triton_lstm train" in found[0].err
    kept = content(tmp_path / "a/checkpoints/step_00000002")
    all_succeed(ranks(2, "--resume", "--folder", "a"))
    all_succeed(ranks(2, *steps, "--folder", "b"))
    assert_same(last(tmp_path / "a"), last(tmp_path / "b"))
    assert content(tmp_path / "a/checkpoints/step_00000002") == kept
    assert not list((tmp_path / "a/checkpoints").glob("*.tmp"))


def refused_once_after_output(results, message):
    assert [result.status for result in results] == [2] * len(results), results
    assert message in results[0].err.splitlines()[-1] and "Traceback" not in results[0].err
    assert all(result.out == result.err == "" for result in results[1:])


class FullDisk:
    """Of a rank that can save once."""

    def __init__(self, wanted):
        self.wanted = wanted

    @contextlib.contextmanager
    def __call__(self):
        import safetensors.torch

        save, calls = safetensors.torch.save, []

        def full(*args, **kwargs):
            calls.append(1)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return save(*args, **kwargs)

        with mock.patch.object(safetensors.torch, "save", full if self.wanted else save):
            yield


def test_a_command_that_is_repeated(ranks, tmp_path):
    """It starts the run, goes on with it, and succeeds when nothing is left to do."""
    command = ["--folder", "a", "--resume-or-start", "--schedule", "constant"]
    all_succeed(ranks(2, "--steps", 2, *command))
    again = all_succeed(ranks(2, "--steps", 4, *command))
    assert "resuming a from step 2" in again[0].out
    done = all_succeed(ranks(2, "--steps", 4, *command))
    assert "a is already at step 4, the last one" in done[0].out
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    refused_once(ranks(2, "--resume-or-start", "--folder", "other"), "other exists. It is no run: choose another")
    refused_once(ranks(2, "--resume-or-start"), "--resume-or-start has to find the run again. Add --folder FOLDER")


def test_restarts_need_a_folder(ranks, tmp_path):
    found = ranks(2, "--steps", 1, TORCHELASTIC_MAX_RESTARTS="2")
    refused_once(found, "torchrun --max-restarts has to find the run again. Add --folder FOLDER")
    assert not (tmp_path / "runs").exists()


def test_a_restart_that_torchrun_does_not_count(ranks, tmp_path):
    """That of the processes here, because of those of another machine."""
    started = ["--folder", "a", "--schedule", "constant", "--steps"]
    restarts = {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    found = [all_succeed(ranks(2, *started, steps, **restarts)) for steps in (2, 4)][1]
    assert "resuming a from step 2" in found[0].out
