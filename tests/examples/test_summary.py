"""The table of the documents, and what stands around it, is what the committed results say."""

import json
from pathlib import Path

from examples.quickstart import summary

ROOT = Path(__file__).parents[2]


FILES = sorted((ROOT / "examples/quickstart/results").glob("*.json"))
RUNS = [json.loads(path.read_text()) for path in FILES]
PAGE = (ROOT / "docs/benchmarks.md").read_text()


def test_table_is_measured():
    assert len({run["seed"] for run in RUNS}) >= 3
    assert summary.table(RUNS) in PAGE
    assert all(claim["holds"] for run in RUNS for claim in run["claims"])


def test_ranges_are_measured():
    words = " ".join(PAGE.split())

    def span(digits, *parts):
        values = [c["value"] for run in RUNS for c in run["claims"] if c["claim"].startswith(parts)]
        assert len(values) >= 3
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    distance = "distance to the fine solve, student / guided teacher, NFE "
    one, two = (span(2, f"{distance}{nfe}").replace("0.", ".") for nfe in (1, 2))
    assert f"is {one} of the guided teacher's at NFE 1 and {two} at NFE 2" in words
    assert f"{span(2, 'Frechet distance, student NFE')} times that of the 32-step teacher" in words
    seconds = [sum(run["timings"].values()) for run in RUNS]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s each" in words

    gains: dict[str, list[float]] = {"student": [], "teacher": []}
    for name, found in (item for run in RUNS for item in run["o3s"].items()):
        gains[name.split()[0]].append(100 * (1 - found["best"] / found["start"]))
    student, teacher = (sorted({f"{gain:.0f}" for gain in found}) for found in gains.values())
    said = f"O3S gained it {student[0]} to {student[-1]} %, the teacher at 4 steps {teacher[0]} %;"
    assert said in words
    assert len(teacher) == 1
