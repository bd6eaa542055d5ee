import json

import pytest
import torch

from imf_kernels.distill.__main__ import main
from imf_kernels.distill.logs import read
from imf_kernels.models import checkpoints
from tests.distill import own

DOCUMENT = """
folder: run
model:
  build: tests.distill.own:model
  arguments: {dim: 24}
  guidance: 2.0
objective: {name: int_mean_flow, nfe: 2}
data:
  dataset: {kind: "tests.distill.own:Noises", count: 24}
  collate: {kind: "tests.distill.own:collate"}
  frames: 40
  held_out: {share: 0.3, items: 5}
training: {updates: 6, lr: 1e-3, warmup: 2, ema_decay: 0.9, save_every: 2, log_every: 1}
validation: {every: 3, nfe: [1, 2], steps: 4}
previews: {every: 6, items: 2, nfe: [1]}
o3s: {nfe: [2], search: {budget: 4}}
output: {path: run/student.safetensors, nfe: 2}
"""


@pytest.fixture
def document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(DOCUMENT)
    return str(path)


def test_a_run_from_end_to_end(document, tmp_path, capsys):
    assert main([document, "--debug"]) == 0
    folder = tmp_path / "run"
    said = capsys.readouterr().out
    assert "student: run/student.safetensors" in said
    assert "o3s, nfe 2:" in said
    assert [r["update"] for r in read(folder / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "val/nfe2" in read(folder / "log.jsonl")[2]
    assert (folder / "previews/00000006.png").exists()
    held = checkpoints.read(folder / "student.safetensors")
    expected = own.model(24).student().state_dict()
    assert held.keys() == expected.keys()
    assert not torch.equal(held["out.weight"], expected["out.weight"])
    found = json.loads((folder / "o3s/o3s_nfe2.json").read_text())
    assert len(found["evaluations"]) == 4
    best = min(found["evaluations"], key=lambda e: e["value"])
    assert json.loads((folder / "student.grid.json").read_text()) == best["grid"]
