"""Checkpoints damaged at random: an error that names the file, or the weights as they were."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from imf_kernels.models import (
    checkpoints,
    load_cosyvoice2,
    load_f5,
    load_student,
    save_student,
    state_dicts,
)
from tests.models.test_checkpoints import dit, f5_average, flow, listening, unet

FUZZ = settings(max_examples=30, deadline=None, derandomize=True)
KEY = "0" * 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whole files by name: bytes, loader, expected state dict."""
    folder = tmp_path_factory.mktemp("whole")
    f5, cosyvoice2 = dit(), unet()
    torch.save({"ema_model_state_dict": f5_average(f5), "step": 1}, folder / "f5.pt")
    torch.save(flow(cosyvoice2), folder / "flow.pt")
    save_file(f5_average(f5), folder / "f5.safetensors")
    loaders = {
        "f5.pt": (lambda path: load_f5(path, "f5_v1"), f5),
        "f5.safetensors": (lambda path: load_f5(path, "f5_v1"), f5),
        "flow.pt": (load_cosyvoice2, cosyvoice2),
    }
    return {
        name: ((folder / name).read_bytes(), load, model.state_dict())
        for name, (load, model) in loaders.items()
    }


def loaded(path, content, load):
    """The state dict, or None if the file was refused as it should be."""
    path.write_bytes(content)
    model, said = attempt(load, path)
    assert path.name in said
    return None if model is None else model.state_dict()


def attempt(load, path):
    """The model, or None, and what the error says. Any other error than a ValueError is a bug."""
    try:
        return load(path), path.name
    except ValueError as error:
        return None, str(error)


def equal(got, expected):
    return got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize("name", ["f5.pt", "flow.pt"])
def test_flipped_bits_of_a_pt_are_found_wherever_they_matter(files, tmp_path_factory, name):
    content, load, expected = files[name]
    path = tmp_path_factory.mktemp("flipped") / name
    directory = content.index(b"PK\x01\x02")  # headers are few bytes, weights many
    anywhere = st.integers(0, len(content) - 1)
    places = anywhere | st.integers(0, 3000) | st.integers(directory, len(content) - 1)
    found = []

    @FUZZ
    @given(places, st.integers(0, 7))
    def check(at, bit):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        got = loaded(path, bytes(flipped), load)
        found.append(got is None)
        assert got is None or equal(got, expected)

    check()
    assert sum(found) > len(found) // 4


def test_flipped_bits_of_a_safetensors_header_are_found(files, tmp_path_factory):
    content, load, expected = files["f5.safetensors"]
    path = tmp_path_factory.mktemp("flipped") / "f5.safetensors"
    end = 8 + struct.unpack("<Q", content[:8])[0]

    @FUZZ
    @given(st.integers(0, end - 1), st.integers(0, 7))
    def check(at, bit):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        got = loaded(path, bytes(flipped), load)
        assert got is None or equal(got, expected)

    check()


def test_flipped_bits_of_a_safetensors_body_leave_it_finite(files, tmp_path_factory):
    content, load, expected = files["f5.safetensors"]
    path = tmp_path_factory.mktemp("flipped") / "f5.safetensors"
    start = 8 + struct.unpack("<Q", content[:8])[0]

    @FUZZ
    @given(st.integers(start, len(content) - 1), st.integers(0, 7))
    def check(at, bit):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        got = loaded(path, bytes(flipped), load)
        if got is not None:
            assert sum(int((got[k] != expected[k]).sum()) for k in expected) <= 1
            assert all(bool(value.isfinite().all()) for value in got.values())

    check()


@pytest.mark.parametrize("name", ["f5.pt", "flow.pt", "f5.safetensors"])
def test_truncated_files_are_refused(files, tmp_path_factory, name):
    content, load, _ = files[name]
    path = tmp_path_factory.mktemp("truncated") / name

    @FUZZ
    @given(st.integers(0, len(content) - 1))
    def check(size):
        assert loaded(path, content[:size], load) is None

    check()


def test_lying_headers_are_refused(files, tmp_path_factory):
    content, load, _ = files["f5.safetensors"]
    path = tmp_path_factory.mktemp("lying") / "f5.safetensors"
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted(header.keys() - {"__metadata__"})
    number = st.integers(-1, 2**64) | st.integers(0, 4096)

    @FUZZ
    @given(st.sampled_from(names), st.sampled_from(["shape", "data_offsets", "dtype"]), st.data())
    def check(name, field, data):
        value = data.draw(
            st.sampled_from(["F64", "I64", "BOOL", "C64", "F8_E4M3", "X"])
            if field == "dtype"
            else st.lists(number, min_size=2, max_size=2)
        )
        if header[name][field] == value:
            return
        lie = json.dumps({**header, name: {**header[name], field: value}}).encode()
        made = struct.pack("<Q", len(lie)) + lie + body
        used = name.startswith("ema_model.transformer.")
        assert loaded(path, made, load) is None or not used

    check()


def mutations(name, value):
    """What may have happened to an entry, and what the error then says."""
    yield "missing", {}, name
    yield "renamed", {f"{name}x": value}, name
    yield "wider", {name: torch.ones(*value.shape, 2)}, name
    yield "emptied", {name: value[:0]}, name
    yield "longer", {name: torch.cat([value, value])}, ""
    yield "integers", {name: value.long()}, name
    yield "complex", {name: value.to(torch.complex64)}, name
    yield "infinite", {name: torch.full_like(value, torch.inf)}, name
    yield "a dict", {name: {"weight": value}}, name
    yield "bytes", {name: b"weights"}, name
    yield "nothing", {name: None}, name


@pytest.mark.parametrize("family", ["f5", "cosyvoice2"])
def test_wrong_entries_are_refused_by_name(tmp_path_factory, family):
    path = tmp_path_factory.mktemp("entries") / "model.pt"
    if family == "f5":
        state, prefix = f5_average(dit()), "ema_model.transformer."
    else:
        state, prefix = flow(unet()), "decoder.estimator."

    def load(path):
        return load_f5(path, "f5_v0") if family == "f5" else load_cosyvoice2(path)

    names = [k for k in state if k.startswith(prefix) and not k.endswith("inv_freq")]

    @settings(FUZZ, max_examples=30)
    @given(st.sampled_from(names), st.integers(0, 10))
    def check(name, which):
        what, entries, named = list(mutations(name, state[name]))[which]
        others = {k: v for k, v in state.items() if k != name}
        torch.save(others | entries, path)
        model, said = attempt(load, path)
        assert path.name in said
        if model is None:
            assert named.removeprefix(prefix) in said, what
        else:  # the vocabulary is whatever it is
            assert (what, name) == ("longer", f"{prefix}text_embed.text_embed.weight")

    check()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The two files of a student, whole, and what they load as."""
    path = tmp_path_factory.mktemp("pair") / "student.safetensors"
    save_student(listening(dit()), path, grid="sway", nfe=2, guidance=3.0)
    return path, path.with_name("student.student.safetensors"), load_student(path)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("part", ["header", "body"])
def test_flipped_bits_of_a_student_are_found_in_either_file(pair, which, part):
    path, expected = pair[0], pair[2]
    content = pair[which].read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    first, last = (0, start - 1) if part == "header" else (start, len(content) - 1)

    @FUZZ
    @given(st.integers(first, last), st.integers(0, 7))
    def check(at, bit):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        pair[which].write_bytes(flipped)
        got, said = attempt(load_student, path)
        assert "student" in said
        if got is not None:  # spaces at the header's end, counters of F5's average
            assert equal(got.model.state_dict(), expected.model.state_dict())
            assert torch.equal(got.grid, expected.grid)
            assert got.guidance == expected.guidance
            assert which == 0 or part == "header"

    try:
        check()
    finally:
        pair[which].write_bytes(content)


def test_what_is_said_of_a_student_cannot_be_altered(pair, tmp_path):
    path, side = tmp_path / "student.safetensors", tmp_path / "student.student.safetensors"
    path.write_bytes(pair[0].read_bytes())
    tensors, texts = load_file(pair[1]), checkpoints.metadata(pair[1])
    (key,) = tensors
    said = json.loads(texts[key])
    altered = {"grid": [0.0, 0.5, 1.0], "guidance": 2.0, "torch": "0"}
    lies = [{name: value} for name, value in altered.items()]
    lies.append({"config": {**said["config"], "mixer_diagonal": 0.25}})
    for lie in lies:
        assert json.loads(texts[key]) != said | lie
        save_file(tensors, side, texts | {key: json.dumps(said | lie)})
        with pytest.raises(ValueError, match=r"student.safetensors: .* or one .* damaged"):
            load_student(path)
    save_file({key: tensors[key] * 2}, side, texts)
    with pytest.raises(ValueError, match=r"student.safetensors: .* or one .* damaged"):
        load_student(path)
    save_file(tensors, side, texts)
    assert load_student(path).guidance == 3.0


def test_what_is_said_of_a_student_is_checked(tmp_path, monkeypatch):
    """Also where the hash is right: whoever lies can compute it."""
    monkeypatch.setattr(state_dicts, "fingerprint", lambda said, own: KEY)
    path, side = tmp_path / "student.pt", tmp_path / "student.student.safetensors"
    save_student(listening(dit()), path, grid="sway", nfe=2, guidance=3.0)
    tensors, texts = load_file(side), checkpoints.metadata(side)
    said = json.loads(texts[KEY])
    config = said["config"]
    lies = [
        *({name: None} for name in ("kind", "config")),
        *({"config": {**config, **change}} for change in (
            {"depth": 10**12}, {"depth": "2"}, {"depth": 3}, {"dim": 10**12}, {"baked": True},
            {"fp8": ["qkv"]}, {"mixer": False}, {"mixer_diagonal": "x"}, {"text": None},
            {"text": {"vocab": 10**15}}, {"text": [1]}, {"heads": None}, {"surplus": 1},
            {"rope_heads": "1"}, {"channels": 11}
        )),
        {"config": []}, {"kind": "causal_unet"}, {"kind": "unet"}, {"kind": []},
        {"grid": [0, 2]}, {"grid": {}}, {"grid": "sway"}, {"grid": [0, float("nan"), 1]},
        {"guidance": []}, {"guidance": float("nan")},
    ]  # fmt: skip
    made = [json.dumps(said | lie) for lie in lies]
    made += [json.dumps({k: v for k, v in said.items() if k != name}) for name in
             ("kind", "config", "grid", "guidance")]  # fmt: skip
    made += ["[" * 100_000, "[]", "1", "", "{"]
    for text in made:
        save_file(tensors, side, texts | {KEY: text})
        with pytest.raises(ValueError, match="student"):
            load_student(path)
    mixer = tensors[KEY]
    for held, metadata in (
        ({}, texts), ({}, {"format": "1"}), ({KEY: mixer}, {"format": "1"}), ({"a": mixer}, texts),
        ({KEY: mixer, "a": mixer.clone()}, texts), ({KEY: torch.ones(16, 31)}, texts),
        ({KEY: mixer}, texts | {"format": "2"}), ({KEY: mixer}, {KEY: texts[KEY]}),
    ):  # fmt: skip
        save_file(held, side, metadata)
        with pytest.raises(ValueError, match="student"):
            load_student(path)
    save_file(tensors, side, texts)
    assert load_student(path).guidance == 3.0
