import shutil

import pytest
import torch

from imf_kernels import export, sampler
from imf_kernels.export.__main__ import main
from imf_kernels.export.report import checked
from imf_kernels.hosts import cosyvoice
from imf_kernels.hosts.cosyvoice.baked import host_times
from imf_kernels.models import Baked, CausalUNet, CausalUNetConfig, StepTokenDiT
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
    onnxruntime = pytest.importorskip("onnxruntime")
    student = small_model("f5_v1", depth=1)
    Baked.of(student, [[0.0, 0.5, 1.0], GRID]).save(tmp_path / "student.safetensors")
    file = tmp_path / "student.onnx"
    command = [str(tmp_path / "student.safetensors"), "--to", "onnx", "--out"]
    main([*command, str(file), "--grid", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"student.safetensors", "student.onnx"}
    assert "inputs noise, prompt, lengths, text" in capsys.readouterr().out

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()][::3] == [
        ["rows", "frames", 12],
        ["rows", "tokens"],
    ]
    noise, given = request_of(student, [70, 33])
    arrays = {name: value.numpy() for name, value in {"noise": noise, **given}.items()}
    (mel,) = session.run(["mel"], arrays)
    want = solved(student, noise, given)
    assert relative_rms(torch.from_numpy(mel), want) <= 1e-5


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
        (["--out", "student.onnx", "--device", "gpu"], "gpu"),
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
