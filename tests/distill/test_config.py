import copy

import pytest
import yaml

from imf_kernels.distill import config as configs
from imf_kernels.distill.build import split, student_of
from imf_kernels.distill.config import HeldOut, ModelSection, StepTokens, StudentSection
from imf_kernels.distill.schema import ConfigError, make
from imf_kernels.objectives import Intervals, IntMeanFlow, LogitNormal, MeanFlow
from tests.distill.own import Noises
from tests.distill.test_main import DOCUMENT
from tests.models.tools import small_model


@pytest.fixture
def document():
    return yaml.safe_load(DOCUMENT)


def put(document, path, value):
    changed = inside = copy.deepcopy(document)
    *parents, last = path.split(".")
    for parent in parents:
        inside = inside.setdefault(parent, {})
    if value is None:
        inside.pop(last, None)
    else:
        inside[last] = value
    return changed


def test_what_a_document_says(document):
    config = configs.parse(document)
    assert config.training.lr == 1e-3
    assert config.data.held_out.share == 0.3
    target, rest, path = config.named_class("objective")
    assert (target, rest, path) == (IntMeanFlow, {"nfe": 2}, "objective")
    assert config.search_options() == {"budget": 4}
    assert config.output.like is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"mean": 0.1, "boundary": 0.5}, LogitNormal(mean=0.1, boundary=0.5)),
        ({"boundary": 0.5}, LogitNormal(boundary=0.5)),
        ({"boundary": 0.5, "full": 0.1}, Intervals(boundary=0.5, full=0.1)),
    ],
)
def test_times_of_mean_flow(document, given, wanted):
    changed = put(document, "objective", {"name": "mean_flow", "intervals": given})
    target, rest, path = configs.parse(changed).named_class("objective")
    made = make(target, rest, path)
    assert isinstance(made, MeanFlow)
    assert made.intervals == wanted


@pytest.fixture
def step_tokens(document):
    document["model"]["student"] = {"step_tokens": {"counts": [1, 2]}}
    return document | {"objective": {"name": "ds_flow", "nfe": 4}}


def test_step_tokens_are_what_the_objective_trains(step_tokens):
    _, rest, _ = configs.parse(step_tokens).named_class("objective")
    assert rest == {"steps": "steps", "counts": (1, 2), "nfe": 4}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "validation.nfe",
            [1, 3],
            r"validation.nfe: expected counts .*, \[1, 2\], got \[1, 3\]",
        ),
        ("previews.nfe", [4], r"previews.nfe: expected counts of .*, got \[4\]"),
        ("o3s.nfe", [3], r"o3s.nfe: expected counts of .*, got \[3\]"),
        ("output.nfe", 3, r"output.nfe: expected counts of .*, got \[3\]"),
        ("objective.counts", [1, 4], r"objective.counts: expected counts of .*, got \[1, 4\]"),
        ("output.path", "student.pt", r"output.path: expected a file .safetensors, .*student.pt"),
        ("objective", {"name": "mean_flow"}, "objective.name: expected ds_flow for .* mean_flow"),
        ("model.student.guidance", True, "model.student.step_tokens: expected neither .*, got"),
        ("model.student.step_tokens.count", 1, "model.student.step_tokens.count: expected one of"),
    ],
)
def test_a_student_with_step_tokens_is_asked_for_its_counts(step_tokens, path, value, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        configs.parse(put(step_tokens, path, value))


def test_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(DOCUMENT)
    config = configs.load(
        path, ["training.lr=1e-4", "validation=null", "model.student.diagonal=0.5", "o3s.nfe=[3]"]
    )
    assert config.training.lr == 1e-4
    assert config.validation is None
    assert config.model.student.diagonal == 0.5
    assert config.o3s.nfe == (3,)
    for override, message in (
        ("training.lr", "--set: expected name=value, got 'training.lr'"),
        ("folder.x=1", "--set folder.x: expected folder to be a mapping, got 'run'"),
        ("training.speed=1", "training.speed: expected one of updates, lr"),
        ("training.lr=[", "expected YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            configs.load(path, [override])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data", None, "data: expected a mapping, got nothing"),
        ("extra", 1, "extra: expected one of folder, model, objective"),
        ("training.lr", "fast", "training.lr: expected a number, got 'fast'"),
        ("training.lr", -1.0, "training.lr: expected a number > 0, got -1.0"),
        ("training.warmup", 7, r"training.warmup: expected an integer in \[0, 6\], got 7"),
        ("objective.name", "magic", "objective.name: expected one of int_mean_flow, split"),
        ("objective.name", None, "objective.name: expected one of int_mean_flow, .* got None"),
        ("objective.nfe", "many", "objective.nfe: expected an integer, got 'many'"),
        ("objective.teacher", 1, "objective.teacher: expected one of nfe, spacing"),
        ("objective.intervals", {"c": 1}, "objective.intervals.c: expected one of a, b"),
        ("data.dataset.kind", "tape", "data.dataset.kind: expected one of audio_folder"),
        ("data.dataset.count", "x", "data.dataset.count: expected an integer, got 'x'"),
        ("data.collate.kind", "tests.distill.own:no", "data.collate.kind: cannot import"),
        ("data.collate.shares", [0, 1], "data.collate.shares: expected one of no key"),
        ("data.held_out", None, "data.held_out: expected utterances for validation, got nothing"),
        ("data.held_out.names", ["a"], "data.held_out.names: expected one of names and share"),
        ("data.held_out.share", 2, r"data.held_out.share: expected a number in \(0, 1\), got 2"),
        ("model.family", "f6", "model.family: expected one of f5_v0, .* or null, got 'f6'"),
        ("model.family", "f5_v1", "model.family: expected one of family and build"),
        ("model.build", None, "model.family: expected one of family and build, got both or none"),
        ("model.guidance", None, "model.guidance: expected a number, got nothing"),
        ("model.teacher_dtype", "half", "model.teacher_dtype: expected one of float32, bfloat16"),
        ("model.teacher_dtype", "float32", "model.teacher_dtype: expected none beside build"),
        ("model.graphs", "all", "model.graphs: expected one of default or a list of a list of"),
        ("model.student.checkpoint", "no.pt", "model.student.checkpoint: expected a file, got"),
        ("model.student.family", "f5_v0", "model.student.family: expected none without"),
        ("model.student.lora", {"rang": 4}, "model.student.lora.rang: expected one of rank"),
        ("validation.nfe", [1, "x"], r"validation.nfe\[1\]: expected an integer, got 'x'"),
        ("previews.vocoder", "vocos", "previews.vocoder: expected one of griffin_lim or"),
        ("o3s.search.budgie", 3, "o3s.search.budgie: expected one of start, "),
        ("o3s.search.budget", 0, "o3s.search.budget: expected an integer >= 1, got 0"),
        ("o3s.search.method", "goldn", "o3s.search.method: expected one of ternary, golden, got"),
        ("o3s.search.min_gap", 0.5, r"o3s.search.min_gap: expected a number in \(0, 1 / nfe\)"),
        ("o3s.nfe", [2, 0], "o3s.nfe: expected an integer >= 1, got 0"),
        ("training.precision", "fp16", "training.precision: expected one of no, bf16, got 'fp16'"),
        ("o3s.metric", "wer", "o3s.metric: expected one of to_teacher or"),
        ("output.path", "student.onnx", "output.path: expected a file .pt or .safetensors"),
        ("output.like", "no.pt", "output.like: expected a file, got none: no.pt"),
    ],
)
def test_errors_name_the_place(document, path, value, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        configs.parse(put(document, path, value))


def test_no_without_quotes(document):
    unquoted = yaml.safe_load("precision: no")["precision"]
    assert configs.parse(put(document, "training.precision", unquoted)).training.precision == "no"


def test_a_family_wants_its_file(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document["model"] = {"family": "f5_v1", "guidance": 3.0}
    with pytest.raises(ConfigError, match=r"^model\.checkpoint: expected a file of the family's"):
        configs.parse(document)
    document["model"]["checkpoint"] = "none.pt"
    with pytest.raises(ConfigError, match=r"^model\.checkpoint: expected a file, got none: none"):
        configs.parse(document)
    document["model"]["checkpoint"] = "hf://SWivid/F5-TTS/F5TTS_Base/model_1200000.safetensors"
    assert configs.parse(document).named_class("collate")[0].__name__ == "collate"


def test_files_that_are_no_documents(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"expected a YAML file, got .*run\.yaml"):
        configs.load(path)
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match="expected YAML"):
        configs.load(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="expected a document of sections"):
        configs.load(path)


def test_held_out_by_name_outlives_another_order(tmp_path):
    class Reversed(Noises):
        def __init__(self):
            super().__init__()
            self.names, self.frames = self.names[::-1], self.frames[::-1]

    kept, held = split(Noises(), HeldOut(share=0.3, items=3))
    again = split(Reversed(), HeldOut(share=0.3, items=3))
    assert sorted(kept.names) == sorted(again[0].names)
    assert list(held.names) == list(again[1].names), "also in their order"
    assert len(held) == 3 < 24 - len(kept), "what is not evaluated is not trained on either"
    assert not set(kept.names) & set(held.names)

    listed = tmp_path / "dev.txt"
    listed.write_text("noise_3\nnoise_1\n")
    for names in (("noise_3", "noise_1"), str(listed)):
        kept, held = split(Noises(), HeldOut(names=names))
        assert sorted(held.names) == ["noise_1", "noise_3"]
        assert len(kept) == 22
        assert held[0].name == held.names[0]
    with pytest.raises(ConfigError, match=r"data.held_out.names: expected names of .*'other'"):
        split(Noises(), HeldOut(names=("other",)))
    with pytest.raises(ConfigError, match="expected some utterances held out and some not"):
        split(Noises(2), HeldOut(share=1e-6))


def test_excluded_by_name(tmp_path, document):
    listed = tmp_path / "damaged.txt"
    listed.write_text("noise_3\nnoise_1\n")
    for exclude in (("noise_3", "noise_1"), str(listed)):
        kept, held = split(Noises(), None, exclude)
        assert held is None
        assert sorted({*Noises().names} - {*kept.names}) == ["noise_1", "noise_3"]
        kept, held = split(Noises(), HeldOut(names=("noise_1", "noise_2")), exclude)
        assert list(held.names) == ["noise_2"]
        assert len(kept) == 21
        assert [kept[i].name for i in range(21)] == list(kept.names)
    with pytest.raises(ConfigError, match=r"data.exclude: expected names of .*'other'"):
        split(Noises(), None, ["other"])
    config = configs.parse(put(document, "data.exclude", ["noise_1"]))
    assert config.data.exclude == ("noise_1",)
    with pytest.raises(ConfigError, match=r"data.exclude: expected a file, got none: none.txt"):
        configs.parse(put(document, "data.exclude", "none.txt"))


def test_only_the_estimator_and_its_mixer_train():
    section = ModelSection(family="f5_v1", checkpoint="x", guidance=2.0)
    student = student_of(section, small_model("f5_v1"))
    free = {name for name, p in student.named_parameters() if p.requires_grad}
    tower = {name for name, _ in student.named_parameters() if name.startswith("text_embed.")}
    assert tower
    assert free == {name for name, _ in student.named_parameters()} - tower


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sizes": {"text": 1}}, "model.student.sizes.text: expected one of dim, depth"),
        ({"sizes": {"dim": 17}}, "model.student.*dim: expected a multiple of 16"),
        ({"step_tokens": StepTokens(counts=(0,))}, "model.student: counts: expected an integer"),
    ],
)
def test_errors_of_students(said, message):
    section = ModelSection(
        family="f5_v1", checkpoint="x", guidance=2.0, student=StudentSection(**said)
    )
    with pytest.raises(ConfigError, match=message):
        student_of(section, small_model("f5_v1"))


def test_cosyvoice2_has_no_step_tokens():
    said = StudentSection(step_tokens=StepTokens())
    with pytest.raises(ValueError, match=r"^student\.step_tokens: expected none for cosyvoice2"):
        ModelSection(family="cosyvoice2", checkpoint="x", guidance=1.7, student=said)
