"""What is shown of results, on a made-up GPU's frame; stored results; differences between two of them."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_lstm.config import UsageError
from triton_lstm.perf import results
from triton_lstm.perf.cases import Case
from triton_lstm.perf.diff import FASTER, LOST, NEW, SAME, SLOWER, compare
from triton_lstm.perf.plots import draw_all
from triton_lstm.perf.report import to_markdown, write_report
from triton_lstm.perf.results import COLUMNS, FORMAT, derive, describe, load, select, write, write_parquet
from triton_lstm.perf.summary import summarize
from triton_lstm.perf.work import flops

ABOUT = dict(
    gpu="Imaginary 100", driver="1", torch="2", triton="3", cudnn="9", commit="abc", sources="f00", format=FORMAT
)
OURS, THEIRS = "triton_lstm", "nn.LSTM"
MODES = ("inference", "forward_backward")


def row(case, provider, mode, ms, spread=0.01, **more):
    times = dict(status="ok", ms=ms, p20=ms * (1 - spread), p80=ms * (1 + spread), runs=9, peak_mb=case.T * 0.5)
    algorithm = "STANDARD" if provider == THEIRS else ""
    base = describe(case, provider, mode, floor_ms=ms / 4) | times | {"algorithm": algorithm, "error_share": 0.5}
    return base | ABOUT | {"date": "2026-01-02T03:04:05+00:00", "reason": ""} | more


def make(speeds, cases=None, **more):
    """A frame of all cases x modes: ours takes 1 / speeds[k] of nn.LSTM's 2 ms on case k."""
    cases = cases or [Case("bf16", T=100 * 2**k, B=8, H=64 * 2 ** (k % 3), why="made up") for k in range(len(speeds))]
    rows = [
        row(case, provider, mode, 2.0 / (speed if provider == OURS else 1.0), **more)
        for case, speed in zip(cases, speeds, strict=True)
        for mode in MODES
        for provider in (OURS, THEIRS)
    ]
    floor = [
        dict(case="copy", provider="device", mode="floor", status="ok", reason="", gbs=4000.0),
        dict(case="matmul-bf16", provider="device", mode="floor", status="ok", reason="", tflops=700.0),
        dict(case="exchange-flag-16", provider="device", mode="floor", status="ok", reason="", us_per_step=0.8),
    ]
    return derive(pd.DataFrame(rows + [f | ABOUT | {"date": "2026-01-02"} for f in floor]))


def test_derived_columns_by_hand():
    case = Case("bf16", T=100, B=8, H=64, why="made up")
    frame = make([4.0], [case]).set_index(["case", "provider", "mode"])
    ours = frame.loc[case.name, OURS, "inference"]
    assert ours["ms"] == 0.5 and ours["speedup"] == 4 and ours["us_per_step"] == 5 and ours["floor_share"] == 0.25
    assert ours["tflops"] == pytest.approx(flops(case, "inference") / 0.5e-3 / 1e12)
    assert frame.loc[case.name, THEIRS, "inference"]["speedup"] == 1
    assert frame.loc["copy", "device", "floor"]["gbs"] == 4000


def test_losses_are_shown_with_the_wins():
    summary = summarize(make([4.0, 0.5, 1.001]))
    assert summary.table["verdict"].tolist() == ["wins"] * 2 + ["LOSES"] * 2 + ["even"] * 2
    assert "wins 2, is even on 2 and loses 2" in summary.headline[1] and "0 have no comparison" in summary.headline[1]
    mean = math.exp((math.log(4) + math.log(0.5) + math.log(1.001)) / 3)
    assert f"inference: {mean:.3g} times" in summary.headline[2] and "from 0.5 to 4" in summary.headline[2]
    text = to_markdown(summary)
    assert text.count("LOSES") == 2 and text.count("wins") >= 2 and "Imaginary 100" in text


def test_what_has_no_time_is_shown_with_its_reason():
    frame = make([2.0, 2.0])
    case = Case("bf16", T=9, B=8, H=64, why="made up")
    bad = describe(case, OURS, "all", math.nan) | ABOUT | {"status": "wrong", "reason": "y has 9 times", "date": "2026"}
    frame = derive(pd.concat([frame, pd.DataFrame([bad])]))
    summary = summarize(frame)
    assert summary.table["verdict"].tolist()[-1] == "wrong: y has 9 times" and len(summary.table) == 5
    assert summary.absent[["provider", "status", "reason"]].values.tolist() == [[OURS, "wrong", "y has 9 times"]]
    assert "1 have no comparison" in summary.headline[1]
    # nn.LSTM measured, ours not: the reason stands where the verdict would
    only = select(frame, {"provider": [THEIRS]})
    assert set(summarize(only).table["verdict"]) == {"not measured"}


def test_a_report_and_its_files(tmp_path):
    cases = [Case("bf16", T=t, B=b, H=h, why="|") for t in (128, 1024) for b in (8, 64) for h in (64, 256)]
    frame = make([0.5 + k for k in range(8)], cases)
    files = {path.name for path in write_report(frame, tmp_path)}
    assert files == {"report.md", "report.html"} | {
        f"{name}.png" for name in ("us_per_step_over_h", "us_per_step_over_b", "speedup", "memory_over_t", "roofline")
    }
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and '<td class="LOSES">' in page and '<td class="wins">' in page
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert "<script" not in page


def test_pictures_only_of_what_there_is(tmp_path):
    one = make([2.0])
    (tmp_path / "memory_over_t.png").write_text("of an earlier report")
    assert {path.name for path in draw_all(one, tmp_path)} == {"speedup.png", "roofline.png"}
    assert not (tmp_path / "memory_over_t.png").exists()
    assert draw_all(one.iloc[:0], tmp_path) == []
    assert write_report(one.iloc[:0], tmp_path)  # nothing measured is still a report
    assert "Nothing was measured" in (tmp_path / "report.md").read_text()


def test_html_is_escaped(tmp_path):
    write_report(make([2.0], reason="", gpu="<b>&"), tmp_path)
    assert "<b>&" not in (tmp_path / "report.html").read_text()


def test_stored_and_read_again(tmp_path):
    frame = make([2.0, 0.5])
    write(frame, tmp_path / "bench_a.csv")
    for path in (tmp_path, tmp_path / "bench_a.csv"):
        pd.testing.assert_frame_equal(load([path]), frame, check_dtype=False, rtol=1e-5)
    assert list(load([tmp_path]).columns) == COLUMNS
    assert (tmp_path / "bench_a.csv").stat().st_size < 2**16


def test_the_latest_of_two_files_counts(tmp_path):
    write(make([2.0]), tmp_path / "bench_quick.csv")
    later = make([4.0]).assign(date="2027-01-01")
    write(later, tmp_path / "bench_standard.csv")
    assert set(load([tmp_path]).query("provider == @OURS")["speedup"]) == {4.0}


def test_parquet_where_pyarrow_is(tmp_path, monkeypatch):
    frame, asked = make([2.0]), []
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda self, path, **options: asked.append((path, options)))
    assert write_parquet(frame, tmp_path / "a.csv") and asked[0][0] == tmp_path / "a.parquet"

    def missing(self, path, **options):
        raise ImportError

    monkeypatch.setattr(pd.DataFrame, "to_parquet", missing)
    assert not write_parquet(frame, tmp_path / "a.csv")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("a,b\n1,2\n", "no column `format`"),
        ("case,format\nx,99\n", "format 99"),
        (f"case,format\nx,{FORMAT}\n", "lacks the column"),
        ("case,format\nx,y\n", "format y"),
    ],
)
def test_what_is_no_results_file(tmp_path, content, message):
    path = tmp_path / "bench_a.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        load([path])


def test_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"holds no bench_\*\.csv"):
        load([tmp_path])


def test_select():
    frame = make([2.0, 0.5, 3.0])
    assert set(select(frame, {"H": ["64", "128"], "provider": [OURS]})["H"]) == {64, 128}
    assert set(select(frame, {"bidirectional": ["false"]})["provider"]) == {OURS, THEIRS}
    with pytest.raises(UsageError, match="no column speed"):
        select(frame, {"speed": ["1"]})


def diff(before, after):
    return compare(before, after).set_index(["case", "mode"])


def test_the_same_results_do_not_differ():
    frame = make([2.0, 0.5])
    assert set(compare(frame, frame)["verdict"]) == {SAME} and len(compare(frame, frame)) == 4


@settings(deadline=None, max_examples=30)
@given(st.floats(0.5, 2.0), st.floats(0.0, 0.1))
def test_a_change_counts_when_it_is_larger_than_the_noise(factor, spread):
    case = Case("bf16", T=100, B=8, H=64)
    before, after = (make([s], [case], spread=spread) for s in (1.0, 1.0 / factor))
    noise = max(0.03, 2 * math.sqrt(4 * spread**2))
    found = diff(before, after).loc[case.name, "inference"]
    assert found["noise"] == pytest.approx(noise) and found["ratio"] == pytest.approx(factor)
    if abs(math.log(factor) - math.log1p(noise)) > 1e-6 and abs(math.log(factor) + math.log1p(noise)) > 1e-6:
        expected = SLOWER if factor > 1 + noise else FASTER if factor < 1 / (1 + noise) else SAME
        assert found["verdict"] == expected


def test_a_slower_machine_is_no_regression():
    before, after = make([2.0]), make([2.0])
    after[["ms", "p20", "p80"]] *= 1.5
    assert set(compare(before, after)["verdict"]) == {SAME} and set(compare(before, after)["against"]) == {THEIRS}
    ours = [select(frame, {"provider": [OURS]}) for frame in (before, after)]
    assert set(compare(*ours)["verdict"]) == {SLOWER} and set(compare(*ours)["against"]) == {"time"}


def test_a_time_that_is_gone_is_a_regression():
    before, after = make([2.0, 2.0]), make([2.0, 2.0])
    first = after["case"].iloc[0]
    bad = describe(Case("bf16", T=100, B=8, H=64), OURS, "all", math.nan) | {"status": "failed", "reason": "boom"}
    left = after[(after["case"] != first) | (after["provider"] != OURS)]
    after = derive(pd.concat([left, pd.DataFrame([bad | ABOUT])]))
    found = compare(before, after)
    assert found[found["case"] == first]["verdict"].tolist() == [LOST, LOST]
    assert found[found["case"] == first]["reason"].tolist() == ["failed: boom"] * 2
    assert set(compare(after, before).query("case == @first")["verdict"]) == {NEW}


def test_what_was_timed_once_is_noisy():
    before, after = (make([s], runs=1, spread=0.0) for s in (1.0, 0.8))
    assert set(compare(before, after)["verdict"]) == {SAME}


def test_what_cannot_be_compared():
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(make([1.0]), make([1.0]).assign(gpu="Another"))
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(make([1.0]), make([1.0], [Case("fp16", T=1, B=1, H=1)]))


def test_every_column_is_written_down():
    explained = {name for names in results.HELP for name in names.split(", ")}
    assert explained <= set(COLUMNS) and {"status", "ms", "speedup", "error_share", "floor_share"} <= explained
