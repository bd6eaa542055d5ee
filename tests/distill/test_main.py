import json

import pytest
import torch
import yaml

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
  held_out: {share: 0.3, items: 3}
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
    found = json.loads((folder / "o3s/o3s_nfe2_to_teacher@teacher.json").read_text())
    assert len(found["evaluations"]) == 4
    best = min(found["evaluations"], key=lambda e: e["value"])
    assert json.loads((folder / "student.grid.json").read_text()) == best["grid"]


def test_a_dry_run_tells_and_trains_nothing(document, tmp_path, capsys):
    assert main([document, "--dry-run", "--set", "training.lr=2e-3"]) == 0
    said = capsys.readouterr().out
    told = yaml.safe_load(said.partition("student: ")[0])
    assert told["training"]["lr"] == 2e-3
    assert told["training"]["clip"] == 1.0, "defaults are told too"
    assert told["model"]["build"] == "tests.distill.own:model"
    trained = sum(p.numel() for p in own.model(24).student().parameters())
    assert f"student: {trained:,} parameters trained, 0 frozen" in said
    assert "3 utterances held out" in said
    assert not (tmp_path / "run").exists()


def test_errors_are_a_line(document, capsys):
    for override, line in (
        ("training.lr=fast", "error: training.lr: expected a number, got 'fast'"),
        ("data.frames=3", "error: data.frames: expected no fewer than the longest utterance"),
        ("data.dataset.channels=5", "error: data.dataset: expected mels of 4 channels, got 5"),
        ("data.held_out.share=1e-9", "error: data.held_out.share: expected some utterances"),
    ):
        assert main([document, "--set", override]) == 1
        said = capsys.readouterr()
        assert said.err.startswith(line)
        assert said.err.count("\n") == 1
    with pytest.raises(ValueError, match=r"training\.lr"):
        main([document, "--debug", "--set", "training.lr=fast"])


def test_a_damaged_utterance_is_named_and_excluded(document, monkeypatch, capsys):
    class Damaged(own.Noises):
        def __getitem__(self, index):
            if self.names[index] == "noise_5":
                raise ValueError("5.wav: expected audio")
            return super().__getitem__(index)

    monkeypatch.setattr(own, "Noises", Damaged)
    chosen = [f"--set={name}=null" for name in ("validation", "previews", "o3s")]
    chosen += ["--set=training.updates=12", "--set=data.held_out=null"]
    assert main([document, *chosen]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: ValueError: 5.wav: expected audio. To go on without it, put 'noise_5'"
    )
    assert said.count("\n") == 1
    assert main([document, *chosen, "--set=data.exclude=[noise_5]"]) == 0, "goes on"
