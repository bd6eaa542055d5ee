"""The page: devices, their result files, and what each shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.report import aims, plots, quality, simulated, tables
from benchmarks.report.aims import Place
from benchmarks.report.plots import Plot
from benchmarks.report.results import Missing, Row, Run, is_result, load
from imf_kernels.files import replacing

INTRODUCTION = """# Report of the suites

Made by `python -m benchmarks.report` from the result files in `benchmarks/results`, which hold
every round. A cell holds the median of its rounds; how many times as fast as the row's baseline
that is, with a 95 % bootstrap interval over the rounds, in which all contenders took turns (none
for fewer than six rounds); what multiple of the device's floor it is; and what was counted. The
floor is the time for the row's FLOPs and bytes at the rates that the device reached in the same
run, of one matrix product and one long copy: what a cache holds, and products of better shapes,
come below 1. The intervals do not cover how a machine drifts from run to run. Only what passed its
correctness gate is shown, and only beside a baseline of the same run; the rest is listed with the
reason."""

PAPER = f"""## The paper's figures

RTF on an {tables.REFERENCE}, the reference device, from arXiv 2510.07979. They were measured on
another machine and other utterances than any row above; only in tables of an {tables.REFERENCE}
do they stand beside ours. The paper's CosyVoice2 teacher takes 32 steps; CosyVoice ships with 10.

{tables.paper_table()}"""


def write(results: Path, examples: Path, out: Path) -> None:
    """Write the page, and its plots into `plots` beside it.

    Args:
        results: A folder per device, with files that `--benchmark-json` and `benchmarks.profile`
            wrote; in "simulated", those of `benchmarks.simulate` and `benchmarks.kernels`.
        examples: With a folder of results in each.
        out: Where the page goes.

    Raises:
        ValueError: a file that is not what it says, or files of several devices in one folder.
    """
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    loaded = {folder: runs for folder in folders if (runs := _runs(folder))}
    measured = {runs[0].device: Place.of(folder, runs) for folder, runs in loaded.items()}
    parts = [INTRODUCTION, aims.section(measured | simulated.places(results / "simulated"))]
    for folder, runs in sorted(loaded.items(), key=lambda item: _order(item[1][0])):
        parts += _device(folder, runs, out)
    parts += [*_quality(examples, out), *simulated.section(results / "simulated"), PAPER]
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")


def _runs(folder: Path) -> list[Run]:
    runs = [load(path) for path in sorted(folder.glob("*.json")) if is_result(path)]
    for run in runs[1:]:
        if run.device != runs[0].device:
            raise ValueError(
                f"{run.path}: expected the device of {runs[0].path.name}, {runs[0].device!r}, "
                f"got {run.device!r}"
            )
    return runs


def _order(run: Run) -> tuple[bool, bool, str]:
    """The reference device, other GPUs, CPUs."""
    return tables.REFERENCE not in run.device, run.machine["device"] == "CPU", run.device


def _device(folder: Path, runs: Sequence[Run], out: Path) -> Iterator[str]:
    device, drawn = runs[0].device, out.parent / "plots" / folder.name
    reference = ", the reference device" if tables.REFERENCE in device else ""
    yield f"## {device}{reference}"
    yield "\n".join(_facts(run) for run in runs)
    missing: list[Missing] = []
    others: list[str] = []
    without = {"RTF against NFE", "roofline", "time breakdown"}
    for run in runs:
        rows, left_out = run.rows()
        missing += left_out
        yield from _tables(run, rows)
        found = {
            "RTF against NFE": plots.rtf(rows, device, drawn / f"{run.path.stem}-by-nfe.png"),
            "roofline": plots.roofline(
                rows, run.ceilings, device, drawn / f"{run.path.stem}-roofline.png"
            ),
            "time breakdown": plots.breakdown(
                plots.evaluated(rows), device, drawn / f"{run.path.stem}-breakdown.png"
            ),
        }
        for name, plot in found.items():
            if plot is not None:
                without.discard(name)
                yield _image(plot, out)
    for path in sorted(set(folder.glob("*.json")) - {run.path for run in runs}):
        profile = json.loads(path.read_text())
        plot = plots.breakdown(plots.profiled(profile), device, drawn / f"{path.stem}.png")
        if plot is None:
            others.append(f"`{path.name}`")
        else:
            without.discard("time breakdown")
            yield f"### Where the time goes\n\n{_image(plot, out)}"
    yield from _missing(missing)
    if without:
        yield f"No data for the plots: {', '.join(sorted(without))}."
    if others:
        yield f"Results of other scripts: {', '.join(others)}."


def _facts(run: Run) -> str:
    facts = [f"commit {run.commit}", run.date]
    if "threads" in run.machine:
        facts.append(f"{run.machine['threads']} threads")
    versions = run.machine.get("versions") or {}
    facts += [f"{name} {version}" for name, version in versions.items() if version]
    return f"- `{run.path.name}`: {', '.join(facts)}"


def _tables(run: Run, rows: Sequence[Row]) -> Iterator[str]:
    for test in dict.fromkeys(row.test for row in rows):
        told = tables.TESTS.get(test, tables.Test(test))
        yield f"### {told.title}"
        yield f"{told.what} (`{run.path.name}`)".lstrip()
        yield from tables.test_tables([row for row in rows if row.test == test], run.device)


def _missing(missing: Iterable[Missing]) -> Iterator[str]:
    """Rows that lack a contender for one reason are counted; rows that are missing are named."""
    found: dict[tuple[str | None, str], dict[str, None]] = {}
    for row, contender, why in missing:
        found.setdefault((contender, why), {})[row] = None
    lines = []
    for (contender, why), rows in found.items():
        if contender is None:
            lines.append(f"- {why}: {'; '.join(rows)}")
        else:
            suites = ", ".join(dict.fromkeys(row.partition(" | ")[0] for row in rows))
            where = f"{len(rows)} rows of {suites}" if len(rows) > 1 else next(iter(rows))
            lines.append(f"- {contender} ({where}): {why}")
    if lines:
        yield "### Not shown"
        yield "\n".join(lines)


def _quality(examples: Path, out: Path) -> Iterator[str]:
    drawn, without = quality.draw(examples, out.parent / "plots" / "quality")
    yield "## Quality against NFE"
    yield from (_image(plot, out) for plot in drawn)
    if without:
        yield f"No results of: {', '.join(without)}."


def _image(plot: Plot, out: Path) -> str:
    return f"![{plot.alt}]({plot.path.relative_to(out.parent).as_posix().replace(' ', '%20')})"
