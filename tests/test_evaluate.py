"""`imf_kernels.evaluate`: the lists, the report, and that nothing is scored twice or lost."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

pytest.importorskip("librosa", reason="needs the [eval] extra")
pytest.importorskip("soundfile", reason="needs the [eval] extra")
pytest.importorskip("soxr", reason="needs the [eval] extra")
pytest.importorskip("transformers", reason="needs the [eval] extra")

import soundfile

from imf_kernels.evaluate import SCORERS, evaluate, read_list
from imf_kernels.evaluate.__main__ import main
from imf_kernels.evaluate.hashes import contents, sha256
from imf_kernels.evaluate.lists import Entry
from imf_kernels.metrics import log_mel, mcd_dtw, read_audio
from tests.metrics import tiny_whisper
from tests.metrics.tools import checkpoint

NAMES = ("b", "a", "c", "d")


def tone(path, hertz, rate=24000, seconds=0.4):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = torch.arange(int(rate * seconds)) / rate
    soundfile.write(path, 0.3 * torch.sin(2 * math.pi * hertz * time).numpy(), rate)


@pytest.fixture
def test_set(tmp_path):
    """A Seed-TTS-eval list of four tones, and what was generated for them."""
    lines = []
    for i, name in enumerate(NAMES):
        tone(tmp_path / "wavs" / f"{name}.wav", 300 + 100 * i)
        tone(tmp_path / "prompts" / f"{name}.wav", 500 + 100 * i)
        tone(tmp_path / "generated" / f"{name}.wav", 330 + 100 * i, seconds=0.5)
        lines.append(f"{name}|a prompt|prompts/{name}.wav|Text {name}.")
    (tmp_path / "meta.lst").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def counted(monkeypatch):
    """Of each metric, the utterances that were scored: by the length of their texts and files."""
    calls = []

    def load(weights, language, device):
        def score(sample):
            calls.append(sample.entry.name)
            if sample.entry.text == "fail":
                raise ValueError("cannot score this")
            return {"value": float(len(sample.entry.text)), "heard": "x"}

        return score

    scorer = dataclasses.replace(SCORERS["mcd"], load=load, needs=("text",))
    monkeypatch.setitem(SCORERS, "mcd", scorer)
    return calls


def entries(folder):
    return read_list(folder / "meta.lst")


def test_list_of_seed_tts(tmp_path):
    tone(tmp_path / "wavs" / "one.wav", 300)
    (tmp_path / "meta.lst").write_text(
        "one|said|prompts/1.wav|to say\n\ntwo|said|/far/2.wav|more|true/2.wav\nthree|x|p.wav|y\n"
    )
    assert read_list(tmp_path / "meta.lst") == [
        Entry("one", "to say", tmp_path / "prompts/1.wav", tmp_path / "wavs/one.wav"),
        Entry("two", "more", type(tmp_path)("/far/2.wav"), tmp_path / "true/2.wav"),
        Entry("three", "y", tmp_path / "p.wav", None),
    ]


def test_list_of_librispeech(tmp_path):
    row = ["4446-2271-0001", "2.9", "A prompt.", "4446-2273-0020", "6.1", "To say."]
    (tmp_path / "pc.lst").write_text("\t".join(row) + "\n")
    audio = type(tmp_path)("/audio/test-clean")
    assert read_list(tmp_path / "pc.lst", audio) == [
        Entry(
            "4446-2273-0020",
            "To say.",
            audio / "4446/2271/4446-2271-0001.flac",
            audio / "4446/2273/4446-2273-0020.flac",
        )
    ]


def test_plain_lists(tmp_path):
    (tmp_path / "list.csv").write_text('name,text,prompt\n1,"Yes, so.",p.wav\n2,No.,\n')
    assert read_list(tmp_path / "list.csv") == [
        Entry("1", "Yes, so.", tmp_path / "p.wav"),
        Entry("2", "No."),
    ]
    rows = [{"name": "1", "truth": "t.wav"}, {"name": "2", "text": "是"}]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_list(tmp_path / "list.jsonl") == [
        Entry("1", truth=tmp_path / "t.wav"),
        Entry("2", "是"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.lst", "a|b|c\n", r"line 1: expected 4 or 5 fields between '\|', got 3"),
        ("m.lst", "a|b|c|d\nx|y\n", "line 2: "),
        ("m.lst", "a\tb\n", "expected 6 fields"),
        ("m.lst", "", "at least one utterance, got none"),
        ("m.lst", "a|b|c|d\na|b|c|e\n", "got 'a' twice"),
        ("m.jsonl", '{"text": "x"}\n', "line 1: expected a field 'name'"),
        ("m.jsonl", "[1]\n", "line 1: expected a field 'name'"),
        ("m.jsonl", "{\n", "m.jsonl"),
        ("m.csv", "text\nx\n", "line 2: expected a field 'name'"),
    ],
)
def test_lists_that_are_none(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / name)


def test_no_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="list: expected a file"):
        read_list(tmp_path / "none.lst")


def test_audio_is_mono_and_resampled(tmp_path):
    tone(tmp_path / "a.flac", 440, rate=48000)
    audio = read_audio(tmp_path / "a.flac")
    assert audio.dtype == torch.float32
    assert audio.shape == (6400,)
    expected = 0.3 * torch.sin(2 * math.pi * 440 * torch.arange(6400) / 16000)
    torch.testing.assert_close(audio[500:-500], expected[500:-500], atol=1e-3, rtol=0)
    stereo = torch.stack([torch.ones(100), torch.zeros(100)], dim=1)
    soundfile.write(tmp_path / "s.wav", stereo.numpy(), 16000, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "s.wav"), torch.full((100,), 0.5))
    (tmp_path / "t.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"expected an audio file, got .*t\.wav"):
        read_audio(tmp_path / "t.wav")


def test_report(test_set):
    out = test_set / "scores.json"
    torch.save({"model": checkpoint("large")[0]}, test_set / "wavlm_large_finetune.pth")
    seen = []
    report = evaluate(
        test_set / "generated", entries(test_set), ["mcd", "sim_o"], out=out, weights=test_set,
        progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert json.loads(out.read_text()) == report
    assert [row["name"] for row in report["utterances"]] == list(NAMES)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    values = [row["scores"]["mcd"]["value"] for row in report["utterances"]]
    pair = [test_set / folder / "a.wav" for folder in ("generated", "wavs")]
    expected = mcd_dtw(*([log_mel(read_audio(path), 16000)] for path in pair))
    assert values[1] == expected > 0
    assert report["metrics"]["mcd"] == {"mean": pytest.approx(sum(values) / 4), "count": 4}
    assert -1 <= report["metrics"]["sim_o"]["mean"] <= 1


def test_processes_score_as_one_does(test_set):
    class Loudness(torch.nn.Module):
        def forward(self, wave: torch.Tensor, rate: int):
            return wave.square().mean(dim=1) * rate

    torch.jit.script(Loudness()).save(test_set / "utmos22_strong.pt")
    reports = [
        evaluate(
            test_set / "generated", entries(test_set), ["utmos"], weights=test_set, workers=workers
        )
        for workers in (1, 2)
    ]
    assert reports[0] == reports[1]


def test_nothing_is_scored_twice(test_set, counted):
    out = test_set / "scores.json"

    def run():
        counted.clear()
        report = evaluate(test_set / "generated", entries(test_set), ["mcd"], out=out)
        assert [row["name"] for row in report["utterances"]] == list(NAMES)
        return list(counted)

    assert run() == list(NAMES)
    first = out.read_text()
    assert run() == []
    assert out.read_text() == first
    tone(test_set / "generated" / "c.wav", 900)
    assert run() == ["c"], "another generated file"
    text = (test_set / "meta.lst").read_text()
    (test_set / "meta.lst").write_text(text.replace("Text a.", "Another text."))
    assert run() == ["a"], "another text"
    assert json.loads(out.read_text())["utterances"][1]["scores"]["mcd"]["value"] == 13.0


def test_scores_of_other_metrics_stay(test_set, counted):
    out = test_set / "scores.json"
    evaluate(test_set / "generated", entries(test_set), ["mcd"], out=out)
    torch.save({"model": checkpoint("large")[0]}, test_set / "wavlm_large_finetune.pth")
    tone(test_set / "generated" / "c.wav", 900)
    report = evaluate(
        test_set / "generated", entries(test_set), ["sim_o"], out=out, weights=test_set
    )
    assert {name: metric["count"] for name, metric in report["metrics"].items()} == {
        "mcd": 3,
        "sim_o": 4,
    }


def test_weights_are_told_apart(test_set, monkeypatch):
    out, path = test_set / "scores.json", test_set / "wavlm_large_finetune.pth"
    weights = checkpoint("large")[0]

    def sim_o():
        torch.save({"model": weights}, path)
        return evaluate(
            test_set / "generated", entries(test_set), ["sim_o"], out=out, weights=test_set
        )["metrics"]["sim_o"]["mean"]

    first = sim_o()
    weights["linear.weight"] = weights["linear.weight"].flip(1)
    assert sim_o() != first


def test_hashes_see_weights_and_nothing_beside_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = sha256(*contents(str(tmp_path)))
    for name in ("__pycache__", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    assert sha256(*contents(str(tmp_path))) == first
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert sha256(*contents(str(tmp_path))) != first
    assert contents("hf://owner/repo") == ["hf://owner/repo"]


def test_what_was_scored_before_an_error_is_kept(test_set, counted):
    out = test_set / "scores.json"
    text = (test_set / "meta.lst").read_text()
    (test_set / "meta.lst").write_text(text.replace("Text c.", "fail"))
    with pytest.raises(ValueError, match=r"metric 'mcd' of .*c\.wav: cannot score this"):
        evaluate(test_set / "generated", entries(test_set), ["mcd"], out=out)
    assert json.loads(out.read_text())["metrics"]["mcd"]["count"] == 2
    (test_set / "meta.lst").write_text(text)
    counted.clear()
    evaluate(test_set / "generated", entries(test_set), ["mcd"], out=out)
    assert counted == ["c", "d"]


def scored(test_set, listed, *names, **options):
    """The report's means, and its counts."""
    out = test_set / "scores.json"
    with contextlib.suppress(ValueError):  # of a text that says "fail"
        evaluate(test_set / "generated", listed, names, out=out, **options)
    held = json.loads(out.read_text())["metrics"]
    return {name: (metric["mean"], metric["count"]) for name, metric in held.items()}


@pytest.fixture
def constant(monkeypatch):
    """Another metric, which reads nothing but the generated file: 5."""
    scorer = dataclasses.replace(SCORERS["utmos"], load=lambda *_: lambda _: {"value": 5.0})
    monkeypatch.setitem(SCORERS, "utmos", dataclasses.replace(scorer, weights=()))


def test_no_mean_is_of_old_and_new_texts(test_set, counted, constant):
    def listed(*texts):
        return [Entry(name, text) for name, text in zip(NAMES, texts, strict=True)]

    old = listed("1", "1", "1", "1")
    assert scored(test_set, old, "mcd") == {"mcd": (1.0, 4)}
    broken = listed("333", "333", "fail", "333")
    assert scored(test_set, broken, "mcd") == {"mcd": (3.0, 2)}, "the others are of old texts"
    half = listed("333", "22", "22", "22")
    assert scored(test_set, half, "utmos") == {"mcd": (3.0, 1), "utmos": (5.0, 4)}
    bare = [Entry(name) for name in NAMES]
    assert scored(test_set, bare, "utmos") == {"utmos": (5.0, 4)}
    counted.clear()
    assert scored(test_set, half, "mcd") == {"mcd": (2.25, 4), "utmos": (5.0, 4)}
    assert counted == ["a", "c", "d"], "what was scored stays, whatever the means are of"


def test_no_mean_is_of_two_languages(test_set, counted, constant):
    listed = entries(test_set)
    assert scored(test_set, listed, "mcd") == {"mcd": (7.0, 4)}
    assert scored(test_set, listed[:1], "mcd", language="zh") == {"mcd": (7.0, 1)}
    assert scored(test_set, listed, "utmos") == {"utmos": (5.0, 4)}
    assert scored(test_set, listed, "mcd") == {"mcd": (7.0, 4), "utmos": (5.0, 4)}


def test_a_shorter_list_leaves_the_other_rows(test_set, counted):
    listed = [Entry(name, "x" * k) for k, name in enumerate(NAMES, 1)]
    scored(test_set, listed, "mcd")
    assert scored(test_set, listed[2:], "mcd") == {"mcd": (3.5, 2)}
    rows = json.loads((test_set / "scores.json").read_text())["utterances"]
    assert [row["name"] for row in rows] == ["c", "d", "b", "a"]
    counted.clear()
    assert scored(test_set, listed, "mcd") == {"mcd": (2.5, 4)}
    assert not counted


def test_a_metric_named_twice_is_scored_once(test_set, counted):
    assert scored(test_set, entries(test_set), "mcd", "mcd") == {"mcd": (7.0, 4)}
    assert counted == list(NAMES)


def test_a_report_without_a_folder_is_an_error_before_any_score(test_set, counted):
    with pytest.raises(FileNotFoundError, match=r"out: expected a file in a folder, got .*none"):
        evaluate(
            test_set / "generated", entries(test_set), ["mcd"], out=test_set / "none" / "s.json"
        )
    assert not counted


def test_missing_files_are_named_or_counted(test_set, counted):
    for name in "bacd":
        (test_set / "generated" / f"{name}.wav").rename(test_set / f"{name}.wav")
    tone(test_set / "generated" / "d.flac", 300)
    with pytest.raises(FileNotFoundError, match=r"each of 4 .* 3 are missing: b, a, c$"):
        evaluate(test_set / "generated", entries(test_set), ["mcd"])
    report = evaluate(test_set / "generated", entries(test_set), ["mcd"], allow_missing=True)
    assert report["missing"] == ["b", "a", "c"]
    assert report["metrics"]["mcd"]["count"] == 1
    (test_set / "generated" / "d.flac").unlink()
    with pytest.raises(FileNotFoundError, match="at least one file, got none"):
        evaluate(test_set / "generated", entries(test_set), ["mcd"], allow_missing=True)


def test_errors_at_the_door(test_set, monkeypatch):
    def run(*names, listed=None, **options):
        evaluate(test_set / "generated", listed or entries(test_set), names, **options)

    with pytest.raises(ValueError, match="metrics: expected at least one"):
        run()
    with pytest.raises(ValueError, match=r"metrics: expected one of wer, sim_o, .*, got 'mos'"):
        run("mcd", "mos")
    with pytest.raises(ValueError, match="workers: expected an integer >= 1, got 0"):
        run("mcd", workers=0)
    with pytest.raises(FileNotFoundError, match=r"'sim_o': expected weights at .*finetune\.pth"):
        run("sim_o", weights=test_set)
    with pytest.raises(FileNotFoundError, match=r"'utmos': .* folder with .*SpeechMOS, .* hub"):
        run("utmos")
    bare = [Entry(name) for name in NAMES]
    with pytest.raises(ValueError, match=r"'mcd': .* a truth .*, 4 have none: b, a, c, \.\.\."):
        run("mcd", listed=bare)
    (test_set / "wavs" / "a.wav").unlink()
    lost = [Entry("a", truth=test_set / "wavs" / "a.wav")]
    with pytest.raises(FileNotFoundError, match=r"\(truth\), 1 are missing: .*a\.wav"):
        run("mcd", listed=lost)
    (test_set / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"out: expected a report or no file, got .*other\.json"):
        run("mcd", listed=entries(test_set)[:1], out=test_set / "other.json")
    nan = dataclasses.replace(SCORERS["mcd"], load=lambda *_: lambda _: {"value": math.nan})
    monkeypatch.setitem(SCORERS, "mcd", nan)
    with pytest.raises(ValueError, match=r"'mcd' of .*b\.wav: expected a finite score, got nan"):
        run("mcd", listed=entries(test_set)[:1])


def test_what_was_heard_is_kept(test_set):
    for library in ("jiwer", "zhon"):
        pytest.importorskip(library, reason="needs the [eval] extra")
    tiny_whisper.save(test_set / "whisper-large-v3", "text b")
    report = evaluate(test_set / "generated", entries(test_set), ["wer"], weights=test_set)
    scores = [row["scores"]["wer"] for row in report["utterances"]]
    assert [score["value"] for score in scores] == [0, 0.5, 0.5, 0.5]
    assert {score["heard"] for score in scores} == {"text b"}


def test_command(test_set, capsys, counted):
    arguments = [test_set / "generated", "--list", test_set / "meta.lst", "--metrics", "mcd"]
    main([*map(str, arguments), "--out", str(test_set / "scores.json")])
    said = capsys.readouterr()
    assert "7.0000" in said.out
    assert "scoring" in said.err
    assert "4/4" in said.err
    assert json.loads((test_set / "scores.json").read_text())["metrics"]["mcd"]["mean"] == 7.0
    with pytest.raises(SystemExit, match=r"metric 'sim_o': expected weights, a folder with"):
        main([*map(str, arguments[:-1]), "sim_o", "--out", str(test_set / "scores.json")])
    assert not capsys.readouterr().err, "no bar of what has not begun"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "wer, sim_xvector: by default the" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="out: expected a file in a folder"):
        main([*map(str, arguments), "--out", str(test_set / "none" / "scores.json")])
