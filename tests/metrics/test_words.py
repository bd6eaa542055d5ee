"""Whisper on tiny models that say one sentence, and the counting of errors."""

import sys

import pytest
import torch

from imf_kernels.metrics import WER, whisper
from imf_kernels.metrics.wer import errors, normalised
from tests.metrics import tiny_whisper

SENTENCE = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers", reason="needs the [eval] extra")
    return tiny_whisper.save(tmp_path_factory.mktemp("whisper"), f" {SENTENCE}")


def counting():
    pytest.importorskip("jiwer", reason="needs the [eval] extra")
    pytest.importorskip("zhon", reason="needs the [eval] extra")


def test_whisper_of_transformers(folder):
    transcribe = whisper(folder, "en")
    assert transcribe(0.1 * torch.randn(8000)) == SENTENCE
    long = 0.1 * torch.randn(40 * 16000)
    assert transcribe(long) == f"{SENTENCE} {SENTENCE}", "two windows of 30 seconds"
    with pytest.raises(ValueError, match="zh"):  # this model knows English only
        whisper(folder, "zh")(0.1 * torch.randn(8000))


def test_whisper_of_faster_whisper(tmp_path):
    pytest.importorskip("faster_whisper", reason="needs faster-whisper")
    converters = pytest.importorskip("ctranslate2.converters")
    source = tiny_whisper.save(tmp_path / "source", "helloworld")
    files = ["tokenizer.json", "preprocessor_config.json"]
    converters.TransformersConverter(str(source), copy_files=files).convert(str(tmp_path / "ct2"))
    transcribe = whisper(tmp_path / "ct2", "en")
    assert transcribe(0.1 * torch.randn(8000)).endswith("helloworld")  # after two odd tokens


def test_errors_at_the_door(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metric 'wer': expected weights at .*nowhere"):
        whisper(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="language: expected one of en, zh, got 'fr'"):
        whisper(tmp_path, "fr")
    with pytest.raises(ValueError, match="language: expected one of en, zh, got 'fr'"):
        WER(str, "fr")


def test_a_missing_library_is_known_before_a_clip_is_heard(monkeypatch):
    counting()
    monkeypatch.setitem(sys.modules, "zhconv", None)
    WER(str, "en")
    with pytest.raises(ImportError, match="zhconv"):
        WER(str, "zh")


def test_wer_of_whisper(folder):
    counting()
    wer = WER(whisper(folder))
    heard = wer(0.1 * torch.randn(8000), "The quick, brown dog!")
    assert heard == (0.25, SENTENCE)


def test_wer_of_chinese_is_per_character():
    counting()
    pytest.importorskip("zhconv", reason="needs the [eval] extra")
    wer = WER(lambda clip: "今天天氣、很好。", "zh")
    assert wer(torch.zeros(1600), "今天，天气很好") == (0.0, "今天天气、很好。")  # noqa: RUF001
    assert wer(torch.zeros(1600), "明天天气很好").wer == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("text", "heard", "expected"),
    [
        ("Hello, world.", "hello world", 0),
        ("one two three four", "one three four", 1 / 4),
        ("one two", "one two three", 1 / 2),
        ("one two", "", 1),
        ("it's well-known", "its wellknown", 0),
        ("  spaces   between ", "spaces between", 0),
        ("one", "two three", 2),
    ],
)
def test_errors_per_word(text, heard, expected):
    counting()
    assert errors(text, heard) == pytest.approx(expected)


def test_normalised():
    counting()
    assert normalised("Don't  stop!") == "dont stop"
    assert normalised("Don't stop!", keep="'") == "don't stop"
    assert normalised("你好, 世界。", "zh") == "你 好 世 界"
    with pytest.raises(ValueError, match=r"text: expected at least one word, got '\.\.\.'"):
        errors("...", "anything")
