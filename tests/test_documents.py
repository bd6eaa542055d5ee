"""The Python blocks of the README, and of each page of docs, run, in order, as one program."""

import re
from pathlib import Path

import pytest

from benchmarks import buckets

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def run(path, tmp_path, monkeypatch):
    """The names that a page's program leaves."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert blocks
    names: dict = {"__name__": path.stem}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    return names


def test_readme(tmp_path, monkeypatch):
    names = run(README, tmp_path, monkeypatch)
    assert (tmp_path / "o3s.json").exists()
    assert names["mel"].shape == (8, 120, 80)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_docs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch)


def test_table_of_padding_is_what_the_script_says():
    assert buckets.table() in README.read_text()
    for guided, claim in ((False, "72 MiB"), (True, "122 MiB guided")):
        assert f"{buckets.static_bytes(8, 3200, guided) / 2**20:.0f} MiB" in claim
        assert claim in README.read_text()
