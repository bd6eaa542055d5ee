"""Checkpoints damaged at random: an error that names the file, or the weights as they were."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imf_kernels.models import load_cosyvoice2, load_f5, load_student, save_student
from tests.models.test_checkpoints import dit, f5_average, flow, listening, unet

FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Whole files by name: bytes, loader, expected state dict."""
    from safetensors.torch import save_file

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

    @settings(FUZZ, max_examples=80)
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


def test_what_is_said_of_a_student_is_checked(tmp_path):
    from safetensors.torch import load_file, save_file

    from imf_kernels.models import checkpoints

    path, side = tmp_path / "student.pt", tmp_path / "student.student.safetensors"
    save_student(listening(dit()), path, grid="sway", nfe=2, guidance=3.0)
    tensors, said = load_file(side), checkpoints.metadata(side)
    config = json.loads(said["config"])
    lies = [
        *({name: None} for name in ("format", "kind", "config", "grid", "guidance", "estimator")),
        *({"config": json.dumps({**config, **change})} for change in (
            {"depth": 10**12}, {"depth": "2"}, {"depth": 3}, {"dim": 10**12}, {"baked": True},
            {"fp8": ["qkv"]}, {"mixer": False}, {"mixer_diagonal": "x"}, {"text": None},
            {"text": {"vocab": 10**15}}, {"text": [1]}, {"heads": None}, {"surplus": 1},
            {"rope_heads": "1"}, {"channels": 11}
        )),
        {"config": "[" * 100_000}, {"config": "[]"}, {"kind": "causal_unet"},
        {"grid": "[0, 2]"}, {"grid": "{}"}, {"grid": '"sway"'}, {"grid": "[0, NaN, 1]"},
        {"guidance": "[]"}, {"guidance": "NaN"}, {"estimator": "0" * 64}, {"format": "2"},
    ]  # fmt: skip
    for lie in lies:
        kept = {k: v for k, v in (said | lie).items() if v is not None}
        save_file(tensors, side, kept)
        with pytest.raises(ValueError, match="student"):
            load_student(path)
    for other in ({}, {"a": torch.ones(1)}, {"time_embed_mixer.weight": torch.ones(16, 31)}):
        save_file(other, side, said)
        with pytest.raises(ValueError, match="student"):
            load_student(path)
    save_file(tensors, side, said)
    assert load_student(path).guidance == 3.0
