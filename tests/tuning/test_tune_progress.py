"""What a run of tune leaves for the next process: blame for what killed it, and for nothing else."""

import pytest

from triton_lstm.tuning.progress import Progress

TABLE = {"a": "its entry"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.json.running"


def test_what_a_process_died_of_is_refused_from_then_on(path):
    Progress(path, TABLE).begin("a: plan")
    for _ in range(2):
        assert "died" in Progress(path, TABLE).begin("a: plan")
    assert Progress(path, TABLE).begin("a: other plan") is None


@pytest.mark.parametrize("ended", [lambda p: p.done("a", "its entry"), lambda p: p.failed("a", "?"), Progress.stop])
def test_what_came_to_its_end_killed_nobody(ended, path):
    progress = Progress(path, TABLE)
    progress.begin("a: plan")
    ended(progress)
    assert Progress(path, TABLE).begin("a: plan") is None


def test_results_outlive_the_process_and_not_the_run(path):
    progress = Progress(path, {})
    progress.done("a", "its entry")
    progress.failed("b", "out of memory")
    progress = Progress(path, TABLE)
    assert progress.results == {"a": None, "b": "out of memory"}
    progress.end()
    assert not path.exists() and Progress(path, TABLE).results == {}


def test_results_do_not_outlive_their_table(path):
    progress = Progress(path, {})
    progress.done("a", "its entry")
    progress.done("b", "b's entry")
    progress.failed("c", "out of memory")
    assert Progress(path, {"a": "an older entry", "b": "b's entry"}).results == {"b": None, "c": "out of memory"}
    assert Progress(path, {"a": "an older entry"}).results == {}
