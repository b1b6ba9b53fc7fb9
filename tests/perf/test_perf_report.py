"""Reports of results, with the frame of a made-up GPU; stored results; differences between two of them."""

import math

import pandas as pd
import pytest
from frames import ABOUT, OURS, THEIRS, make

from triton_lstm.perf import plots, report, results
from triton_lstm.perf.cases import Case
from triton_lstm.perf.plots import draw_all
from triton_lstm.perf.report import to_markdown, write_report
from triton_lstm.perf.results import COLUMNS, FORMAT, derive, describe, load, select, write, write_parquet
from triton_lstm.perf.summary import summarize
from triton_lstm.settings import UsageError


def test_derived_columns_by_hand():
    case = Case("bf16", T=100, B=8, H=64, why="made up")
    frame = make([4.0], [case]).set_index(["case", "provider", "mode"])
    ours = frame.loc[case.name, OURS, "inference"]
    assert ours["ms"] == 0.5 and ours["speedup"] == 4 and ours["us_per_step"] == 5 and ours["floor_share"] == 0.25
    operations = 800 * 2 * 4 * 64 * 128  # 800 tokens, 4 * 64 rows of weights, 64 inputs and 64 units
    moved = 2 * (800 * 64 + 4 * 64 * 128 + 2 * 4 * 64 + 800 * 64)  # input, weights, biases, output; two bytes each
    assert ours["tflops"] == pytest.approx(operations / 0.5e-3 / 1e12) and ours["gbs"] == pytest.approx(
        moved / 0.5e-3 / 1e9
    )
    assert frame.loc[case.name, THEIRS, "inference"]["speedup"] == 1
    assert frame.loc["copy", "device", "floor"]["gbs"] == 4000


def test_losses_are_shown_with_the_wins():
    summary = summarize(make([4.0, 0.5, 1.001]))
    assert summary.table["verdict"].tolist() == ["wins"] * 2 + ["LOSES"] * 2 + ["even"] * 2
    assert "wins 2, is even in 2 and loses 2" in summary.headline[1] and "0 cannot be compared" in summary.headline[1]
    mean = math.exp((math.log(4) + math.log(0.5) + math.log(1.001)) / 3)
    assert (
        f"inference: {mean:.3g} times" in summary.headline[2]
        and "0.5 to 4 (geometric mean of 3 cases)" in summary.headline[2]
    )
    text = to_markdown(summary)
    assert text.count("LOSES") == 2 and text.count("wins") >= 2 and "Imaginary 100" in text


def test_rows_without_a_time_are_shown_with_the_reason():
    frame = make([2.0, 2.0])
    case = Case("bf16", T=9, B=8, H=64, why="made up")
    bad = describe(case, OURS, "all", math.nan) | ABOUT | {"status": "wrong", "reason": "y has 9 times", "date": "2026"}
    frame = derive(pd.concat([frame, pd.DataFrame([bad])]))
    summary = summarize(frame)
    assert summary.table["verdict"].tolist()[-1] == "wrong: y has 9 times" and len(summary.table) == 5
    assert summary.unmeasured[["provider", "status", "reason"]].values.tolist() == [[OURS, "wrong", "y has 9 times"]]
    assert "1 cannot be compared" in summary.headline[1]
    for text in (to_markdown(summary), report._to_html(summary, [])):
        assert "Not measured, and why" in text and "y has 9 times" in text.rpartition("Not measured, and why")[2]
    # nn.LSTM measured, ours not: the reason replaces the verdict
    only = select(frame, {"provider": [THEIRS]})
    assert set(summarize(only).table["verdict"]) == {"not measured"}


def test_a_report_and_its_files(tmp_path):
    cases = [Case("bf16", T=t, B=b, H=h, why="|") for t in (128, 1024) for b in (8, 64) for h in (64, 256)]
    frame = make([0.5 + k for k in range(8)], cases)
    files = {path.name for path in write_report(frame, summarize(frame), tmp_path)}
    assert files == {"report.md", "report.html"} | {
        f"{name}.png" for name in ("us_per_step_over_h", "us_per_step_over_b", "speedup", "memory_over_t", "roofline")
    }
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5 and '<td class="LOSES">' in page and '<td class="wins">' in page
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_colours_in_the_terminal():
    rows = summarize(make([4.0, 0.5, 1.001])).table.itertuples(index=False)
    assert [report.verdict_style(row) for row in rows] == ["green"] * 2 + ["bold red"] * 2 + [None] * 2


def test_what_the_plots_show():
    cases = [Case("bf16", T=128, B=b, H=h, why="") for b in (8, 64) for h in (64, 256)]
    frame = make([0.5, 1.0, 2.0, 4.0], cases)
    measured = frame[frame["provider"] != "device"]
    (panel, _) = plots._heat_maps(measured).axes
    assert panel.get_images()[0].get_array().tolist() == [[-1, 0], [1, 2]]  # log2 of the speedup, B up and H across
    assert [text.get_text() for text in panel.texts] == ["0.5", "1", "2", "4"]
    over_h = plots._over(measured, "H", "us_per_step", "us")
    names = [text.get_text() for text in over_h.legends[0].get_texts()]
    lines = {name: line.get_xydata().tolist() for name, line in zip(names, over_h.axes[0].lines, strict=True)}
    step = 2.0 * 1e3 / 128
    assert lines == {OURS: [[64, step / 0.5], [256, step]], THEIRS: [[64, step], [256, step]]}
    roof = plots._roofline(measured, frame[frame["provider"] == "device"]).axes[0]
    both = measured[(measured["mode"] == "forward_backward") & (measured["provider"] == OURS)]
    points = roof.collections[0].get_offsets().tolist()
    assert points == both.assign(x=both["flops"] / both["bytes"])[["x", "tflops"]].astype(float).values.tolist()
    top = roof.lines[0].get_ydata()
    assert max(top) <= 700 and top[0] == pytest.approx(
        roof.lines[0].get_xdata()[0] * 4000 / 1e3
    )  # TFLOP/s = GB/s x FLOP/B / 1000


def test_no_series_is_dropped_silently():
    cases = [Case("bf16", T=128, B=b, H=h, why="") for b in range(1, 15) for h in (64, 256)]
    frame = make([1.0] * len(cases), cases)
    figure = plots._over(frame[frame["provider"] != "device"], "H", "us_per_step", "us")
    assert figure.get_suptitle() == "forward + backward, 12 of 14 series"


def test_plots_only_with_data(tmp_path):
    one = make([2.0])
    (tmp_path / "memory_over_t.png").write_text("of an earlier report")
    assert {path.name for path in draw_all(one, tmp_path)} == {"speedup.png", "roofline.png"}
    assert not (tmp_path / "memory_over_t.png").exists()
    assert draw_all(one.iloc[:0], tmp_path) == []
    assert write_report(one.iloc[:0], summarize(one.iloc[:0]), tmp_path)  # nothing measured is still a report
    assert "Nothing was measured" in (tmp_path / "report.md").read_text()


def test_html_is_escaped(tmp_path):
    frame = make([2.0], reason="", gpu="<b>&")
    write_report(frame, summarize(frame), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_stored_and_loaded(tmp_path):
    frame = make([2.0, 0.5])
    write(frame, tmp_path / "bench_a.csv")
    for path in (tmp_path, tmp_path / "bench_a.csv"):
        pd.testing.assert_frame_equal(load([path]).fillna(0), frame.fillna(0), check_dtype=False, rtol=1e-5)
    assert list(load([tmp_path]).columns) == COLUMNS
    assert (tmp_path / "bench_a.csv").stat().st_size < 2**16


def test_files_from_before_there_were_resets(tmp_path):
    frame = make([2.0])
    frame.drop(columns="resets").to_csv(tmp_path / "bench_a.csv", index=False)
    found = load([tmp_path])
    assert list(found.columns) == COLUMNS and found["resets"].isna().all() and len(found) == len(frame)


def test_resets_in_a_report(tmp_path):
    shape = dict(T=128, B=8, H=64)
    cases = [Case("bf16", **shape), *(Case("bf16", **shape, resets=resets) for resets in (0.0, 0.01))]
    write(make([2.0, 3.0, 4.0], cases), tmp_path / "bench_a.csv")
    frame = load([tmp_path])
    for text, case in zip(("0", "0.01"), cases[1:], strict=True):
        assert set(select(frame, {"resets": [text]})["case"]) == {case.name}
    others = set(select(frame, {"resets": ["none"], "provider": [OURS]})["case"])
    assert others == {cases[0].name}
    (panel, _) = plots._heat_maps(frame[frame["provider"] != "device"]).axes
    assert [text.get_text() for text in panel.texts] == ["2"]  # not a mean with the split ones
    assert "splits and packs" in summarize(frame).headline[-1]
    assert not any("splits and packs" in line for line in summarize(make([2.0])).headline)
    assert "splits and packs" in to_markdown(summarize(select(frame, {"provider": [THEIRS]}))).rpartition("All prov")[2]


def test_the_latest_of_two_files_is_used(tmp_path):
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
        ("case,format\nx,99\n", "format '99'"),
        (f"case,format\nx,{FORMAT}\n", "lacks the column"),
        ("case,format\nx,y\n", "format 'y'"),
    ],
)
def test_files_that_are_not_results(tmp_path, content, message):
    path = tmp_path / "bench_a.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        load([path])


def test_a_file_with_only_a_header(tmp_path):
    make([2.0]).iloc[:0].to_csv(tmp_path / "bench_a.csv", index=False)
    with pytest.raises(UsageError, match="has no rows"):
        load([tmp_path])


@pytest.mark.parametrize(
    "column, value",
    [("status", "fine"), ("packed", "maybe"), ("tflops", "many"), ("floor_ms", "inf")]
    + [("ms", value) for value in ("", "0", "-1", "nan", "inf", "abc", "True")]
    + [("p20", "3"), ("p80", "0.1"), ("p80", ""), ("runs", "0"), ("T", "0")],
)
def test_a_damaged_cell_is_named(tmp_path, column, value):
    frame = make([2.0]).astype(object)
    frame.loc[1, column] = value
    frame.to_csv(tmp_path / "bench_a.csv", index=False)
    with pytest.raises(UsageError, match=f"line 3: {column} cannot be '{value}'"):
        load([tmp_path])


def test_a_shifted_row(tmp_path):
    make([2.0]).to_csv(tmp_path / "bench_a.csv", index=False)
    text = (tmp_path / "bench_a.csv").read_text().splitlines()
    (tmp_path / "bench_a.csv").write_text("\n".join([text[0], *(f"x,{line}" for line in text[1:])]))
    with pytest.raises(UsageError):
        load([tmp_path])


def test_symbolic_links_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "bench_a.csv").symlink_to(tmp_path / "real" / "bench_a.csv")
    write(make([2.0]), tmp_path / "bench_a.csv")
    assert (tmp_path / "bench_a.csv").is_symlink() and (tmp_path / "real" / "bench_a.csv").stat().st_size > 100


def test_odd_text_in_markdown():
    bad = describe(Case("bf16", T=9, B=8, H=64), OURS, "all", math.nan) | ABOUT
    bad |= {"status": "failed", "reason": "a|b\\|c\n<lambda> [red]", "date": "2026"}
    text = to_markdown(summarize(derive(pd.concat([make([2.0]), pd.DataFrame([bad])]))))
    line = next(line for line in text.splitlines() if "lambda" in line)
    assert "a&#124;b&#92;&#124;c &#60;lambda&#62; &#91;red&#93;" in line and line.count("|") == 14


def test_legends_overlap_nothing_and_colours_are_consistent():
    cases = [Case(p, T=128, B=b, H=h) for p in ("bf16", "fp16") for b in (8, 64) for h in (64, 256)]
    frame = make([0.5, 1.0, 2.0, 4.0] * 2, cases)
    measured, floor = frame[frame["provider"] != "device"], frame[frame["provider"] == "device"]
    roofline, lines = plots._roofline(measured, floor), plots._over(measured, "H", "us_per_step", "us")
    heat = plots._heat_maps(measured)
    for figure in (roofline, lines):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        inside = legend.get_window_extent()
        for panel in figure.axes:
            assert not panel.get_legend() and not panel.texts
            assert not inside.overlaps(panel.get_tightbbox())
    names = [text.get_text() for text in roofline.legends[0].get_texts()]
    assert names == [OURS, THEIRS, "bf16; matmul 700 TFLOP/s", "fp16"]
    bars = [panel for panel in heat.axes if panel.get_label() == "<colorbar>"]
    assert bars and {bar.get_ylabel() for bar in bars} == {"times nn.LSTM's speed"}


def test_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"contains no bench_\*\.csv"):
        load([tmp_path])


def test_select():
    frame = make([2.0, 0.5, 3.0])
    assert set(select(frame, {"H": ["64", "128"], "provider": [OURS]})["H"]) == {64, 128}
    assert set(select(frame, {"bidirectional": ["false"]})["provider"]) == {OURS, THEIRS}
    with pytest.raises(UsageError, match="no column 'speed'"):
        select(frame, {"speed": ["1"]})


def test_single_measurements_need_a_margin_of_half():
    assert set(summarize(make([1.4, 0.7], runs=1, spread=0.0)).table["verdict"]) == {"even"}
    assert set(summarize(make([1.6], runs=1, spread=0.0)).table["verdict"]) == {"wins"}


def test_times_of_two_runs_have_no_verdict(tmp_path):
    frame = make([2.0])
    write(select(frame, {"provider": [THEIRS]}), tmp_path / "bench_a.csv")
    write(select(frame, {"provider": [OURS]}), tmp_path / "bench_b.csv")
    assert set(summarize(load([tmp_path])).table["verdict"]) == {"nn.LSTM was measured in another run"}


def test_a_provider_of_another_version_is_shown():
    frame = make([2.0])
    summary = summarize(frame.assign(provider=frame["provider"].replace(OURS, "former")))
    assert list(summary.all_times.columns) == ["case", "mode", "nn.LSTM, ms", "former, ms"]
    assert summary.providers["provider"].tolist() == ["nn.LSTM", "former"]


def test_two_devices_do_not_mix(tmp_path):
    write(make([2.0]), tmp_path / "bench_a.csv")
    write(make([2.0], [Case("fp16", T=1, B=1, H=1)]).assign(gpu="Another"), tmp_path / "bench_b.csv")
    with pytest.raises(UsageError, match="results of 'Another' and of 'Imaginary 100'"):
        load([tmp_path])


def test_a_speedup_is_of_one_run(tmp_path):
    """Two suites with a common case: each time is compared with the nn.LSTM of the same run."""
    write(make([2.0]), tmp_path / "bench_quick.csv")
    ours_only = select(make([4.0]).assign(date="2027"), {"provider": [OURS]})
    write(ours_only, tmp_path / "bench_standard.csv")
    found = load([tmp_path])
    assert found[found["provider"] == OURS]["speedup"].isna().all() and (found["status"] == "ok").all()


def test_every_column_is_documented():
    explained = {name for names in results.HELP for name in names.split(", ")}
    assert explained == {*results.MEASURED, *results.DERIVED, "floor_ms"} - {"reason", "runs"}
