"""The report: what passes its gate, how sure a ratio is, pictures, and two files compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import __main__ as command
from benchmarks.report import comparison, page, plots, quality, tables
from benchmarks.report.ratios import FEWEST, Ratio, ratio
from benchmarks.report.results import load
from examples.quickstart import figures

ROOT = Path(__file__).parents[1]
ROW = {"model": "f5_base", "device": "CPU", "dtype": "float32", "nfe": 3, "guidance": False}


def record(contender="ours", role="ours", seconds=(1.0,) * 8, error=1e-6, row=None, **more):
    row = {**ROW, "batch": 1, "seconds": 10.0, **(row or {})}
    told = {"suite": "rtf", "row": row, "contender": contender, "role": role, "bound": 1e-4}
    group = f"rtf | {row['model']}, NFE {row['nfe']}{', guided' * row['guidance']}"
    return {
        "group": group,
        "name": f"test_rtf[{group[6:]}]: {contender}",
        "extra_info": {**told, "error": error, "audio_seconds": 10.0, **more},
        "stats": {"data": list(seconds)},
    }


def baseline(contender="plain", **changes):
    return record(contender, "baseline", **{"seconds": (2.0,) * 8, **changes})


def write(path, *records, device="CPU", left_out=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"device": device, "cpu": "a CPU", "versions": {"torch": "2.13.0", "triton": None}}
    found = {
        "machine_info": machine,
        "commit_info": {"id": 40 * "a"},
        "datetime": "2026-01-02T03:04:05",
        "ceilings": {"flops": 1e12, "bandwidth": 1e11},
        "benchmarks": list(records),
        "left_out": list(left_out),
    }
    path.write_text(json.dumps(found))
    return path


def shown(tmp_path, *records, **options):
    return load(write(tmp_path / "rtf.json", *records, **options)).rows()


# -- the gate -------------------------------------------------------------------------------------


def test_a_row_is_its_right_contenders(tmp_path):
    (row,), missing = shown(tmp_path, baseline(), record(), record("peer", "peer", error=2e-4))
    assert [one.contender for one in row.records] == ["plain", "ours"]
    assert row.baseline.contender == "plain"
    assert missing == [("rtf | f5_base, NFE 3", "peer", "error 2.0e-04, allowed 1.0e-04")]


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([record()], "no baseline that passed the gate"),
        ([baseline(error=1.0), record()], "no baseline that passed the gate"),
        ([baseline(), record(error=float("nan"))], "nothing of ours that passed the gate"),
        ([baseline(), record(error=None)], "nothing of ours that passed the gate"),
        ([baseline(), baseline("other"), record()], "2 baselines that passed the gate"),
    ],
)
def test_a_row_that_is_not_shown_is_named(records, why, tmp_path):
    rows, missing = shown(tmp_path, *records)
    assert rows == []
    assert missing[-1] == ("rtf | f5_base, NFE 3", None, why)


def test_what_a_run_left_out_is_named(tmp_path):
    left_out = [{"suite": "rtf", "row": ROW, "contender": "F5-TTS", "why": "not installed"}]
    left_out.append({"row": "a row", "contender": None, "why": "no time"})
    _, missing = shown(tmp_path, left_out=left_out)
    assert missing == [
        ("rtf | f5_base, float32, nfe 3", "F5-TTS", "not installed"),
        ("a row", None, "no time"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("benchmarks"), "results.json: expected 'benchmarks', got machine"),
        (lambda found: found.update(benchmarks={}), "benchmarks: expected list, got dict"),
        (lambda found: found["machine_info"].pop("device"), "machine_info: expected 'device'"),
        (
            lambda found: found["benchmarks"][0]["extra_info"].pop("contender"),
            r"benchmarks\[0\].extra_info: expected 'contender', got suite, row, role",
        ),
        (
            lambda found: found["benchmarks"][0]["extra_info"].update(role="best"),
            "role: expected one of ours, baseline, peer, got 'best'",
        ),
        (
            lambda found: found["benchmarks"][0]["stats"].update(data=[1.0, -1.0]),
            r"stats.data: expected seconds of every round, got \[1.0, -1.0\]",
        ),
        (
            lambda found: found["benchmarks"][0]["extra_info"].update(error="small"),
            "error: expected a number or nothing, got 'small'",
        ),
        (lambda found: found["benchmarks"].append(found["benchmarks"][0]), "plain' twice"),
        (lambda found: found["left_out"].append({"row": "a row"}), "left_out: expected 'why'"),
    ],
)
def test_strange_files(change, message, tmp_path):
    path = write(tmp_path / "results.json", baseline(), record())
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_files_of_something_else(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results.json: expected"):
        load(path)


# -- ratios ---------------------------------------------------------------------------------------


def noisy(seconds, rounds=20, scatter=0.05, seed=0):
    return seconds * np.exp(scatter * np.random.default_rng(seed).standard_normal(rounds))


def test_a_ratio_of_constants():
    assert ratio(np.full(8, 3.0), np.full(5 + 3, 2.0), paired=True) == (1.5, 1.5, 1.5)


def test_few_rounds_have_no_interval():
    few, enough = np.ones(FEWEST - 1), np.ones(FEWEST)
    assert ratio(few, enough, paired=False) == (1.0, 0.0, float("inf"))
    assert not ratio(few, few, paired=True).known
    assert ratio(enough, enough, paired=True).known


def test_an_interval_covers_the_ratio():
    """19 times in 20; of 200, 181 or more with more than 99 % probability."""
    covered = 0
    for seed in range(200):
        found = ratio(noisy(3.0, seed=2 * seed), noisy(2.0, seed=2 * seed + 1), paired=False)
        assert found.low <= found.value <= found.high
        covered += found.low <= 1.5 <= found.high
    assert 181 <= covered < 200


def test_rounds_side_by_side_are_a_pair():
    """What meets both contenders of a round alike is no difference between them."""
    slow = noisy(1.0, scatter=0.5)
    together, apart = (ratio(3 * slow, 2 * slow, paired=paired) for paired in (True, False))
    assert together == pytest.approx((1.5, 1.5, 1.5))
    assert apart.high - apart.low > 0.5
    assert ratio(3 * slow, 2 * slow[:-1], paired=True).high > 1.6  # no pairs


def test_a_ratio_is_always_the_same():
    pair = noisy(3.0, seed=1), noisy(2.0, seed=2)
    assert ratio(*pair, paired=True) == ratio(*pair, paired=True)


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (2.0, "2.00 s"),
        (0.01234, "12.3 ms"),
        (4.56e-5, "45.6 µs"),
        (1234.0, "1234 s"),
        (-12e-6, "-12.0 µs"),
        (1e-9, "1.00 ns"),
    ],
)
def test_quantities(seconds, words):
    assert tables.quantity(seconds) == words


def test_a_table_of_a_suite(tmp_path):
    records = []
    for nfe, seconds in ((1, 1.0), (3, 3.0)):
        row = {"nfe": nfe}
        records.append(baseline(seconds=[2 * seconds] * 8, row=row))
        records.append(record(seconds=[seconds] * 8, row=row, floor_seconds=0.5, bytes_held=2**30))
    rows, _ = shown(tmp_path, *records)
    (table,) = tables.test_tables(rows, "a CPU")
    sure = "2.00x (2.00 to 2.00)"
    assert table.split("\n") == [
        "**f5_base, float32, batch 1, seconds 10**",
        "",
        "| nfe | plain | ours |",
        "| --- | --- | --- |",
        f"| 1 | 0.200<br>baseline | 0.100<br>{sure}<br>2.00x the floor<br>1.00 GiB held |",
        f"| 3 | 0.600<br>baseline | 0.300<br>{sure}<br>6.00x the floor<br>1.00 GiB held |",
    ]


def test_ranges_tell_what_they_cost(tmp_path):
    records = [baseline(seconds=[1e-8] * 8), record(seconds=[1.9e-7] * 8)]
    for each in records:
        each["name"] = f"test_ranges[{each['group']}]"
        del each["extra_info"]["audio_seconds"]
    (table,) = tables.test_tables(shown(tmp_path, *records)[0], "a CPU")
    assert table.endswith("| 10.0 ns<br>baseline | 190 ns<br>180 ns more |")


def test_the_papers_figures_stand_beside_an_a100s(tmp_path):
    guided = {"nfe": 32, "guidance": True}
    records = [baseline(), record(), baseline(row=guided), record(row=guided)]
    rows, _ = shown(tmp_path, *records, device="NVIDIA A100-SXM4-80GB")
    (table,) = tables.test_tables(rows, "NVIDIA A100-SXM4-80GB")
    header, _, *lines = table.split("\n")[2:]
    assert header.endswith("| the paper |")
    assert [line.split(" | ")[-1] for line in lines] == ["0.021 |", "0.243 |"]
    (other,) = tables.test_tables(rows, "NVIDIA H200")
    assert "the paper" not in other
    assert tables.published({**ROW, "batch": 4}) is None


# -- the page -------------------------------------------------------------------------------------


def made(folder):
    """Results of two devices, a profile, and another script's."""
    records = []
    for nfe in (1, 3, 32):
        for guidance in (False, True):
            row = {"nfe": nfe, "guidance": guidance}
            work = {"flops": 1e10 * nfe, "bytes": 1e8, "floor_seconds": 0.01 * nfe}
            for name, role, factor in (("plain", "baseline", 1.3), ("ours, eager", "ours", 1.0)):
                seconds = noisy(factor * 0.1 * nfe * (1 + guidance), rounds=8)
                records.append(record(name, role, seconds, row=row, **work))
    results = folder / "results"
    write(results / "cpu" / "rtf.json", *records, record("alone", row={"nfe": 16}))
    write(results / "A100" / "rtf.json", baseline(), record(), device="NVIDIA A100")
    kernels = {"us": 12.0, "top": [{"name": "a kernel", "us": 9.0}]}
    ranges = [{"range": "solve", "self": 1.0, "device self": 0.0}]
    profile = {"rows": [{"what": "eager", "ranges": ranges}, {"what": "one", "kernels": kernels}]}
    (results / "cpu" / "profile.json").write_text(json.dumps(profile))
    (results / "cpu" / "distillation.json").write_text('{"rows": []}')
    return results


def test_the_page(tmp_path):
    results, examples = made(tmp_path), tmp_path / "no examples"
    out = tmp_path / "report" / "REPORT.md"
    page.write(results, examples, out)
    text = out.read_text()
    a100, cpu, quality_, paper = (
        text.index(f"\n## {title}")
        for title in (
            "NVIDIA A100, the reference device",
            "a CPU",
            "Quality against NFE",
            "The paper's figures",
        )
    )
    assert a100 < cpu < quality_ < paper
    assert "- no baseline that passed the gate: rtf | f5_base, NFE 16" in text[cpu:]
    assert "alone" not in text
    assert "No data for the plots: roofline, time breakdown." in text[a100:cpu]
    assert "No data for the plots" not in text[cpu:]
    assert "Results of other scripts: `distillation.json`." in text[cpu:]
    assert "No results of: quickstart, text2mel, compare_objectives." in text

    pictures = {path.relative_to(out.parent).as_posix(): path for path in out.parent.rglob("*.png")}
    assert len(pictures) == 4
    assert all(f"]({name})" in text for name in pictures)
    assert text.count("![") == 4
    again = tmp_path / "again" / "REPORT.md"
    page.write(results, examples, again)
    assert again.read_text() == text
    for name, path in pictures.items():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (again.parent / name).read_bytes() == path.read_bytes()


def test_what_is_not_shown_is_grouped(tmp_path):
    absent = {"contender": "F5-TTS", "why": "not installed"}
    left_out = [{"suite": "rtf", "row": f"row {i}", **absent} for i in (1, 2, 3, 1)]
    left_out.append({"row": "row 1", "contender": "peer", "why": "not installed"})
    left_out += [{"row": f"row {i}", "contender": None, "why": "no time"} for i in (4, 5)]
    wrong = [record("peer", error=1.0)]
    write(
        tmp_path / "results" / "cpu" / "rtf.json", baseline(), record(), *wrong, left_out=left_out
    )
    page.write(tmp_path / "results", tmp_path, tmp_path / "REPORT.md")
    _, _, text = (tmp_path / "REPORT.md").read_text().partition("### Not shown\n\n")
    assert text.split("\n\n")[0].split("\n") == [
        "- F5-TTS (3 rows of rtf): not installed",
        "- peer (row 1): not installed",
        "- no time: row 4; row 5",
        "- peer (rtf | f5_base, NFE 3): error 1.0e+00, allowed 1.0e-04",
    ]


def test_a_folder_is_a_device(tmp_path):
    write(tmp_path / "gpu" / "ops.json", device="NVIDIA A100")
    write(tmp_path / "gpu" / "rtf.json", device="NVIDIA H200")
    with pytest.raises(
        ValueError, match=r"rtf.json: expected the device of ops.json, 'NVIDIA A100'"
    ):
        page.write(tmp_path, tmp_path, tmp_path / "REPORT.md")


def test_no_data_no_plot(tmp_path):
    path = tmp_path / "plot.png"
    assert plots.rtf([], "a CPU", path) is None
    assert plots.roofline([], None, "a CPU", path) is None
    assert plots.breakdown(plots.profiled([]), "a CPU", path) is None
    assert plots.breakdown(plots.profiled({"rows": [{"ms": 1}]}), "a CPU", path) is None
    assert not path.exists()


def test_where_the_time_goes(tmp_path):
    kernels = {"us": 20.0, "top": [{"name": "long " * 10, "us": 11.0}, {"name": "b", "us": 4.0}]}
    rows, _ = shown(tmp_path, baseline(), record(kernels=kernels))
    parts = plots.evaluated(rows)
    assert parts == {
        "an evaluation, f5_base, float32, nfe 3, batch 1, seconds 10": [
            ("long " * 10, 11.0),
            ("b", 4.0),
            ("others", 5.0),
        ]
    }
    plot = plots.breakdown(parts, "a CPU", tmp_path / "plot.png")
    assert plot.alt.endswith("long long… 55 %, b 20 %, others 25 %")
    many = {"many": [(str(i), 1.0) for i in range(20)]}
    assert plots.breakdown(many, "a CPU", tmp_path / "plot.png").alt.endswith(", others 50 %")


def test_the_rows_with_the_most_steps_are_drawn(tmp_path):
    records = []
    for seconds, steps in ((3.0, (1, 2)), (10.0, (1, 2, 3))):
        for nfe in steps:
            row = {"nfe": nfe, "seconds": seconds, "model": f"f5 {seconds}"}
            records += [baseline(row=row), record(row=row)]
    rows, _ = shown(tmp_path, *records)
    for row in rows:
        row.stated["model"] = "f5"
    plot = plots.rtf(rows, "a CPU", tmp_path / "plot.png")
    assert "seconds 10: 0.100 (ours, NFE 1) to 0.200 (plain, NFE 1)" in plot.alt


def test_quality(tmp_path):
    examples = tmp_path / "examples"
    taught, compared = (
        examples / name / "results" / "seed0.json" for name in ("quickstart", "compare_objectives")
    )
    for path in (taught, compared):
        path.parent.mkdir(parents=True)
    key = {"model": "student", "grid": "uniform"}
    rows = [{**key, "nfe": nfe, "frechet": 2.0 / nfe} for nfe in (1, 2)]
    taught.write_text(json.dumps({"rows": rows}))
    row = {"nfe": 1, "to_teacher": 0.1, "frechet": 1.0}
    end = {"budgets": ["updates", "seconds"], "updates": 64, "seconds": 1.0, "rows": [row]}
    settings = {"method": "int_mean_flow", "seed": 0}
    compared.write_text(json.dumps({"settings": settings, "snapshots": [end]}))
    drawn, without = quality.draw(examples, tmp_path / "plots")
    assert [plot.path.name for plot in drawn] == ["quickstart.png", "compare_objectives.png"]
    assert all(plot.path.stat().st_size > 10_000 for plot in drawn)
    assert "IntMeanFlow" in drawn[1].alt
    assert without == ["text2mel"]


def test_the_report_is_of_the_committed_results(tmp_path):
    page.write(ROOT / "benchmarks/results", ROOT / "examples", tmp_path / "REPORT.md")
    assert (tmp_path / "REPORT.md").read_text() == (ROOT / "benchmarks/REPORT.md").read_text()


def test_labels_of_a_logarithmic_axis(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    key = {"model": "student", "grid": "uniform"}
    rows = [{**key, "nfe": nfe, "frechet": 300.0 / nfe**2} for nfe in (1, 2, 8)]
    figures.draw_curves(tmp_path / "curves.png", rows)
    (axis,) = (axis for axis in drawn[0].axes if axis.get_yscale() == "log")
    labels = [label for minor in (False, True) for label in axis.get_yticklabels(minor=minor)]
    texts = {label.get_text() for label in labels}
    assert texts >= {"5", "10", "20", "50", "100", "200"}
    assert all(f"{float(text):e}"[0] in "125" for text in texts)


def test_means_over_runs():
    key = {"model": "student", "grid": "uniform", "nfe": 1}
    runs = [{"rows": [{**key, "frechet": value, "note": "-"}]} for value in (1.0, 2.0)]
    assert quality.means(runs) == [{**key, "frechet": 1.5}]
    named = {**key, "model": quality.STUDENT, "frechet": 1.0}
    assert quality.means([{"rows": [named]}]) == [{**key, "frechet": 1.0}]
    drawn = json.loads((ROOT / "examples/text2mel/results/seed0.json").read_text())
    assert quality.STUDENT in {row["model"] for row in drawn["rows"]}


# -- comparison -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Ratio(0.90, 0.85, 0.95), "faster"),
        (Ratio(1.10, 1.05, 1.15), "slower"),
        (Ratio(1.00, 0.99, 1.01), "same"),
        (Ratio(1.015, 1.01, 1.018), "same"),  # sure, but too little
        (Ratio(0.95, 0.80, 1.10), "unclear"),
        (Ratio(1.01, 1.001, 1.03), "unclear"),
        (Ratio(0.5, 0.0, float("inf")), "unclear"),
    ],
)
def test_verdicts(found, verdict):
    assert comparison.verdict(found, 0.02) == verdict


def pair(tmp_path, old, new):
    return load(write(tmp_path / "old.json", *old)), load(write(tmp_path / "new.json", *new))


def test_two_files(tmp_path):
    old = [baseline(), record("slower"), record("faster"), record("wrong"), record("gone")]
    old.append(record("mended", error=1.0))
    new = [
        baseline(),
        record("slower", seconds=[1.25] * 8),
        record("faster", seconds=[0.8] * 8),
        record("wrong", error=1.0),
        record("came"),
        record("mended"),
    ]
    runs = pair(tmp_path, old, new)
    found = comparison.compare(*runs)
    verdicts = [(one.new.contender, one.ratio.value, one.verdict) for one in found.differences]
    assert verdicts == [
        ("plain", 1.0, "same"),
        ("slower", 1.25, "slower"),
        ("faster", 0.8, "faster"),
    ]
    assert found.only_old == ["rtf | f5_base, NFE 3: gone"]
    assert found.only_new == ["rtf | f5_base, NFE 3: came"]
    assert found.is_wrong == ["rtf | f5_base, NFE 3: wrong"]
    assert found.was_wrong == ["rtf | f5_base, NFE 3: mended"]
    text = comparison.text(*runs, found)
    assert (
        r"| rtf \| f5_base, NFE 3 | slower | 1.00 s | 1.25 s | 1.25 | 1.25 to 1.25 | slower |"
        in text
    )
    assert "1 faster, 1 slower, 1 same, 0 unclear" in text
    assert comparison.CAVEAT in text


def test_files_that_do_not_compare(tmp_path):
    runs = pair(tmp_path, [baseline()], [baseline(row={"dtype": "bfloat16"})])
    with pytest.raises(
        ValueError, match=r"NFE 3: dtype: expected 'float32' as in .*old.json, got 'b"
    ):
        comparison.compare(*runs)
    with pytest.raises(ValueError, match="got none in common"):
        comparison.compare(*pair(tmp_path, [baseline()], [record()]))
    other = load(write(tmp_path / "new.json", baseline(), device="NVIDIA H200"))
    with pytest.raises(ValueError, match="'a CPU', got 'NVIDIA H200'"):
        comparison.compare(runs[0], other)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    return command.main()


def test_the_status_says_what_became_worse(tmp_path, monkeypatch, capsys):
    old = write(tmp_path / "old.json", baseline(), record())
    slower = write(tmp_path / "slower.json", baseline(), record(seconds=[1.25] * 8))
    wrong = write(tmp_path / "wrong.json", baseline(), record(error=1.0))
    faster = write(tmp_path / "faster.json", baseline(), record(seconds=[0.75] * 8))
    assert run(monkeypatch, "--compare", old, slower) == 0
    assert "1.25 to 1.25 | slower" in capsys.readouterr().out
    assert run(monkeypatch, "--compare", old, slower, "--fail-on-slower") == 1
    assert run(monkeypatch, "--compare", old, slower, "--fail-on-slower", "--threshold", ".3") == 0
    assert run(monkeypatch, "--compare", old, wrong, "--fail-on-slower") == 1
    assert run(monkeypatch, "--compare", old, faster, "--fail-on-slower") == 0
    with pytest.raises(SystemExit, match="No such file"):
        run(monkeypatch, "--compare", old, tmp_path / "none.json")


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    write(tmp_path / "results" / "cpu" / "rtf.json", baseline(), record())
    out = tmp_path / "REPORT.md"
    options = "--results", tmp_path / "results", "--examples", tmp_path, "--out", out
    assert run(monkeypatch, *options) == 0
    assert "2.00x (2.00 to 2.00)" in out.read_text()
    assert str(out) in capsys.readouterr().out
