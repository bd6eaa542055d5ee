"""What a document says, trained by two processes as by one."""

from pathlib import Path

import pytest

from imf_kernels.distill.__main__ import main
from imf_kernels.models import StepTokenDiT, load_student
from tests.distill import made
from tests.distill.ranks import launch
from tests.distill.tools import close, read

DOCUMENT = """
model:
  family: f5_v1
  checkpoint: pretrained/model.safetensors
  guidance: 3.0
data:
  dataset: {kind: audio_folder, folder: audio, tokenizer: char, vocab: pretrained/vocab.txt}
  collate: {kind: infilling, shares: [1, 1]}
  frames: 200
  max_rows: 2
training: {updates: 2, lr: 1e-3, ema_decay: 0.5, log_every: 1}
"""
KINDS = {
    "LoRA": ["objective={name: int_mean_flow, nfe: 2}", "model.student={lora: {rank: 2}}"],
    "SplitMeanFlow": ["objective={name: split_mean_flow}"],
    "DSFlow": ["objective={name: ds_flow, nfe: 2}", "model.student={step_tokens: {counts: [2]}}"],
    "MeanFlow": ["objective={name: mean_flow}"],
}


def train(name, ranks):
    """Two batches an update, on any number of ranks. The exit status."""
    folder = f"{name} {ranks}"
    chosen = [f"folder={folder}", f"training.accumulate={2 // ranks}", *KINDS[name]]
    chosen.append(f"output={{path: {folder}/student.safetensors}}")
    return main(["run.yaml", "--debug", *(f"--set={value}" for value in chosen)])


def train_all(rank):
    return [train(name, ranks=2) for name in KINDS]


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Infilling of whole rows draws nothing, so that any number of ranks has the same batches."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    made.f5(tmp_path)
    Path("run.yaml").write_text(DOCUMENT)
    assert launch(train_all) == [[0] * len(KINDS)] * 2
    for name in KINDS:
        assert train(name, ranks=1) == 0
        for part in ("model", "ema"):
            close(read(Path(f"{name} 2"), 2, part), read(Path(f"{name} 1"), 2, part))
        load = StepTokenDiT.load if name == "DSFlow" else load_student
        load(f"{name} 2/student.safetensors")
