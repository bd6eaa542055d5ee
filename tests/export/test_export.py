import shutil
from types import MappingProxyType

import pytest
import torch

from imf_kernels import backend, export, sampler
from imf_kernels.export import to_onnx
from imf_kernels.export.__main__ import main
from imf_kernels.export.report import checked
from imf_kernels.hosts import cosyvoice
from imf_kernels.hosts.cosyvoice.baked import host_times
from imf_kernels.models import Baked, CausalUNet, CausalUNetConfig, StepTokenDiT, save_student
from imf_kernels.ops import attention
from imf_kernels.rows import Rows
from tests.models.tools import conditions, relative_rms, small_model

GRID = [0.0, 0.4, 1.0]
SIZES = {"dim": 16, "mid_blocks": 1, "depth": 1, "heads": 1, "head_dim": 16, "time_dim": 16}


def unet():
    torch.manual_seed(0)
    return CausalUNet(CausalUNetConfig(**SIZES, channels=12)).eval()


def request_of(model, lengths):
    return torch.randn(len(lengths), max(lengths), 12), conditions(model, lengths)


def solved(student, noise, given, grid=GRID, **prepare):
    with torch.no_grad():
        return sampler.sample(student, noise, student.prepare(**given, **prepare), grid)


def test_a_program_solves_ragged_rows_as_the_student_does():
    student = small_model("cosyvoice3", depth=1).student(guidance=True).eval()
    torch.nn.init.normal_(student.guidance_embed.mlp[-1].weight)
    solve = export.program(student, GRID).module()
    for lengths in ([45], [70, 11, 33]):
        noise, given = request_of(student, lengths)
        given["guidance"] = torch.linspace(1, 3, len(lengths))
        got = solve(noise, *(given[name] for name in student.inputs))
        assert relative_rms(got, solved(student, noise, given)) <= 1e-5


def test_the_command_writes_onnx(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    student = small_model("f5_v1", depth=1)
    Baked.of(student, [[0.0, 0.5, 1.0], GRID]).save(tmp_path / "student.safetensors")
    file = tmp_path / "student.onnx"
    command = [str(tmp_path / "student.safetensors"), "--to", "onnx", "--out"]
    main([*command, str(file), "--grid", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "student.onnx"}
    assert "inputs noise, prompt, lengths, text" in capsys.readouterr().out

    session = session_of(file)
    assert [i.shape for i in session.get_inputs()][::3] == [
        ["rows", "frames", 12],
        ["rows", "tokens"],
    ]
    noise, given = request_of(student, [70, 33])
    want = solved(student, noise, given)
    assert relative_rms(run(session, noise=noise, **given), want) <= 1e-5


def session_of(file):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(session, **inputs):
    (result,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(result)


def test_the_command_writes_onnx_of_a_u_net_that_streams(tmp_path):
    """Of one row, and of the two files that `save_student` writes."""
    pytest.importorskip("onnxscript")
    student, grid = unet().student().eval(), [0.0, 1.0]
    save_student(student, tmp_path / "flow.pt", grid=grid)
    file = tmp_path / "flow.onnx"
    command = [str(tmp_path / "flow.pt"), "--to", "onnx", "--out", str(file)]
    main([*command, "--rows", "1", "--streaming", "--bound", "1e-5"])

    session = session_of(file)
    dims = {i.name: i.shape for i in session.get_inputs()}
    mel = [1, "frames", 12]
    assert dims == {"noise": mel, "prompt": mel, "lengths": [1], "mu": mel, "spks": [1, 12]}
    noise, given = request_of(student, [120])
    want = solved(student, noise, given, grid, streaming=True)
    assert relative_rms(run(session, noise=noise, **given), want) <= 1e-5


def test_onnx_of_an_estimator_has_the_names_of_its_host(tmp_path):
    pytest.importorskip("onnxscript")
    estimator = cosyvoice.BakedEstimator(unet().student(), "cosine", 4)
    subject = cosyvoice.ExportableEstimator(estimator)
    session = session_of(export.onnx(subject, tmp_path / "estimator.onnx").path)
    mel = [2, 12, "frames"]
    assert {i.name: i.shape for i in session.get_inputs()} == {
        "x": mel, "mask": [2, 1, "frames"], "mu": mel, "t": [2], "spks": [2, 12], "cond": mel,
    }  # fmt: skip
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("estimator_out", mel)]
    inputs = subject.example([77, 50])
    assert relative_rms(run(session, **inputs), estimator(**inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "nowhere/student.onnx"], "in a directory that exists, got no nowhere"),
        (["--out", "student.pt2"], r"ending in \.onnx, got student\.pt2"),
        (["--out", "folder.onnx"], r"ending in \.onnx, got folder\.onnx"),
        (
            ["--out", "student.onnx", "--grid", "1"],
            r"grid: expected one of 0: \[0\.0, 1\.0\]; got 1",
        ),
        (["--out", "student.onnx", "--device", "gpu"], "^device: expected .* got 'gpu'"),
        (["--out", "student.onnx", "--frames", "29"], "frames: expected an integer .* 30"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, options, said):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    Baked.of(small_model("f5_v1", depth=1), [[0.0, 1.0]]).save("student.safetensors")
    with pytest.raises(SystemExit, match=said):
        main(["student.safetensors", "--to", "onnx", *options])
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "folder.onnx"}


def test_the_command_wants_a_grid(tmp_path):
    save_student(unet().student(), tmp_path / "flow.pt")
    with pytest.raises(SystemExit, match="saved with a grid"):
        main([str(tmp_path / "flow.pt"), "--to", "onnx", "--out", str(tmp_path / "flow.onnx")])


class Attention(export.Exportable):
    """Of rows of up to 30 frames, the second empty; one of its heads."""

    def forward(self, *inputs):
        qkv, chunk = inputs
        rows = Rows.padded(torch.tensor([30, 0, 7]), 30)
        return attention(qkv, rows, chunk)


@pytest.mark.parametrize("streaming", [False, True])
def test_attention_stores_no_scores_and_an_empty_row_is_no_nan(streaming):
    inputs = torch.randn(90, 3, 2, 8), torch.tensor([4, 4, 4]) if streaming else None
    with torch.no_grad(), backend("reference"):
        want = Attention()(*inputs)
        traced = torch.export.export(Attention(), inputs)
    names = [node.name for node in traced.graph.nodes]
    assert any("scaled_dot_product_attention" in name for name in names)
    assert not any("softmax" in name for name in names)
    in_products = to_onnx.as_onnx_takes_it(traced)
    assert not any("scaled_dot" in node.name for node in in_products.graph.nodes)
    for program in (traced, in_products):
        got = program.module()(*inputs)
        torch.testing.assert_close(got, want)
        assert not got[30:60].any()


@pytest.mark.timeout(900)  # a C++ compiler's minute, several on a busy machine
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_compiles_a_streaming_solve(tmp_path):
    student = unet().student()
    report = export.aot_inductor(student, tmp_path / "solve.pt2", [0.0, 1.0], streaming=True)
    assert report.relative_rms <= 1e-5
    assert report.nbytes == report.path.stat().st_size
    assert list(tmp_path.iterdir()) == [report.path]

    solve = torch._inductor.aoti_load_package(str(report.path))
    assert tuple(solve.get_metadata()["inputs"].split()) == report.inputs
    noise, given = request_of(student, [120, 33])
    got = solve(noise, *(given[name] for name in student.inputs))
    assert relative_rms(got, solved(student, noise, given, [0.0, 1.0], streaming=True)) <= 1e-5


def test_an_estimator_keeps_the_names_and_shapes_of_its_host():
    estimator = cosyvoice.BakedEstimator(unet().student(), "cosine", 4)
    subject = cosyvoice.ExportableEstimator(estimator)
    velocity = export.program(subject).module()
    inputs = subject.example([45, 30])
    assert inputs["mask"].sum() == 2 * 30
    assert list(inputs) == ["x", "mask", "mu", "t", "spks", "cond"]
    assert [tuple(x.shape) for x in inputs.values()] == [
        (2, 12, 45), (2, 1, 45), (2, 12, 45), (2,), (2, 12), (2, 12, 45),
    ]  # fmt: skip
    assert relative_rms(velocity(*inputs.values()), estimator(**inputs)) <= 1e-5
    for step, time in enumerate(host_times(estimator.grid, torch.float16)):
        inputs["t"] = time.float().expand(2)
        want = estimator(**inputs | {"t": estimator.grid[step].expand(2)})
        assert relative_rms(velocity(*inputs.values()), want) <= 1e-5
    inputs["t"] = inputs["t"] + 0.01
    assert velocity(*inputs.values()).isnan().all()


def test_an_error_beyond_the_bound_is_refused(tmp_path):
    solve = export.Solve(unet(), GRID)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"relative RMS of 0\.0001"):
        checked(tmp_path, solve, lambda inputs: 1.01 * solve(*inputs), 8, 64, None)
    with pytest.raises(RuntimeError, match="got nan"):
        checked(tmp_path, solve, lambda inputs: inputs[0] * torch.nan, 8, 64, 1.0)


class Inexact(export.Exportable):
    """Whose file answers otherwise than it does itself."""

    output, dims, dtype = "y", MappingProxyType({"x": ("rows", "frames")}), torch.float32

    def example(self, lengths):
        return {"x": torch.rand(len(lengths), max(lengths)) + 1}

    def forward(self, *inputs):
        return inputs[0] * (1.01 if torch.compiler.is_exporting() else 1.0)


def test_beyond_the_bound_no_file_is_left(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(RuntimeError, match=r"relative RMS of 0\.0001 of eager's, got 0\.0"):
        export.onnx(Inexact(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    assert export.onnx(Inexact(), tmp_path / "x.onnx", bound=0.02).path.exists()


def test_onnx_takes_float32_of_less_than_2_gib(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    file = tmp_path / "solve.onnx"
    with pytest.raises(ValueError, match=r"float32 weights.* got torch\.bfloat16; a \.pt2"):
        export.onnx(unet().bfloat16(), file, GRID)
    monkeypatch.setattr(to_onnx, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"less than 2 GiB of weights, got \d+ bytes; a \.pt2"):
        export.onnx(unet(), file, GRID)


def test_what_cannot_be_exported_says_why(tmp_path):
    student = small_model("f5_v1", dim=32, head_dim=16).student()
    tokens = StepTokenDiT.of(small_model("f5_v1"), counts=(1, 2), tokens=1)
    for model, error, reason in [
        (student.fp8(), ValueError, "kernels of this package"),
        (tokens, ValueError, "step tokens"),
        (torch.nn.Linear(1, 1), TypeError, "expected a Baked, a DiT or a CausalUNet"),
    ]:
        with pytest.raises(error, match=reason):
            export.program(model, GRID)
    with pytest.raises(ValueError, match="not baked"):
        export.program(student)
    with pytest.raises(ValueError, match="baked grids"):
        export.program(Baked.of(student, [GRID]), "uniform", 2)
    with pytest.raises(ValueError, match=r"\.pt2"):
        export.aot_inductor(student, tmp_path / "solve.so", GRID)
