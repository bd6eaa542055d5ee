import json
from pathlib import Path

import pytest
import torch
import yaml

from imf_kernels.distill import RankFailed, Stopped
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
    assert [r["update"] for r in read(folder / "log.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert all("val/nfe2" in read(folder / "log.jsonl")[update] for update in (0, 3, 6))
    assert (folder / "previews/00000006.png").exists()
    held = checkpoints.read(folder / "student.safetensors")
    expected = own.model(24).student().state_dict()
    assert held.keys() == expected.keys()
    assert not torch.equal(held["out.weight"], expected["out.weight"])
    found = json.loads((folder / "o3s/o3s_nfe2_to_teacher@teacher.json").read_text())
    assert len(found["evaluations"]) == 4
    paid = [json.loads(path.read_text()) for path in (folder / "o3s/evaluations").iterdir()]
    assert {p["settings"]["solves"].split(" ", 1)[1] for p in paid} == {"4 2.0"}, "steps, guidance"
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
    assert "3 utterances held out; left out: 0 for their length, 0 for data.frames" in said
    assert said.endswith("begins anew\n")
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


SHORT = ["--set=previews=null", "--set=o3s=null", "--set=validation=null"]


def test_another_document_is_refused_on_resuming(document, capsys):
    assert main([document, *SHORT, "--debug"]) == 0
    for override, line in (
        ("model.guidance=1.5", "model.guidance: expected 2.0, with which this run was begun, "),
        ("objective.nfe=3", "objective.nfe: expected 2, with which this run was begun, got 3; "),
        ("objective.guided=1", "objective.guided: expected one of"),
        ("data.frames=50", "data.frames: expected 40, "),
        ("data.dataset.count=23", "data.dataset.count: expected 24, "),
        ("data.held_out.share=0.4", "data.held_out.share: expected 0.3, "),
    ):
        assert main([document, *SHORT, f"--set={override}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {line}")
    free = ["--set=data.held_out.items=2", "--set=model.student.checkpoint_activations=false"]
    assert main([document, *SHORT, *free, "--debug"]) == 0
    with open("run/config.yaml") as file:
        assert yaml.safe_load(file)["data"]["held_out"]["items"] == 2


def test_before_the_first_checkpoint_a_document_may_change(document, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("model: {guidance: 7.0}")
    assert main([document, *SHORT, "--debug"]) == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_several_ranks_say_one_line(document, monkeypatch, capsys, rank):
    def stopped(*_, **__):
        raise Stopped(3, Path("run/checkpoints/step_00000003"), "SIGTERM")

    def failed(*_, **__):
        raise RankFailed(2, "ValueError: broken.wav")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("imf_kernels.distill.__main__.run", stopped)
    assert main([document]) == 143
    assert capsys.readouterr().err.count("\n") == (rank == "0")
    monkeypatch.setattr("imf_kernels.distill.__main__.run", failed)
    assert main([document]) == 1
    assert capsys.readouterr().err == "", "the rank that failed has said it"
