"""Datasets on disk: folders of audio, and what F5-TTS and CosyVoice prepare."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from benchmarks import f5_client
from imf_kernels.data import (
    AudioFolder,
    Continuation,
    CosyVoiceParquet,
    F5Prepared,
    Infilling,
    Loader,
    audio,
    mels,
    regroup,
)
from imf_kernels.distill.build import split
from imf_kernels.distill.config import HeldOut
from tests.data_loading import sounds


def mel_of(wave, name="vocos"):
    return mels.NAMED[name](torch.from_numpy(wave))


def same(one, other):
    assert one.name == other.name
    assert torch.equal(one.mel, other.mel)
    assert one.features.keys() == other.features.keys()
    assert all(torch.equal(one.features[name], other.features[name]) for name in one.features)


# -- audio ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [24000, 8000, 22050, 44100])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_headers_tell_what_is_read(tmp_path, kind, rate):
    path = sounds.write(tmp_path / f"a.{kind}", 9001, rate, channels=2)
    wave = audio.read("a", path, 24000)
    samples, given = torch.tensor(audio.header(path))
    assert audio.resampled(samples, given, 24000) == len(wave) == round(9001 * 24000 / rate)
    inner = slice(len(wave) // 4, len(wave) // 2)
    tone = sounds.wave(len(wave))[inner, 0] / 2  # the mean with a silent channel
    np.testing.assert_allclose(wave[inner].numpy(), tone, atol=0.02)


def test_audio_that_is_not():
    with pytest.raises(ValueError, match="row 3: expected audio that libsndfile reads"):
        audio.read("row 3", b"RIFF", 24000)


def test_samples_are_finite(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(9, np.nan), 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match="a: expected finite samples"):
        audio.read("a", tmp_path / "a.wav", 24000)


# -- a folder -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, samples in (("b/two", 12000), ("one", 9000), ("short", 100)):
        sounds.write(tmp_path / f"{name}.wav", samples)
        (tmp_path / f"{name}.txt").write_text(f"{name[-3:]}\n")
    (tmp_path / "vocab.txt").write_text(" \no\nn\ne\n")
    return tmp_path


def test_folder(folder):
    with pytest.warns(RuntimeWarning, match=r"2 of the first 6 tokens of 'char' .* \['t', 'w'\]"):
        data = AudioFolder(folder, tokenizer="char", vocab=folder / "vocab.txt")
    assert data.names == ["b/two.wav", "one.wav"]
    assert data.left_out == 1
    assert data.frames.tolist() == [len(data[i].mel) for i in range(2)] == [47, 36]
    wave, _ = soundfile.read(folder / "one.wav", dtype="float32")
    assert torch.equal(data[1].mel, mel_of(wave))
    assert data[1].features["text"].tolist() == [1, 2, 3]
    assert data[0].features["text"].tolist() == [0, 0, 1], "unknown ones are 0, as in F5-TTS"


def test_a_suffix_alone_is_no_audio(folder):
    (folder / ".wav").write_bytes(b"")
    sounds.write(folder / "three.WAV", 9000)
    assert AudioFolder(folder).names == ["b/two.wav", "one.wav", "three.WAV"]


def test_folder_without_transcripts(folder):
    (folder / "one.txt").unlink()
    assert not AudioFolder(folder)[1].features
    with pytest.raises(FileNotFoundError, match=r"one.wav: expected one.txt beside it"):
        AudioFolder(folder, tokenizer="byte")


def test_metadata(folder):
    sounds.write(folder / "wavs" / "LJ001.wav", 8000)
    table = 'one|"Eins\n\nLJ001|Mr. X|Mister X\nb/two.wav|zwei\n'
    (folder / "metadata.csv").write_text(table, encoding="utf-8")
    data = AudioFolder(folder, tokenizer="byte")
    assert data.names == ["one.wav", "wavs/LJ001.wav", "b/two.wav"]
    texts = [bytes(data[i].features["text"].tolist()).decode() for i in range(3)]
    assert texts == ['"Eins', "Mister X", "zwei"]
    (folder / "metadata.csv").write_text("one|Eins\nthree|drei\n")
    with pytest.raises(FileNotFoundError, match=r"metadata.csv, row 2: .* for 'three'"):
        AudioFolder(folder)
    (folder / "metadata.csv").write_text("one\n")
    with pytest.raises(ValueError, match=r"metadata.csv, row 1: expected name\|text, got 'one'"):
        AudioFolder(folder)


def test_pinyin_is_f5_tts_own(folder):
    try:
        f5_client.load()
    except ImportError as error:
        pytest.skip(f"needs f5-tts: {error}")
    (folder / "vocab.txt").write_text(" \nni2\nni3\nhao3\no\nk\nt\nw\n", encoding="utf-8")
    (folder / "one.txt").write_text("你好ok", encoding="utf-8")
    data = AudioFolder(folder, tokenizer="pinyin", vocab=folder / "vocab.txt")
    assert [i for i in data[1].features["text"].tolist() if i] == [1, 3, 4, 5]
    with pytest.warns(RuntimeWarning, match="first 7 tokens of 'char'"):
        AudioFolder(folder, tokenizer="char", vocab=folder / "vocab.txt")


def test_known_tokens_are_not_warned_of(folder, recwarn):
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in "onetw"))
    AudioFolder(folder, tokenizer="char", vocab=folder / "vocab.txt")
    assert not recwarn.list


def test_a_vocabulary_of_the_hub(folder, monkeypatch):
    fetched = []

    def download(repo, inner):
        fetched.append((repo, inner))
        return str(folder / "vocab.txt")

    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in "onetw"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    data = AudioFolder(folder, tokenizer="char", vocab="hf://owner/repo/inner/vocab.txt")
    assert data[1].features["text"].tolist() == [0, 1, 2]
    assert fetched == [("owner/repo", "inner/vocab.txt")]


def test_audio_that_broke_off(folder):
    data = AudioFolder(folder)
    sounds.write(folder / "one.wav", 6000)
    with pytest.raises(ValueError, match=r"one.wav: expected 36 mel frames, got 24"):
        data[1]
    (folder / "one.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"one.wav: expected an audio file"):
        data[1]
    (folder / "one.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one.wav: expected audio that libsndfile reads"):
        AudioFolder(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer: expected one of byte, char, pinyin, got 'words'"),
        ({"tokenizer": "char"}, "vocab: expected a path with tokenizer 'char', got None"),
        ({"mel": "linear"}, "mel: expected one of"),
        ({"min_seconds": 9}, r"expected utterances in \[9, 30.0\], got none of 3"),
        ({"max_seconds": 0.1}, "max_seconds: expected a finite number in"),
    ],
)
def test_folder_errors(folder, changed, message):
    with pytest.raises(ValueError, match=message):
        AudioFolder(folder, **changed)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: expected a folder of audio"):
        AudioFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="folder: expected audio"):
        AudioFolder(tmp_path)


# -- F5-TTS ---------------------------------------------------------------------------------------

TEXTS = [["o", "n", "e"], [" ", "ni3", "o"], ["e"], ["n", "o"]]


@pytest.fixture
def prepared(tmp_path):
    """Three rows that count, and one that is too short."""
    seconds = [0.5, 0.4, 0.01, 0.7]
    rows = [
        {
            "audio_path": str(sounds.write(tmp_path / f"{i}.wav", round(24000 * length))),
            "text": TEXTS[i],
            "duration": length,
        }
        for i, length in enumerate(seconds)
    ]
    (tmp_path / "vocab.txt").write_text(" \nni3\no\nn\ne\n")
    (tmp_path / "duration.json").write_text(json.dumps({"duration": seconds}))
    return tmp_path, rows


def stream(path, rows):
    """As `datasets` writes them, two a record batch."""
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def datasets_stream(path, rows):
    writer_module = pytest.importorskip("datasets.arrow_writer")
    with writer_module.ArrowWriter(path=str(path), writer_batch_size=2) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def datasets_folder(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path.with_suffix(""), num_shards=2)


@pytest.mark.parametrize("write", [stream, datasets_stream, datasets_folder])
def test_prepared(prepared, write):
    folder, rows = prepared
    write(folder / "raw.arrow", rows)
    data = F5Prepared(folder)
    assert len(data) == 3
    assert data.left_out == 1
    for i, row in enumerate((0, 1, 3)):
        one = data[i]
        assert one.name == data.names[i] == rows[row]["audio_path"]
        wave, _ = soundfile.read(one.name, dtype="float32")
        assert torch.equal(one.mel, mel_of(wave))
        assert data.frames[i] == len(one.mel)
        vocab = [" ", "ni3", "o", "n", "e"]
        assert one.features["text"].tolist() == [vocab.index(token) for token in TEXTS[row]]
    again = pickle.loads(pickle.dumps(data))
    for i in range(3):
        same(again[i], data[i])


def test_prepared_bytes_and_relative_paths(prepared):
    folder, rows = prepared
    (folder / "duration.json").unlink()
    (folder / "vocab.txt").unlink()
    stream(
        folder / "raw.arrow",
        [row | {"audio_path": f"{i}.wav", "text": "é"} for i, row in enumerate(rows)],
    )
    data = F5Prepared(folder, tokenizer="byte")
    assert list(data.names) == [data.names[i] for i in range(3)] == ["0.wav", "1.wav", "3.wav"]
    assert data[2].features["text"].tolist() == [0xC3, 0xA9]
    with pytest.raises(FileNotFoundError, match=r"vocab.txt: expected a vocabulary"):
        F5Prepared(folder)


def test_relative_paths_are_f5_tts_own_first(prepared, monkeypatch):
    folder, rows = prepared
    (folder / "inner").mkdir()
    stream(folder / "inner/raw.arrow", [rows[0] | {"audio_path": "a.wav"}])
    (folder / "vocab.txt").rename(folder / "inner/vocab.txt")
    monkeypatch.chdir(folder)
    data = F5Prepared("inner")
    for path, hertz in (("inner/a.wav", 220.0), ("a.wav", 440.0)):
        wave, _ = soundfile.read(sounds.write(folder / path, 12000, hertz=hertz), dtype="float32")
        assert torch.equal(data[0].mel, mel_of(wave))


def test_an_index_of_many_rows_is_a_few_bytes_each(tmp_path):
    count = 4000
    name = "raw/EN/EN_B00000/mp3/{:06d}.mp3".format
    durations = [1 + i % 40 for i in range(count)]
    columns = {
        "audio_path": [name(i) for i in range(count)],
        "text": [["a"]] * count,
        "duration": durations,
    }
    table = pa.table(columns)
    path = str(tmp_path / "raw.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    (tmp_path / "vocab.txt").write_text("a\n")
    data = F5Prepared(tmp_path)
    kept = [i for i in range(count) if durations[i] <= 30]
    assert list(data.names) == [name(i) for i in kept]
    assert data.frames.tolist() == [data.mel.frames(24000 * durations[i]) for i in kept]
    train, held = split(data, HeldOut(share=0.1, items=8))
    assert set(train.names).isdisjoint(held.names)
    assert train.frames.tolist() == [
        data.mel.frames(24000 * durations[int(n[-10:-4])]) for n in train.names
    ]
    assert len(pickle.dumps(train)) < 20 * count
    assert len(pickle.dumps(Loader(train, Infilling(), frames=9000).budget)) < 12 * count


@pytest.mark.parametrize("leading", [False, True])
def test_stored_mels(prepared, leading):
    """A mel is `(C, n)`, or `(1, C, n)`."""
    folder, rows = prepared
    for row in rows:
        wave, _ = soundfile.read(row["audio_path"], dtype="float32")
        if len(wave) > 512:
            mel = mel_of(wave).mT.tolist()
            row["mel_spec"] = [mel] if leading else mel
    stream(folder / "mel.arrow", rows)
    data = F5Prepared(folder, audio_type="mel")
    for i, row in enumerate((0, 1, 3)):
        wave, _ = soundfile.read(rows[row]["audio_path"], dtype="float32")
        torch.testing.assert_close(data[i].mel, mel_of(wave), rtol=0, atol=1e-6)
    with pytest.raises(FileNotFoundError, match=r"folder: expected .*state.json or .*raw.arrow"):
        F5Prepared(folder)
    with pytest.raises(ValueError, match=r"mel_spec of .*0.wav .*expected shape \(n, 80\)"):
        F5Prepared(folder, audio_type="mel", mel=mels.Mel("vocos", 1024, 256, 80))[0]


def test_damaged_prepared(prepared):
    folder, rows = prepared
    stream(folder / "raw.arrow", rows)
    data = F5Prepared(folder)
    sounds.write(folder / "3.wav", 9000)
    with pytest.raises(ValueError, match=r"3.wav \(row 3 of .*raw.arrow\): expected 66 mel frames"):
        data[2]
    (folder / "3.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"3.wav: expected an audio file"):
        data[2]
    (folder / "duration.json").write_text('{"duration": [1.0]}')
    with pytest.raises(ValueError, match=r"duration.json: expected one for each of 4 rows"):
        F5Prepared(folder)
    (folder / "duration.json").write_text("[]")
    with pytest.raises(ValueError, match=r"duration.json: expected \{"):
        F5Prepared(folder)
    stream(folder / "raw.arrow", [{"text": "a"}] * 4)
    (folder / "duration.json").unlink()
    with pytest.raises(ValueError, match=r"raw.arrow: expected a column 'duration'"):
        F5Prepared(folder)
    (folder / "raw.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"raw.arrow: expected an Arrow stream"):
        F5Prepared(folder)


def test_from_a_prepared_folder_to_batches(prepared):
    """The same from worker processes, which are spawned in some places."""
    folder, rows = prepared
    stream(folder / "raw.arrow", rows)
    batches = [
        next(Loader(F5Prepared(folder), Infilling(), frames=200, workers=workers)(3))
        for workers in (0, 1)
    ]
    for batch in batches:
        assert batch.x1.shape == (3, 66, 100)
        assert batch.conditions["text"].shape == (3, 3)
        assert torch.equal(batch.x1, batches[0].x1)
        assert torch.equal(batch.loss_mask, batches[0].loss_mask)


# -- CosyVoice ------------------------------------------------------------------------------------


def cosyvoice_rows(first, count):
    """Audio of i half seconds; one token more than there is audio for, or one less."""
    made = []
    for i in range(first, first + count):
        samples = 12000 * (i + 1)
        tokens = samples // 960 + (1 if i % 2 else -1)
        made.append(
            {
                "utt": f"utt_{i}",
                "audio_data": sounds.encoded(samples),
                "text": "some",
                "speech_token": list(range(tokens)),
                "utt_embedding": [float(i)] * 6,
                "spk_embedding": [-1.0] * 6,
            }
        )
    return made


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        rows = cosyvoice_rows(3 * number, 3)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"parquet_{number:09d}.tar")
    paths = [str(tmp_path / f"parquet_{number:09d}.tar") for number in range(2)]
    (tmp_path / "data.list").write_text("\n".join(paths) + "\n")
    return tmp_path


@pytest.mark.parametrize("listed", [False, True])
def test_parquet(shards, listed):
    data = CosyVoiceParquet(shards / "data.list" if listed else shards)
    assert data.names == [f"utt_{i}" for i in range(1, 6)]
    assert data.left_out == 1
    for index in range(5):
        one, i = data[index], index + 1
        tokens = one.features["tokens"]
        full = 12000 * (i + 1) // 960
        assert tokens.tolist() == list(range(full - (i % 2 == 0)))
        assert len(one.mel) == 2 * len(tokens) <= data.frames[index]
        want = mel_of(sounds.wave(12000 * (i + 1))[:, 0], "cosyvoice2")
        assert torch.equal(one.mel, want[: len(one.mel)])
        assert one.features["speaker"].tolist() == [float(i)] * 6
    assert CosyVoiceParquet(shards, embedding="spk")[0].features["speaker"].tolist() == [-1.0] * 6
    same(pickle.loads(pickle.dumps(data))[3], data[3])


def test_regrouped(shards):
    data, copies = CosyVoiceParquet(shards), regroup(shards, shards / "copies", rows=2)
    again = CosyVoiceParquet(copies)
    sizes = pq.ParquetFile(shards / "copies" / "000000000.parquet").metadata
    assert [sizes.row_group(i).num_rows for i in range(sizes.num_row_groups)] == [2, 1]
    assert again.frames.equal(data.frames)
    for i in range(len(data)):
        same(again[i], data[i])


def test_large_row_groups_are_warned_of(tmp_path, recwarn):
    row = cosyvoice_rows(1, 1)[0] | {"audio_data": b""}
    pq.write_table(pa.Table.from_pylist([row] * 65), tmp_path / "x.parquet")
    with pytest.warns(RuntimeWarning, match=r"up to 65 rows .*imf_kernels\.data\.regroup"):
        CosyVoiceParquet(tmp_path / "x.parquet")
    copies = regroup(tmp_path, tmp_path / "copies")
    recwarn.clear()
    assert len(CosyVoiceParquet(copies)) == 65
    assert not recwarn.list


def test_damaged_parquet(shards, tmp_path):
    rows = cosyvoice_rows(2, 2)
    for changed, message in (
        ({"audio_data": b"nothing"}, r"x.parquet, utt_2: expected audio that libsndfile reads"),
        ({"speech_token": list(range(60))}, r"x.parquet, utt_2: expected 120 mel frames, got 75"),
    ):
        pq.write_table(pa.Table.from_pylist([rows[0] | changed, rows[1]]), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=message):
            CosyVoiceParquet(tmp_path / "x.parquet")[0]
    bare = [{"utt": "a", "audio_data": b""}]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: expected columns \['speech_token', 'utt_"):
        CosyVoiceParquet(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.parquet: expected a parquet file"):
        CosyVoiceParquet(tmp_path / "x.parquet")
    (shards / "data.list").write_text("gone.tar\n")
    with pytest.raises(ValueError, match=r"gone.tar: expected a parquet file"):
        CosyVoiceParquet(shards / "data.list")
    with pytest.raises(FileNotFoundError, match="source: expected a list, a folder or a file"):
        CosyVoiceParquet(shards / "none")


def test_from_parquet_to_batches(shards):
    batch = next(Loader(CosyVoiceParquet(shards), Continuation(), frames=400)(0))
    assert batch.x1.shape[2] == 80
    assert torch.equal(2 * batch.conditions["token_lengths"], batch.lengths)
