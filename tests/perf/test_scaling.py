"""What several processes hand over, send and hold is what perf/scaling_model.py predicts."""

import dataclasses

import pandas as pd
import pytest

pytest.importorskip("pydantic", reason="the configuration needs pydantic")
import torch
from processes import WORLD, in_processes

from triton_lstm.perf import scaling
from triton_lstm.perf.scaling_model import Case, messages, predict, tokens_per_s
from triton_lstm.settings import UsageError
from triton_lstm.training.processes import Processes

CPU = torch.device("cpu")
# layers, hidden, embed, vocabulary, steps, rows, dtype. The first have two buckets, or rows of shards that are padded
CASES = [
    Case(strategy, *sizes)
    for strategy in ("ddp", "fsdp")
    for sizes in ((2, 256, 64, 257, 3, 4, "fp32"), (1, 32, 16, 65, 2, 2, "bf16"), (3, 16, 24, 10, 2, 2, "fp64"))
]
HELD = "parameter_bytes", "gradient_bytes", "moment_bytes"
TINY = Case("none", 2, 16, 6, 11, 5, 4, "fp32")


def work(rank):
    processes = Processes(torch.distributed.HashStore())
    processes.open(CPU, 100)
    return [scaling.measure(case, processes, CPU, backend="torch") for case in CASES]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return in_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda number: "{strategy}-{dtype}".format(**vars(CASES[number]))
)
def test_counted_is_predicted(number, counted):
    case = CASES[number]
    for rank, of_rank in enumerate(counted):
        row, predicted = of_rank[number], predict(case, WORLD, rings=False)
        assert row["seconds"] == row["tokens_per_s"] == row["peak_bytes"] == scaling.NOT_MEASURED
        sent = predicted.pop("sent_bytes")
        # Gloo's headers: of every message, and of the parts of long ones; and what the processes say before and after
        assert sent <= row["sent_bytes"] <= 1.001 * sent + 1024 * (2 + sum(map(len, messages(case, WORLD).values())))
        del predicted["saved_bytes"]  # of the kernels
        for name, prediction in predicted.items():
            smaller = rank > 0 and case.strategy == "fsdp" and name in HELD  # the last shard
            assert row[name] == row[f"{name}_predicted"] == prediction or (smaller and row[name] < prediction)
        assert not any(key.startswith("broadcast") for key in row)


def test_several_buckets(counted):
    """So that the case above is not of a single one: two, and the loss."""
    assert [of_rank[0]["all_reduces"] for of_rank in counted] == [3] * WORLD


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_what_the_kernels_save(dtype, interpreter):
    row = scaling.measure(dataclasses.replace(TINY, dtype=dtype), Processes(), CPU, backend="triton")
    assert row["lstm"] == "kernels" and row["saved_bytes"] == row["saved_bytes_predicted"] > 0
    assert row["sent_bytes"] == row["sent_bytes_predicted"] == 0


def test_tokens_per_s_lie_between_all_and_nothing_hidden():
    case = dataclasses.replace(TINY, strategy="ddp")
    sent = predict(case, 2)["sent_bytes"]
    assert tokens_per_s(case, 2, seconds=1, bandwidth=sent) == (10, 20)
    assert tokens_per_s(case, 2, seconds=1, bandwidth=sent / 4) == (4, 5)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling, "MODELS", [(1, 8, 4, 5)])
    monkeypatch.setattr(scaling, "CPU_SHAPE", (2, 16, (1, 4)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "perf" / "results" / "scaling.csv"


def test_rows_are_kept_and_replaced(tiny, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling"])
    assert scaling.main() == 0
    first = pd.read_csv(tiny)
    assert first["batch"].tolist() == [16, 4] and set(first["tokens_per_s"]) == {scaling.NOT_MEASURED}
    monkeypatch.setattr(scaling, "CPU_SHAPE", (3, 16, (1, 4)))
    assert scaling.main() == scaling.main() == 0
    rows = pd.read_csv(tiny)
    assert rows["seq_len"].tolist() == [2] * 2 + [3] * 2
    pd.testing.assert_frame_equal(rows[:2], first)


def test_another_machine_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling"])
    assert scaling.main() == 0
    before = tiny.read_text()
    about = scaling.machine()
    monkeypatch.setattr(scaling, "machine", lambda: about | {"torch": "0.1"})
    assert scaling.main() == 2
    expected = f"has torch '{about['torch']}', this is '0.1'. Give another file with --out\n"
    assert capsys.readouterr().err.endswith(expected)
    assert tiny.read_text() == before


def test_prediction_of_time_needs_the_time_of_one_process():
    case = dataclasses.replace(TINY, strategy="ddp")
    alone = dataclasses.asdict(dataclasses.replace(TINY, batch=2)) | {"ranks": 1, "seconds": 0.5}
    names = ["tokens_per_s_least", "tokens_per_s_most"]
    found = scaling.expected_time(pd.DataFrame([alone]), case, 2, 1e9)
    assert list(found) == names and list(found.values()) == list(tokens_per_s(case, 2, 0.5, 1e9))
    for rows, bandwidth in (
        (pd.DataFrame([alone | {"batch": 4}]), 1e9),
        (pd.DataFrame([alone | {"seconds": scaling.NOT_MEASURED}]), 1e9),
        (pd.DataFrame([alone]), None),
        (pd.DataFrame(), 1e9),
    ):
        assert set(scaling.expected_time(rows, case, 2, bandwidth).values()) == {scaling.NOT_MEASURED}


def test_a_batch_that_cannot_be_divided():
    processes = Processes()
    processes.size = 2
    with pytest.raises(UsageError, match="a batch of 3 cannot be divided between 2 processes"):
        scaling.trainer_of(dataclasses.replace(TINY, batch=3), processes, CPU, None)
