"""What was read of files is read again when they change, and only then."""

import json
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imf_kernels.data import AudioFolder, CosyVoiceParquet, audio, cosyvoice_parquet
from imf_kernels.data import kept as kept_module
from imf_kernels.data.kept import kept
from tests.data_loading import sounds


class Reader:
    """The files' texts; `asked` for which."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def __call__(self, names):
        self.asked.append(names)
        return [(self.folder / name).read_text() for name in names]


@pytest.fixture
def read(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name.upper())
    return Reader(tmp_path)


def test_only_what_is_new_or_changed_is_read(tmp_path, read):
    place = tmp_path / "kept.json"
    assert kept(place, ["b", "a"], read) == ["B", "A"]
    assert kept(place, ["a", "b"], read) == ["A", "B"]
    assert read.asked == [["b", "a"]]

    (tmp_path / "a").write_text("longer")
    stamp = (tmp_path / "b").stat().st_mtime_ns + 1
    assert kept(place, ["a", "b"], read) == ["longer", "B"]
    os.utime(tmp_path / "b", ns=(stamp, stamp))
    (tmp_path / "c").write_text("C")
    assert kept(place, ["a", "b", "c"], read) == ["longer", "B", "C"]
    assert read.asked[1:] == [["a"], ["b", "c"]]

    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError):
        kept(place, ["a", "b"], read)
    assert kept(place, ["b", "c"], read) == ["B", "C"]
    assert read.asked[3:] == [["a"]]


FILES = ["[]", "null", '{"a": 1}', '{"a": []}', '{"a": [[1, 2]]}']


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", '{"format": 0, "files": {"a": 1}}']
    + [f'{{"format": 1, "files": {files}}}' for files in FILES],
)
def test_a_damaged_place_is_made_anew(tmp_path, read, damaged):
    place = tmp_path / "kept.json"
    place.write_text(damaged)
    os.utime(tmp_path / "a", ns=(2, 2))
    for _ in range(2):
        assert kept(place, ["a"], read) == ["A"]
    assert read.asked == [["a"]]
    assert json.loads(place.read_text())["files"]["a"][1] == "A"


def test_what_appears_while_it_is_read_is_read_again(tmp_path, read):
    def late(names):
        (tmp_path / "late").write_text("L")
        return read(names)

    place = tmp_path / "kept.json"
    place.write_text('{"format": 1, "files": {"late": [null, "of old"]}}')
    assert kept(place, ["a", "late"], late) == ["A", "L"]
    assert json.loads(place.read_text())["files"].keys() == {"a"}
    (tmp_path / "late").unlink()
    with pytest.raises(FileNotFoundError):
        kept(place, ["a", "late"], read)
    assert read.asked == [["a", "late"], ["late"]]


def test_files_are_looked_at_together(tmp_path, read, monkeypatch):
    """On a network's disk each look is a wait; and order and repetition are the names'."""
    together, mark = threading.Barrier(3), kept_module._mark

    def waiting(path):
        together.wait(timeout=10)
        return mark(path)

    monkeypatch.setattr(kept_module, "_mark", waiting)
    assert kept(tmp_path / "kept.json", ["b", "a", "b"], read) == ["B", "A", "B"]
    assert read.asked == [["b", "a"]]


def test_a_place_that_cannot_be_written_is_warned_of(tmp_path, read):
    (tmp_path / "kept.json").mkdir()
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"kept.json: Is a directory: 1 files will be read"):
            assert kept(tmp_path / "kept.json", ["a"], read) == ["A"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "kept.json"]


def test_headers_are_read_once(tmp_path, monkeypatch):
    for name in ("one", "b/two"):
        sounds.write(tmp_path / f"{name}.wav", 9000)
    first, read, asked = AudioFolder(tmp_path), audio.header, []
    monkeypatch.setattr(audio, "header", lambda path: asked.append(path.name) or read(path))
    again = AudioFolder(tmp_path)
    assert (again.names, again.frames.tolist()) == (first.names, first.frames.tolist())
    assert asked == []
    sounds.write(tmp_path / "one.wav", 12000)
    again = AudioFolder(tmp_path)
    assert torch.equal(again.frames, torch.tensor([len(again[i].mel) for i in range(2)]))
    assert asked == ["one.wav"]


def test_parquets_are_scanned_once(tmp_path, monkeypatch):
    row = {"utt": "u", "audio_data": b"", "speech_token": [1] * 40, "utt_embedding": [0.0]}
    for name in ("0", "1"):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    first, scan, asked = CosyVoiceParquet(tmp_path), cosyvoice_parquet._tables, []
    monkeypatch.setattr(
        cosyvoice_parquet, "_tables", lambda paths: asked.extend(paths) or scan(paths)
    )
    again = CosyVoiceParquet(tmp_path)
    assert (again.names, again.frames.tolist()) == (first.names, first.frames.tolist())
    assert asked == []
    with pytest.raises(ValueError, match=r"0.parquet: expected columns \['spk_embedding'\]"):
        CosyVoiceParquet(tmp_path, embedding="spk")
    changed = pa.Table.from_pylist([row | {"speech_token": [1] * 50}, row])
    pq.write_table(changed, tmp_path / "1.parquet")
    assert CosyVoiceParquet(tmp_path).frames.tolist() == [80, 100, 80]
    assert asked == [str(tmp_path / "1.parquet")]
