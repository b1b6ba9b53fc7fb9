"""The file of a tuned table: broken, hostile, outdated, or written by many at once."""

import dataclasses
import json
import multiprocessing
import os
import warnings

import pytest
from tuned import ENTRY, H200, KEY, PLAN, put

from triton_lstm.planning.devices import file_name
from triton_lstm.planning.space import make_plan
from triton_lstm.tuning.choice import choose
from triton_lstm.tuning.table_file import KERNELS, Key, OutdatedError, Table, TableError, bucket, read, render, update


@pytest.fixture(autouse=True)
def folder(tables_folder):
    return tables_folder


def content(**changes):
    row = json.loads(render(_table()))["plans"][0] | changes
    return {"format": 2, "kernels": KERNELS, "about": {}, "plans": [row], "layers": []}


def _table():
    table = Table({})
    table.add(ENTRY)
    return table


BROKEN = (
    {
        "empty": b"",
        "cut off": b'{"format": 2, "kern',
        "not text": b"\xff\xfe\x00",
        "deep": b"[" * 100_000,
        "a list": b"[]",
        "other fields": b'{"format": 2}',
        "a large number": b'{"format": ' + b"9" * 5000 + b"}",
    }
    | {
        "a number about it": json.dumps(content() | {"about": {"gpu": 1}}).encode(),
    }
    | {
        name: json.dumps(content(**change)).encode()
        for name, change in {
            "a wrong direction": {"direction": "sideways"},
            "an unknown dtype": {"dtype": "int4"},
            "an unknown exchange": {"exchange": "smoke signals"},
            "H of 0": {"H": 0},
            "a huge H": {"H": 1 << 40},
            "B that is no bucket": {"B": 17},
            "a tile that is no power of two": {"block_h": 24},
            "a negative tile": {"block_b": -16},
            "a huge tile": {"block_k": 1 << 30},
            "more slices than chunk": {"slices": 16, "block_k": 64},
            "warps as text": {"warps": "8"},
            "a truth as a number": {"resident": 1},
            "a number as a truth": {"block_h": True},
            "a time of 0": {"us": 0},
            "a negative time": {"planned_us": -1.0},
            "a time that is none": {"us": float("nan")},
            "an endless time": {"us": float("inf")},
            "2 warps": {"warps": 2},
            "slices of no config": {"slices": 2},
            "splits forward": {"splits": 2, "block_h": 16},
            "splits of less than 8 units": {"direction": "backward", "splits": 4, "block_h": 16},
            "3 splits": {"direction": "backward", "splits": 3, "block_h": 64},
            "an escape sequence": {"measured": "\x1b[2J"},
            "a time of 400 digits": {"us": 10**400},
        }.items()
    }
)


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_the_plan_taken(text, folder):
    path = folder / file_name(H200.name)
    path.write_bytes(text)
    with pytest.raises(TableError):
        read(path)
    with pytest.warns(UserWarning, match="tuned table .*nvidia_h200.json is ignored"):
        choice = choose(KEY.on(H200))
    assert choice.plan == make_plan(KEY.on(H200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(dataclasses.replace(KEY, B=16).on(H200))
    with pytest.raises(TableError):  # and it is not written over either
        update(path, "x", ENTRY)
    assert path.read_bytes() == text


def test_a_folder_or_a_pipe_is_no_table(folder):
    for make in (os.mkdir, os.mkfifo):
        path = folder / make.__name__
        make(path)
        with pytest.raises(TableError, match="not a regular file"):
            read(path)


def test_a_file_that_is_too_large_is_not_read(folder, monkeypatch):
    path = put(folder, ENTRY)
    monkeypatch.setattr("triton_lstm.tuning.table_file.LARGEST", 10)
    with pytest.raises(TableError, match="larger than"):
        read(path)


def test_a_table_of_older_kernels_is_ignored_with_one_warning_and_replaced(folder):
    path = folder / file_name(H200.name)
    path.write_text(json.dumps(content() | {"kernels": KERNELS - 1}))
    with pytest.raises(OutdatedError):
        read(path)
    with pytest.warns(UserWarning, match=r"for kernels .* `triton-lstm tune` makes a new one"):
        choice = choose(KEY.on(H200))
    assert choice.tuned is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(dataclasses.replace(KEY, H=300).on(H200)).tuned is None
    update(path, "x", dataclasses.replace(ENTRY, us=1.0))
    assert read(path).plans[KEY].us == 1.0


def test_a_table_of_newer_kernels_is_left_alone(folder):
    path = folder / file_name(H200.name)
    path.write_text(json.dumps(content() | {"kernels": KERNELS + 1}))
    with pytest.warns(UserWarning, match="for kernels"):
        choose(KEY.on(H200))
    with pytest.raises(TableError):
        update(path, "x", ENTRY)


def test_an_entry_without_the_plans_time_and_one_of_a_huge_batch_come_back(folder):
    failed = dataclasses.replace(ENTRY, planned_us=None)
    huge = dataclasses.replace(ENTRY, key=dataclasses.replace(KEY, B=bucket(3_000_000)))
    assert set(read(put(folder, failed, huge)).plans.values()) == {failed, huge}


def test_a_config_of_too_many_warps_or_no_kernel_is_passed_over(folder):
    for changes in (
        dict(exchange="none", block_h=512, block_k=256),
        dict(exchange="none", block_h=512, block_k=512, resident=False),
    ):
        put(folder, dataclasses.replace(ENTRY, plan=dataclasses.replace(PLAN, **changes)))
        assert choose(KEY.on(H200)).tuned is None


def test_symbolic_links_are_kept(folder):
    target, link = folder / "real.json", folder / "link.json"
    update(target, "x", ENTRY)
    link.symlink_to(target)
    update(link, "x", dataclasses.replace(ENTRY, us=1.0))
    assert link.is_symlink() and read(target).plans[KEY].us == 1.0


def _write_many(path, number):
    for k in range(10):
        update(path, "x", dataclasses.replace(ENTRY, key=Key(False, "bf16", 1 + 10 * number + k, 64)))


def test_processes_that_write_at_once_lose_nothing(folder):
    path = folder / "table.json"
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_write_many, args=(path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert all(process.exitcode == 0 for process in processes)
    assert sorted(key.H for key in read(path).plans) == list(range(1, 41))
    assert not list(folder.glob("*.tmp"))


def test_a_write_that_fails_leaves_the_old_table(folder, monkeypatch):
    path = put(folder, ENTRY)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        update(path, "x", dataclasses.replace(ENTRY, us=1.0))
    assert path.read_text() == before and not list(folder.glob("*.tmp"))
