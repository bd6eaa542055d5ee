"""The README's Python blocks run, in order, as one program."""

import re
from pathlib import Path

from benchmarks import buckets

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "o3s.json").exists()
    assert names["mel"].shape == (8, 120, 80)


def test_table_of_padding_is_what_the_script_says():
    assert buckets.table() in README.read_text()
    for guided, claim in ((False, "72 MiB"), (True, "122 MiB guided")):
        assert f"{buckets.static_bytes(8, 3200, guided) / 2**20:.0f} MiB" in claim
        assert claim in README.read_text()
