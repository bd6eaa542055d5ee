"""The recipes: the small ones run, the large ones are read."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imf_kernels.distill import config as configs
from imf_kernels.distill.__main__ import main
from imf_kernels.distill.logs import JsonLines, read
from imf_kernels.models import StepTokenDiT, checkpoints, load_cosyvoice2, load_f5, load_student
from tests.distill import made

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def student(path):
    held = load_student(path)
    return held, held.model.state_dict()


def test_f5_runs_and_resumes_to_the_bit(place, monkeypatch):
    made.f5(place)
    recipe = str(RECIPES / "f5_tiny.yaml")

    def chosen(folder):
        return [f"--set=folder={folder}", f"--set=output.path={folder}/student.safetensors"]

    assert main([recipe, "--debug", *chosen("whole")]) == 0
    updated = JsonLines.updated

    def interrupted(self, trainer, record):
        updated(self, trainer, record)
        if trainer.update == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(JsonLines, "updated", interrupted)
        assert main([recipe, "--debug", *chosen("parts")]) == 128 + signal.SIGTERM
    assert not (place / "parts/student.safetensors").exists()
    command = [sys.executable, "-m", "imf_kernels.distill", recipe, *chosen("parts")]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr
    assert "goes on after update 3\n" in done.stdout
    assert "student: parts/student.safetensors" in done.stdout
    whole, weights = student("whole/student.safetensors")
    parts, others = student("parts/student.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert torch.equal(whole.grid, parts.grid)
    assert len(whole.grid) == 3
    assert whole.guidance == 3.0

    teacher = load_f5("pretrained/model.safetensors", "f5_v1").student().state_dict()
    frozen = {n for n in teacher if n.startswith("text_embed.") or n.endswith("inv_freq")}
    moved = {n for n in teacher if not torch.equal(teacher[n], weights[n])}
    assert moved == teacher.keys() - frozen
    for folder in ("whole", "parts"):
        records = read(place / folder / "log.jsonl")
        assert [r["update"] for r in records] == [0, 1, 2, 3, 4]
        assert all({"val/nfe1", "val/nfe2"} <= records[k].keys() for k in (0, 2, 4))
        assert len(list((place / folder / "previews").glob("00000004*"))) == 4
        assert list((place / folder / "tensorboard").iterdir())
        assert (place / folder / "o3s/o3s_nfe2_to_teacher@teacher.json").exists()


def test_cosyvoice2_runs(place):
    made.cosyvoice2(place)
    assert main([str(RECIPES / "cosyvoice2_tiny.yaml"), "--debug"]) == 0
    held, weights = student("run/flow.pt")
    teacher = load_cosyvoice2("pretrained/flow.pt").student().state_dict()
    assert all(not torch.equal(weights[name], teacher[name]) for name in teacher)
    assert held.guidance == pytest.approx(1.7)
    assert len(held.grid) == 3
    theirs = checkpoints.read("run/flow.pt")
    before = checkpoints.read("pretrained/flow.pt")
    assert theirs.keys() == before.keys(), "CosyVoice loads it strictly"
    for name in before:
        assert torch.equal(theirs[name], before[name]) != name.startswith("decoder."), name


def test_other_students(place):
    """Adapters are written merged; w is told; a smaller student keeps the text tower."""
    made.f5(place)
    recipe = str(RECIPES / "f5_tiny.yaml")
    short = ["--set=previews=null", "--set=o3s=null", "--set=validation=null"]
    short += ["--set=training.updates=1", "--set=training.warmup=0"]
    lora = ["--set=model.student.lora={rank: 2}", "--set=training.precision=bf16"]
    pytest.importorskip("peft")
    assert main([recipe, "--debug", *short, *lora]) == 0
    _, weights = student("run/student.safetensors")
    teacher = load_f5("pretrained/model.safetensors", "f5_v1").student().state_dict()
    assert weights.keys() == teacher.keys()
    moved = {n.rpartition(".")[0] for n in teacher if not torch.equal(teacher[n], weights[n])}
    assert {n.split(".")[-1] for n in moved} <= {"to_q", "to_k", "to_v", "0", "2"} | {
        "time_embed_mixer"
    }
    assert "time_embed_mixer" in moved
    assert "transformer_blocks.0.attn.to_q" in moved

    told = ["--set=folder=told", "--set=model.student.guidance=true", "--set=validation={steps: 2}"]
    told += ["--set=objective.guidance=[1, 4]", "--set=validation.nfe=[1]"]
    assert main([recipe, "--debug", *short, *told]) == 0
    held, weights = student("run/student.safetensors")
    assert held.model.config.guidance
    assert read(place / "told/log.jsonl")[0]["val/nfe1"] > 0

    smaller = ["--set=folder=small", "--set=model.student.sizes={depth: 1, dim: 16}"]
    assert main([recipe, "--debug", *short, *smaller]) == 0
    held, weights = student("run/student.safetensors")
    assert (held.model.config.depth, held.model.config.dim) == (1, 16)
    for name, value in teacher.items():
        if name.startswith("text_embed."):
            assert torch.equal(weights[name], value)

    other = ["--set=folder=other", "--set=model.student.family=f5_v0"]
    other += ["--set=model.student.checkpoint=pretrained/model.safetensors"]
    assert main([recipe, "--debug", *short, *other]) == 0
    held, _ = student("run/student.safetensors")
    assert held.model.config.rope_heads == 1, "as F5-TTS v0 rotates"


def test_a_student_with_step_tokens(place):
    made.f5(place)
    said = ["--set=model.student={step_tokens: {counts: [1, 2], tokens: 2}}"]
    said += ["--set=objective={name: ds_flow, nfe: 4}", "--set=o3s.search.budget=2"]
    said += ["--set=training.updates=2", "--set=validation.steps=2", "--set=previews=null"]
    assert main([str(RECIPES / "f5_tiny.yaml"), "--debug", *said]) == 0
    held = StepTokenDiT.load("run/student.safetensors")
    assert (held.counts, held.tokens) == ((1, 2), 2)
    before = StepTokenDiT.of(load_f5("pretrained/model.safetensors", "f5_v1"), (1, 2), 2)
    assert held.proj_out.weight.shape == before.proj_out.weight.shape
    assert not torch.equal(held.proj_out.weight, before.proj_out.weight)
    last = read(place / "run/log.jsonl")[-1]
    assert {"val/nfe1", "val/nfe2", "endpoint", "velocity"} <= last.keys()
    found = json.loads((place / "run/o3s/o3s_nfe2_to_teacher@teacher.json").read_text())[
        "evaluations"
    ]
    best = min(found, key=lambda evaluation: evaluation["value"])
    assert json.loads((place / "run/student.grid.json").read_text()) == best["grid"]


def large(name, place):
    document = configs.read(RECIPES / f"{name}.yaml")
    checkpoint = document["model"]["checkpoint"]
    if not checkpoint.startswith("hf://"):
        (place / checkpoint).parent.mkdir(parents=True)
        (place / checkpoint).touch()
    return configs.parse(document)


@pytest.mark.parametrize("name", ["f5_base_8xa100", "cosyvoice2_8xa100"])
def test_large_recipes_say_what_the_papers_tables_need(name, place):
    config = large(name, place)
    assert config.data.frames == 38_400
    assert config.objective["nfe"] == 16
    assert config.model.guidance == (3.0 if name.startswith("f5") else 1.7)
    assert config.objective["region"] == ("span" if name.startswith("f5") else "all")
    assert config.training.betas == (0.9, 0.999), "the clients'"
    assert config.training.ema_decay is not None
    assert config.o3s is not None
    text = (RECIPES / f"{name}.yaml").read_text()
    hours = config.training.updates * 5.17 / 3600
    assert f"{hours:.1f} h" in text, "the estimate is of this many updates"


def test_the_recipe_for_24_gb(place):
    config = large("f5_lora_24gb", place)
    assert config.model.student.lora is not None
    assert config.model.student.checkpoint_activations
    assert config.model.teacher_dtype is None
    assert config.training.precision == "bf16"
    assert config.data.frames * config.training.accumulate == 38_400


def test_two_sharded_ranks_write_one_plain_student(place):
    made.f5(place)
    recipe = str(RECIPES / "f5_tiny.yaml")
    chosen = ["--set=training.parallel=fsdp2", "--set=training.updates=2", "--set=previews=null"]
    chosen += ["--set=training.precision=bf16"]  # the teacher's; the student stays float32
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *ranks, "-m", "imf_kernels.distill", recipe, *chosen]
    there = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student: run/student.safetensors") == 1
    held, weights = student("run/student.safetensors")
    teacher = load_f5("pretrained/model.safetensors", "f5_v1").student().state_dict()
    assert all(weights[name].shape == teacher[name].shape for name in teacher)
    trained = weights["proj_out.weight"]
    assert not torch.equal(trained, teacher["proj_out.weight"])
    assert not torch.equal(trained, trained.bfloat16().float())
    assert len(held.grid) == 3
    (last,) = (r for r in read(place / "run/log.jsonl") if r["update"] == 2)
    assert 0 < last["val/nfe2"] < last["val/nfe1"]
