"""What is found out and told before a run trains."""

import sys

import pytest

from imf_kernels.distill.__main__ import main
from imf_kernels.distill.stops import Stopped
from tests.distill import made
from tests.distill.test_main import DOCUMENT
from tests.distill.test_recipes import RECIPES

SHORT = ["--set=validation=null", "--set=previews=null", "--set=o3s=null"]
TINY = str(RECIPES / "f5_tiny.yaml")


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(DOCUMENT)
    return ["run.yaml", *SHORT]


@pytest.fixture
def f5(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.f5(tmp_path)
    return [TINY, *SHORT, "--dry-run"]


@pytest.mark.parametrize("path", ["folder", "output.path"])
@pytest.mark.parametrize("dry", [True, False])
def test_places_that_cannot_be_written(own, path, dry, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = "file/run" if path == "folder" else "file/student.safetensors"
    assert main([*own, f"--set={path}={place}", *["--dry-run"] * dry]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: expected a folder that can be written, got file")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_where_a_run_goes_on_or_why_not(own, tmp_path, capsys):
    assert main([*own, "--set=training.updates=3", "--set=training.decay=constant"]) == 0
    assert "goes on" not in capsys.readouterr().out
    own += ["--set=training.decay=constant"]
    assert main([*own, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("goes on after update 3 (step_00000003)\n")
    assert main([*own, "--dry-run", "--set=training.lr=1e-2"]) == 1
    assert capsys.readouterr().err.startswith("error: training.lr: expected 0.001, with which")
    assert main(own) == 0
    assert "goes on after update 3\n" in capsys.readouterr().out
    for path in (tmp_path / "run/checkpoints").glob("step_*/manifest.json"):
        path.unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert main([*own, "--dry-run"]) == 1
    assert capsys.readouterr().err.startswith("error: folder: expected a checkpoint that is whole")


def test_vocabularies_of_another_size(f5, tmp_path, capsys):
    (tmp_path / "less.txt").write_text("a\nb\n")
    for override, line in (
        ("vocab=less.txt", "vocab: expected the checkpoint's 20 tokens, got 2"),
        ("tokenizer=byte", "vocab: expected none with tokenizer 'byte'"),
        ("tokenizer=null", "tokenizer: expected 'char' or 'pinyin' with a vocab, got None"),
        ("tokenizer=pinyin", "tokenizer: 'pinyin' is F5-TTS's own: pip install f5-tts"),
    ):
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(sys.modules, "f5_tts", None)
            assert main([*f5, f"--set=data.dataset.{override}"]) == 1
        assert capsys.readouterr().err.startswith(f"error: data.dataset.{line}")
    without = "--set=data.dataset.vocab=null"
    for kind, line in (
        ("byte", "the checkpoint's 20 tokens, got 256"),
        ("null", "char, pinyin or byte for the texts of F5-TTS, got nothing"),
    ):
        assert main([*f5, without, f"--set=data.dataset.tokenizer={kind}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: data.dataset.tokenizer: expected {line}")


def test_what_is_left_out_is_told(f5, capsys):
    """Of twelve files of 0.4 to 0.73 s two are too short, and one too long for a batch."""
    short = "--set=data.dataset.min_seconds=0.45"
    held = "--set=data.held_out={names: [11.wav, 05.wav]}"
    assert main([*f5, short, held, "--set=data.drop_long=true", "--set=data.frames=67"]) == 0
    told = capsys.readouterr().out
    assert "data: 8 utterances (" in told
    assert " hours), 1 utterances held out; left out: 2 for their length, 1 for data.frames" in told
    assert main([*f5, short, "--set=data.held_out={names: [00.wav]}"]) == 1
    told = capsys.readouterr().err
    assert "min_seconds and max_seconds have left without 2 others), got ['00.wav']" in told


def test_a_checkpoint_of_another_client(f5, capsys):
    for family, name in (("cosyvoice2", "CosyVoice2"), ("cosyvoice3", "CosyVoice3")):
        assert main([*f5, f"--set=model.family={family}"]) == 1
        said = capsys.readouterr().err
        assert f"expected a checkpoint of {name}, got what looks like F5-TTS's" in said


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("another", 143)])
def test_statuses_of_a_run_that_was_stopped(own, name, status, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Stopped(3, tmp_path, name)

    monkeypatch.setattr("imf_kernels.distill.__main__.run", stopped)
    assert main(own) == status
