"""Which plan a call takes: tables, their neighbours, and the plan's own choice."""

import dataclasses

import pytest
from tuned import ENTRY, H200, KEY, LAYER, PLAN, put

from triton_lstm.planning.devices import GPUS, INTERPRETER, file_name
from triton_lstm.planning.limits import directions_at_once
from triton_lstm.planning.space import make_plan, with_groups
from triton_lstm.tuning import tables
from triton_lstm.tuning.choice import Choice, choose, forget, remember
from triton_lstm.tuning.table_file import Key, Tuned, bucket, read, render, update


@pytest.fixture(autouse=True)
def folder(tables_folder):
    return tables_folder


def test_a_table_comes_back_as_it_was_written(folder):
    path = put(folder, ENTRY, LAYER)
    found = read(path)
    assert found.plans == {KEY: ENTRY} and list(found.layers.values()) == [LAYER]
    assert found.about == {"gpu": "NVIDIA H200"}
    assert render(found) == path.read_text()
    assert [line for line in path.read_text().splitlines() if '"H": 512' in line and '"direction"' in line]


def test_an_entry_wins_over_the_plan(folder):
    before = choose(KEY.on(H200))
    assert before.tuned is None and before.plan == make_plan(KEY.on(H200))
    put(folder, ENTRY)
    choice = choose(KEY.on(H200))
    assert choice.tuned == ENTRY and choice.exactly(KEY.on(H200))
    assert choice.plan == with_groups(KEY.on(H200), PLAN) and choice.plan.groups == 4


def test_what_was_just_measured_is_taken_at_once():
    """Also where the plan was asked for before, and nothing is written; who reads the old entries is not disturbed."""
    before, reading = choose(KEY.on(H200)), iter(tables.table_for(H200.name).plans)
    assert before.tuned is None
    remember(H200.name, ENTRY)
    assert choose(KEY.on(H200)).tuned == ENTRY and list(reading) == []
    better = dataclasses.replace(ENTRY, us=1.0)
    other = dataclasses.replace(ENTRY, key=dataclasses.replace(KEY, B=16))
    remember(H200.name, better, other)
    assert choose(KEY.on(H200)).tuned == better
    assert choose(dataclasses.replace(KEY, B=16).on(H200)).tuned == other
    forget()
    assert choose(KEY.on(H200)) == before


def test_batches_of_one_bucket_share_a_config_but_not_a_grid(folder):
    put(folder, ENTRY)
    few, many = (choose(dataclasses.replace(KEY, B=B).on(H200)) for B in (33, 64))
    assert few.exactly(dataclasses.replace(KEY, B=33).on(H200)) and few.plan.block_h == many.plan.block_h == 32
    assert (few.plan.groups, many.plan.groups) == (3, 4)


@pytest.mark.parametrize("B, expected", [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (0, 16)])
def test_buckets(B, expected):
    assert bucket(B) == expected


@pytest.mark.parametrize(
    "key, near",
    [
        (Key(False, "bf16", 512, 64), True),
        (Key(False, "bf16", 640, 64), True),
        (Key(False, "bf16", 512, 100), True),
        (Key(False, "bf16", 256, 64), True),
        (Key(False, "bf16", 1100, 64), False),
        (Key(False, "bf16", 700, 128), False),
        (Key(True, "bf16", 512, 64), False),
        (Key(False, "fp16", 512, 64), False),
    ],
    ids=str,
)
def test_neighbours(key, near, folder):
    put(folder, ENTRY)
    assert (choose(key.on(H200)).tuned == ENTRY) == near


def test_the_nearest_neighbour_is_taken(folder):
    other = Tuned(dataclasses.replace(KEY, H=768), dataclasses.replace(PLAN, block_h=16), 2.0, 2.0)
    put(folder, ENTRY, other)
    assert choose(dataclasses.replace(KEY, H=700).on(H200)).tuned == other
    assert choose(dataclasses.replace(KEY, H=520).on(H200)).tuned == ENTRY


def test_an_entry_that_this_device_cannot_run_is_passed_over(folder):
    large = dataclasses.replace(PLAN, block_h=64)
    put(folder, dataclasses.replace(ENTRY, plan=large))
    assert choose(KEY.on(H200)).tuned is None  # it would not fit on chip
    put(folder, dataclasses.replace(ENTRY, plan=dataclasses.replace(PLAN, block_b=16)), gpu="MI300X")
    assert choose(KEY.on(GPUS["MI300X"])).tuned is None  # no flag exchange there


def test_two_directions_leave_each_other_room(folder):
    put(folder, ENTRY)
    for directions, groups in ((1, 4), (2, 4)):
        choice = choose(KEY.on(H200, directions))
        assert choice.tuned == ENTRY and choice.plan.groups == groups
    many = dataclasses.replace(KEY, B=128)
    put(folder, dataclasses.replace(ENTRY, key=many))
    plans = [choose(many.on(H200, directions)).plan for directions in (1, 2)]
    assert [plan.groups for plan in plans] == [8, 4] and directions_at_once(many.on(H200, 2), plans[1]) == 2


def test_a_plan_that_cannot_run_both_directions_at_once_is_passed_over(folder):
    key = Key(False, "bf16", 768, 16)
    wide = Tuned(key, dataclasses.replace(PLAN, block_h=8), 1.0, 1.0)  # 96 programs, of which 132 run at once
    put(folder, wide)
    assert choose(key.on(H200)).tuned == wide
    assert choose(key.on(H200, 2)) == Choice(make_plan(key.on(H200, 2)), None)
    near = Tuned(dataclasses.replace(key, H=700), dataclasses.replace(PLAN, block_h=16), 2.0, 2.0)
    put(folder, near)
    assert choose(key.on(H200)).tuned == wide  # the nearest
    assert choose(key.on(H200, 2)) == Choice(with_groups(key.on(H200, 2), near.plan), near)
    assert not choose(key.on(H200, 2)).exactly(key.on(H200))


def test_the_interpreter_asks_no_table(folder):
    update(folder / file_name(INTERPRETER.name), "x", ENTRY)
    assert choose(KEY.on(INTERPRETER)).tuned is None


def test_a_users_table_wins_over_the_shipped_one(folder):
    path = folder / "shipped" / file_name(H200.name)
    shipped = dataclasses.replace(ENTRY, us=9.0)
    update(path, "x", shipped, dataclasses.replace(shipped, key=dataclasses.replace(KEY, B=16)))
    forget()
    assert choose(KEY.on(H200)).tuned == shipped
    put(folder, ENTRY)
    assert choose(KEY.on(H200)).tuned == ENTRY
    assert choose(dataclasses.replace(KEY, B=16).on(H200)).tuned.us == 9.0


def test_without_platformdirs_there_are_no_users_tables(monkeypatch):
    monkeypatch.delenv(tables.FOLDER)
    monkeypatch.setitem(__import__("sys").modules, "platformdirs", None)
    assert tables.user_folder() is None and len(tables.places("x")) == 1


def test_the_cache_folder_is_the_platforms(monkeypatch, tmp_path):
    pytest.importorskip("platformdirs")
    monkeypatch.delenv(tables.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.user_folder() == tmp_path / "triton_lstm" / "tuned"


def test_a_home_that_there_is_not_is_one_warning(folder, monkeypatch):
    monkeypatch.setenv(tables.FOLDER, "~no_such_user_here/x")
    update(folder / "shipped" / file_name(H200.name), "x", ENTRY)
    with pytest.warns(UserWarning, match=f"{tables.FOLDER}=~no_such_user_here/x begins with the home") as seen:
        found = [choose(dataclasses.replace(KEY, B=batch).on(H200)).tuned for batch in (KEY.B, KEY.B - 1)]
    assert found == [ENTRY] * 2 and len(seen) == 1  # the shipped table counts all the same


def test_without_a_home_no_folder_is_made_up(monkeypatch):
    """platformdirs answers ~/.cache, which is no home but a folder named ~ wherever the process happens to run."""
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv(tables.FOLDER)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/triton_lstm")
    assert tables.user_folder() is None and len(tables.places("x")) == 1
