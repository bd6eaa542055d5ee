"""The clients' checkpoint files: read into our models, written as students, refused when wrong."""

import itertools
import os
import pickle
import re
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from imf_kernels import grids, sampler
from imf_kernels.files import replacing
from imf_kernels.models import (
    Baked,
    CausalUNet,
    CausalUNetConfig,
    DiT,
    DiTConfig,
    TextConfig,
    checkpoints,
    load_cosyvoice2,
    load_cosyvoice3,
    load_f5,
    load_student,
    save_student,
)
from tests.models.naive_unet import NaiveUNet
from tests.models.tools import recipe, small_model

UNET = {"dim": 16, "mid_blocks": 1, "depth": 1, "heads": 1, "channels": 12, "time_dim": 32}


def dit(variant="f5_v1", **switches):
    return small_model(variant, dim=16, depth=2, heads=1, head_dim=64, **switches)


def unet(**switches):
    model = CausalUNet(CausalUNetConfig(**(UNET | switches)))
    model.load_state_dict(recipe({k: list(v.shape) for k, v in model.state_dict().items()}, 0))
    return model.eval()


def listening(teacher):
    student = teacher.student()
    with torch.no_grad():
        student.time_embed_mixer.weight += 0.1 * torch.randn_like(student.time_embed_mixer.weight)
    return student


def under(prefix, model):
    return {prefix + name: value for name, value in model.state_dict().items()}


def f5_average(model):
    return under("ema_model.transformer.", model) | {
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
        "ema_model.mel_spec.mel_stft.spectrogram.window": torch.ones(4),
    }


def f5_training(average, trained):
    """What F5-TTS's `Trainer` writes."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    return {
        "model_state_dict": under("transformer.", trained),
        "ema_model_state_dict": f5_average(average) | under("online_model.transformer.", trained),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": {"last_epoch": 3},
        "update": 3,
    }


def flow(model, prefix=""):
    """A CosyVoice `flow.pt`: the estimator among its other parts, and what training adds."""
    others = {
        "input_embedding.weight": torch.randn(5, 4),
        "encoder.embed.out.0.bias": torch.ones(3),
    }
    tensors = under("decoder.estimator.", model) | others
    return {prefix + name: value for name, value in tensors.items()}


def same(got, expected):
    assert got.config == expected.config
    theirs = expected.state_dict()
    assert got.state_dict().keys() == theirs.keys()
    for name, value in got.state_dict().items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


# -- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["f5_v0", "f5_v1"])
@pytest.mark.parametrize("student", [False, True])
def test_f5_files(tmp_path, variant, student):
    model, other = dit(variant), dit(variant, seed=1)
    if student:
        model, other = listening(model), listening(other)
    trainer, pruned = tmp_path / "model_last.pt", tmp_path / "model_1200000.pt"
    torch.save(f5_training(model, other), trainer)
    torch.save({"ema_model_state_dict": f5_average(model), "step": 7}, pruned)
    save_file(f5_average(model), tmp_path / "model.safetensors")
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    for path in (trainer, pruned, tmp_path / "model.safetensors", tmp_path / "bare.safetensors"):
        same(load_f5(path, variant), model)
    same(load_f5(str(trainer), variant, ema=False), other)


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize(
    ("make", "load"),
    [(unet, load_cosyvoice2), (lambda: dit("cosyvoice3"), load_cosyvoice3)],
    ids=["cosyvoice2", "cosyvoice3"],
)
def test_cosyvoice_files(tmp_path, make, load, student):
    model = listening(make()) if student else make()
    torch.save(flow(model) | {"epoch": 3, "step": 4000}, tmp_path / "flow.pt")
    save_file(flow(model, "flow."), tmp_path / "s3gen.safetensors")
    torch.save(OrderedDict(model.state_dict()), tmp_path / "estimator.pt")
    for name in ("flow.pt", "s3gen.safetensors", "estimator.pt"):
        same(load(tmp_path / name), model)


def test_reading_keeps_names_and_dtypes_and_drops_plain_values(tmp_path):
    half = {"a": torch.ones(2).bfloat16(), "b.c": nn.Parameter(torch.ones(1)), "n": torch.tensor(3)}
    torch.save(half | {"epoch": 3, "note": "x", "nothing": None}, tmp_path / "flow.pt")
    read = checkpoints.read(tmp_path / "flow.pt")
    assert list(read) == ["a", "b.c", "n"]
    for name, value in read.items():
        assert type(value) is torch.Tensor
        assert value.dtype == half[name].dtype
        assert torch.equal(value, half[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_load_as_float32(tmp_path, dtype):
    model = dit()
    cast = {name: value.to(dtype) for name, value in under("ema_model.transformer.", model).items()}
    save_file(cast, tmp_path / "model.safetensors")
    loaded = load_f5(tmp_path / "model.safetensors", "f5_v1")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.rotary_embed.inv_freq, model.rotary_embed.inv_freq)
    assert torch.equal(loaded.proj_out.weight, model.proj_out.weight.to(dtype).float())


def test_models_do_not_lie_in_their_file(tmp_path):
    model, path = dit(), tmp_path / "model.pt"
    torch.save({"ema_model_state_dict": f5_average(model)}, path)
    loaded = load_f5(path, "f5_v1")
    path.write_bytes(bytes(path.stat().st_size))
    same(loaded, model)


PUBLIC = {
    "F5TTS_v1_Base": (DiTConfig.for_variant("f5_v1", dim=1024, depth=22, heads=16,
                                            text=TextConfig(vocab=2545)), 337_096_804),
    "F5TTS_Small": (DiTConfig.for_variant("f5_v0", dim=768, depth=18, heads=12,
                                          text=TextConfig(vocab=2545)), 159_228_772),
    "CosyVoice2": (CausalUNetConfig(), 71.3e6),
    "CosyVoice3": (DiTConfig.for_variant("cosyvoice3", dim=1024, depth=22, heads=16), 331.1e6),
}  # fmt: skip


@pytest.mark.parametrize("mixer", [False, True])
@pytest.mark.parametrize("name", PUBLIC)
def test_sizes_of_the_public_models_are_read_from_their_shapes(name, mixer):
    config, parameters = PUBLIC[name]
    config = type(config)(**{**vars(config), "mixer": mixer})
    with torch.device("meta"):
        model = (CausalUNet if name == "CosyVoice2" else DiT)(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    variant = {"F5TTS_v1_Base": "f5_v1", "F5TTS_Small": "f5_v0", "CosyVoice3": "cosyvoice3"}
    given = [variant[name]] if name in variant else []
    assert type(config).from_shapes(shapes, *given) == config
    count = sum(p.numel() for k, p in model.named_parameters() if "mixer" not in k)
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) < 5e4
    if mixer:
        dim = config.time_dim if name == "CosyVoice2" else config.dim
        assert shapes["time_embed_mixer.weight"] == (dim, 2 * dim)


def test_chatterbox_turbo_means_what_we_mean(tmp_path):
    """Its sampler, written out: two Euler steps over a linear grid from noise at 0, one embedding
    network for t and r, mixed as `W [e_t, e_r]`, in the estimator that is CosyVoice2's."""
    torch.manual_seed(0)
    student = listening(unet())
    path = tmp_path / "s3gen_meanflow.safetensors"
    save_file(flow(student, "flow."), path)
    weights = {
        name.removeprefix("flow.decoder.estimator."): value
        for name, value in load_file(path).items()
    }

    class Theirs(NaiveUNet):
        def time(self, t, width):
            both = [super(Theirs, self).time(time, width) for time in (t, self.r)]
            return F.linear(torch.cat(both, dim=1), self.weights["time_embed_mixer.weight"])

    theirs, ones = Theirs(weights, heads=1), torch.ones(1, 1, 9)
    (noise, mu, cond), spks = torch.randn(3, 1, 12, 9), torch.randn(1, 12)
    x = noise
    for t, r in itertools.pairwise(torch.linspace(0, 1, 3)):
        theirs.r = r[None]
        x = x + (r - t) * theirs(x, ones, t[None], mu, spks, cond)

    ours = load_cosyvoice2(path).eval()
    prepared = ours.prepare(cond.mT, mu=mu.mT, spks=spks)
    mel = sampler.sample(ours, noise.mT, prepared, "uniform", nfe=2)
    torch.testing.assert_close(mel, x.mT, rtol=0, atol=1e-5)
    assert (mel - noise.mT).abs().max() > 0.1


# -- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`huggingface_hub`, with a folder in the place of the network."""

    def hf_hub_download(repo, name):
        path = tmp_path / repo / name
        if not path.exists():
            raise OSError("404")
        return str(path)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    (tmp_path / "owner/repo/folder").mkdir(parents=True)
    return tmp_path / "owner/repo/folder"


def test_files_of_the_hub(hub):
    model = dit()
    save_file(f5_average(model), hub / "model.safetensors")
    same(load_f5("hf://owner/repo/folder/model.safetensors", "f5_v1"), model)
    save_student(listening(model), hub / "student.pt", guidance=2.0)
    assert load_student("hf://owner/repo/folder/student.pt").guidance == 2.0
    with pytest.raises(FileNotFoundError, match=r"hf://owner/repo/other\.pt: 404"):
        load_f5("hf://owner/repo/other.pt", "f5_v1")
    with pytest.raises(ValueError, match="expected 'hf://owner/repo/folder/file', got 'hf://model"):
        load_f5("hf://model.pt", "f5_v1")


def test_without_the_hub_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf://a/b/c.pt .*'\.\[hub\]'"):
        load_cosyvoice2("hf://a/b/c.pt")


# -- students -------------------------------------------------------------------------------------

MODELS = {"f5": dit, "cosyvoice2": unet, "cosyvoice3": lambda: dit("cosyvoice3")}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_a_student_comes_back(tmp_path, name, suffix):
    student = listening(MODELS[name]())
    path = tmp_path / f"student{suffix}"
    save_student(student, path, grid=[0.0, 0.3, 1.0], guidance=3.0)
    loaded = load_student(path)
    same(loaded.model, student)
    assert not loaded.model.training
    assert torch.equal(loaded.grid, torch.tensor([0.0, 0.3, 1.0]))
    assert loaded.guidance == 3.0
    names = {path.name, "student.student.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names

    save_student(student, path, grid="sway", nfe=3)
    assert torch.equal(load_student(path).grid, grids.sway(3))
    save_student(student, path)
    assert load_student(path)[1:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_students_keep_their_dtype(tmp_path, dtype):
    student = listening(dit("f5_v0")).to(dtype)
    save_student(student, tmp_path / "student.pt")
    same(load_student(tmp_path / "student.pt").model, student)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_file_is_the_teachers_in_all_but_the_estimators_values(tmp_path, name, suffix):
    teacher = MODELS[name]()
    student = listening(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.01)
    like, path = tmp_path / "teacher.pt", tmp_path / f"student{suffix}"
    held = {"ema_model_state_dict": f5_average(teacher)} if name == "f5" else flow(teacher)
    torch.save(held | {"epoch": 1}, like)
    save_student(student, path, like=like)
    same(load_student(path).model, student)

    written, before = checkpoints.read(path), checkpoints.read(like)
    assert list(written) == list(before) if suffix == ".pt" else written.keys() == before.keys()
    root = "ema_model.transformer." if name == "f5" else "decoder.estimator."
    for key, value in before.items():
        own = key.startswith(root)
        assert torch.equal(
            written[key], student.state_dict()[key.removeprefix(root)] if own else value
        )
    if suffix == ".pt":  # as the clients read it
        raw = torch.load(path, weights_only=True)
        assert list(raw) == ["ema_model_state_dict"] if name == "f5" else raw.keys() == held.keys()

    save_student(student, like, like=like)  # over the teacher itself
    same(load_student(like).model, student)


def test_a_file_with_a_mixer_gets_the_students(tmp_path):
    student, path = listening(unet()), tmp_path / "s3gen_meanflow.safetensors"
    save_file(flow(listening(unet()), "flow."), path)
    save_student(student, path, like=path)
    same(load_cosyvoice2(path), student)
    same(load_student(path).model, student)


def test_a_student_is_not_read_as_a_teacher(tmp_path):
    path = tmp_path / "flow.pt"
    save_student(listening(unet()), path)
    with pytest.raises(ValueError, match=r"path: .* got a student, .*load_student.*flow.pt"):
        load_cosyvoice2(path)


def test_a_pair_that_does_not_belong_together_is_refused(tmp_path):
    teacher = dit()
    student, other = listening(teacher), listening(dit(seed=1))
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    save_student(student, one)
    save_student(other, two)
    os.replace(tmp_path / "two.student.safetensors", tmp_path / "one.student.safetensors")
    with pytest.raises(ValueError, match=r"one.pt: expected the weights that .* others"):
        load_student(one)
    missing = r"two\.pt: not a student: its two\.student\.safetensors is missing; the two belong"
    with pytest.raises(FileNotFoundError, match=missing):
        load_student(two)


def test_a_crash_at_any_point_leaves_one_of_the_two_students(tmp_path, monkeypatch):
    path, side = tmp_path / "student.pt", tmp_path / "student.student.safetensors"
    students = [listening(dit()), listening(unet()), listening(dit(seed=1))]
    left = None  # how many points are passed before the crash

    def point():
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                raise OSError("no space left on device")

    @contextmanager
    def crashing(file):
        point()
        with replacing(file) as temporary:
            yield temporary
            point()
        point()

    monkeypatch.setattr(checkpoints, "replacing", crashing)
    was = 0
    save_student(students[was], path, guidance=0.0)
    for points in range(9):  # three files, each before, while and after it is written
        left, new = points, (was + 1) % 3
        with pytest.raises(OSError, match="no space"):
            save_student(students[new], path, guidance=float(new))
        loaded = load_student(path)
        assert loaded.guidance in (was, new)
        was = int(loaded.guidance)
        same(loaded.model, students[was])
    assert was  # some of the crashes came after the new student

    left = None
    save_student(students[0], path)
    same(load_student(path).model, students[0])
    assert len(checkpoints.read(side)) == 1
    assert set(tmp_path.iterdir()) == {path, side}


def test_an_f5_student_has_the_entries_of_the_published_files(tmp_path):
    student = listening(dit())
    save_student(student, tmp_path / "student.pt")
    written = torch.load(tmp_path / "student.pt", weights_only=True)["ema_model_state_dict"]
    published = f5_average(dit())
    assert published.keys() - written.keys() == {"ema_model.mel_spec.mel_stft.spectrogram.window"}
    for name, value in written.items():
        assert (value.dtype, value.shape) == (published[name].dtype, published[name].shape)
    assert written["initted"]
    save_student(listening(unet()), tmp_path / "student.pt")
    assert "step" not in torch.load(tmp_path / "student.pt", weights_only=True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_strict_loads_of_a_teacher_file_pass_in_a_student(tmp_path, name, nested):
    teacher = MODELS[name]()
    student = teacher.student(0.5)
    nn.init.normal_(student.time_embed_mixer.weight)
    torch.save(under("a.b." if nested else "", teacher), tmp_path / "teacher.pt")
    module = nn.ModuleDict({"a": nn.ModuleDict({"b": student})}) if nested else student
    module.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True), strict=True)
    dim = student.time_embed_mixer.out_features
    assert torch.equal(student.time_embed_mixer.weight, 0.5 * torch.eye(dim, 2 * dim))
    assert torch.equal(student.last.weight, teacher.last.weight)


def wrong_students():
    student = dit().student()
    mixed = dit().student()
    mixed.proj_out.bfloat16()
    adapted = dit().student()
    adapted.proj_out = nn.Sequential(adapted.proj_out)
    broad = small_model("f5_v1", dim=32, depth=2).student()
    yield dit(), {}, "student: expected a model with a mixer"
    yield student.baked(), {}, "student: .* baked"
    yield student.fp8(["ff"]), {}, "student: .* fp8"
    yield Baked.of(student, ["uniform"], 2), {}, "student: expected a DiT .* Baked"
    yield mixed, {}, "student: expected weights of one dtype"
    yield adapted, {}, "missing 2 .*proj_out.*unexpected 2"
    yield broad, {}, "teacher.pt: .*expected shape"
    yield student, {"guidance": float("nan")}, "guidance: expected a finite number or None, got nan"
    yield student, {"nfe": 2}, "nfe: expected None without a grid, got 2"
    yield student, {"grid": [0.0, 2.0]}, "grid: expected times from 0 to 1"
    yield student, {"path": "student.bin"}, "path: expected a file .pt or .safetensors"
    yield (
        student,
        {"path": "missing/student.pt"},
        "path: .* directory that exists, got no .*missing",
    )
    yield student, {"like": "nothing.pt"}, "nothing.pt"


@pytest.mark.parametrize(("student", "options", "message"), list(wrong_students()))
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(
    tmp_path, student, options, message
):
    torch.save(flow(dit()), tmp_path / "teacher.pt")
    options = {"path": "student.pt", "like": "teacher.pt"} | options
    options["like"] = tmp_path / options["like"]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        save_student(student, tmp_path / options.pop("path"), **options)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.pt"]


# -- what is refused ------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


class Storage:
    """Pickles as a storage of so many float32."""

    def __init__(self, numel):
        self.numel = numel


class View:
    """Pickles as a tensor over `Storage`, of any shape that one likes."""

    def __init__(self, numel, size, stride, offset=0):
        self.arguments = Storage(numel), offset, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", torch.FloatStorage, "0", "cpu", value.numel
        return None


def forged(path, tensors, compression=zipfile.ZIP_STORED):
    """An archive with right checksums whose pickle lies; its only storage holds 16 float32."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        with archive.open("x/data.pkl", "w") as file:
            Pickler(file, 2).dump(tensors)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", bytes(64))
        archive.writestr("x/version", "3\n")


def wrong_files():
    """name, how it comes to be, what the error says besides the file's name."""
    state = f5_average(dit())
    key = "ema_model.transformer.proj_out.weight"

    def saved(held):
        return lambda path: torch.save(held, path)

    def changed(value):
        return saved({"ema_model_state_dict": state | {key: value}})

    yield "empty.pt", lambda path: path.touch(), "BadZipFile"
    yield "empty.safetensors", lambda path: path.touch(), "whole safetensors"
    yield "folder.pt", lambda path: path.mkdir(), "got a directory"
    yield "pipe.pt", os.mkfifo, "got a directory or device"
    yield "text.pt", lambda path: path.write_text("{}"), "BadZipFile"
    yield "text.safetensors", lambda path: path.write_text("{}"), "whole safetensors"
    yield "model.bin", lambda path: path.touch(), ".pt or .safetensors"
    yield "code.pt", saved({"a": Code()}), "UnpicklingError"
    yield "module.pt", saved(nn.Linear(1, 1)), "UnpicklingError"
    yield "list.pt", saved([torch.ones(1)]), "a dict of tensors, got list"
    yield "nested.pt", saved({"a": {"b": torch.ones(1)}}), "a: expected a tensor, got dict"
    yield "numbered.pt", saved({1: torch.ones(1)}), "names of tensors, got 1"
    yield "sparse.pt", saved({"a": torch.eye(3).to_sparse()}), "a: expected a dense tensor"
    yield "meta.pt", saved({"a": torch.empty(3, device="meta")}), "a: expected a dense tensor"
    yield (
        "old.pt",
        lambda path: torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False),
        "BadZipFile",
    )
    yield (
        "average.pt",
        saved({"ema_model_state_dict": [1]}),
        "ema_model_state_dict: expected a dict",
    )
    yield "trained.pt", saved({"model_state_dict": state}), "ema=True"
    yield "none.pt", saved({}), "expected the key 'time_embed.time_mlp.2.weight'"
    yield "two.pt", saved(state | under("a.", dit())), "got 2 .* such keys"
    yield "surplus.pt", saved(state | {"ema_model.lora": torch.ones(1)}), r"1 \(ema_model.lora\)"
    yield "wide.pt", changed(torch.ones(12, 17)), r"proj_out.weight.*\(12, 16\).*\(12, 17\)"
    yield "flat.pt", changed(torch.ones(12)), r"proj_out.weight: expected 2 dim.*\(12,\)"
    yield "nothing.pt", changed(torch.ones(0, 16)), r"proj_out.weight: .*none of them 0"
    yield "integers.pt", changed(torch.ones(12, 16).int()), "proj_out.weight: .*torch.int32"
    yield "complex.pt", changed(torch.ones(12, 16) * 1j), "proj_out.weight: .*torch.complex64"
    yield "fp8.pt", changed(torch.ones(12, 16).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"
    yield (
        "nan.pt",
        changed(torch.full((12, 16), torch.nan)),
        "proj_out.weight: .*192 that are not",
    )
    yield "beyond.pt", lambda path: forged(path, {"a": View(16, (8, 8), (8, 1))}), "resize storage"
    yield "huge.pt", lambda path: forged(path, {"a": View(1 << 40, (1 << 36,), (1,))}), "resize"
    yield "expanded.pt", lambda path: forged(path, {"a": View(16, (1 << 40,), (0,))}), "own size"
    views = {f"a{i}": View(16, (16,), (1,)) for i in range(1000)}
    yield "shared.pt", lambda path: forged(path, views), "own size"
    yield "before.pt", lambda path: forged(path, {"a": View(16, (4,), (1,), -4)}), "storage offset"
    yield "negative.pt", lambda path: forged(path, {"a": View(16, (4,), (-1,))}), "RuntimeError"
    yield "packed.pt", lambda path: forged(path, {}, zipfile.ZIP_DEFLATED), "compressed"


@pytest.mark.parametrize(
    ("name", "make", "message"), [pytest.param(*case, id=case[0]) for case in wrong_files()]
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_wrong_files_are_refused_by_name(tmp_path, monkeypatch, name, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_f5(tmp_path / name, "f5_v1")
    assert name in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("load", [lambda path: load_f5(path, "f5_v0"), load_cosyvoice2,
                                  load_cosyvoice3, load_student, checkpoints.read])  # fmt: skip
def test_no_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.pt"))):
        load(tmp_path / "none.pt")


@pytest.mark.parametrize("variant", [None, "v1", "cosyvoice3"])
def test_f5_asks_for_the_variant_before_it_reads(variant):
    with pytest.raises(ValueError, match="variant: expected 'f5_v0' or 'f5_v1'"):
        load_f5("nowhere.pt", variant)


def test_an_average_is_not_what_was_trained(tmp_path):
    save_file(f5_average(dit()), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: ema: expected True"):
        load_f5(tmp_path / "model.safetensors", "f5_v1", ema=False)


def test_other_families_are_refused(tmp_path):
    for name, model in (("dit.pt", dit("cosyvoice3")), ("unet.pt", unet())):
        torch.save(flow(model), tmp_path / name)
    torch.save(f5_average(dit()), tmp_path / "f5.pt")
    for load, name, message in (
        (load_cosyvoice2, "dit.pt", "of CosyVoice2, got what looks like CosyVoice3's"),
        (load_cosyvoice3, "unet.pt", "of CosyVoice3, got what looks like CosyVoice2's"),
        (load_cosyvoice3, "f5.pt", "of CosyVoice3, got what looks like F5-TTS's"),
        (load_cosyvoice2, "f5.pt", "of CosyVoice2, got what looks like F5-TTS's"),
        (lambda path: load_f5(path, "f5_v1"), "dit.pt", "of F5-TTS, got what looks like Cosy"),
        (lambda path: load_f5(path, "f5_v1"), "unet.pt", "of F5-TTS, got what looks like Cosy"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load(tmp_path / name)
