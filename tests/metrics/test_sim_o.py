"""SIM-o against s3prl's WavLM under F5-TTS's ECAPA_TDNN, at small sizes."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs the [eval] extra")

from imf_kernels.metrics import sim_o
from imf_kernels.metrics.ecapa import ECAPA
from tests.metrics.tools import checkpoint

SIZES = ("large", "base")


def saved(path: Path, weights):
    torch.save({"model": weights, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_fields_own(size, tmp_path):
    weights, clip, embedding = checkpoint(size)
    weights["loss_calculator.projection.weight"] = torch.zeros(2, 3)
    similarity = sim_o(saved(tmp_path / "wavlm_large_finetune.pth", weights))
    torch.testing.assert_close(similarity.embed(clip), embedding, atol=2e-5, rtol=0)


def test_similarity_is_a_cosine(tmp_path):
    similarity = sim_o(saved(tmp_path / "w.pth", checkpoint("large")[0]))
    torch.manual_seed(0)
    one, other = torch.randn(4000), torch.randn(5000)
    assert similarity(one, one) == pytest.approx(1, abs=1e-6)
    assert similarity(one, other) == similarity(other, one) < 0.9999
    assert similarity(one, 0.5 * one) == pytest.approx(1, abs=1e-4), "loudness is normalised away"
    a, b = similarity.embed(one).double(), similarity.embed(other).double()
    assert similarity(one, other) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metric 'sim_o': expected weights at .*none\.pth"):
        sim_o(tmp_path / "none.pth")
    torch.save({"state": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights in 'model'"):
        sim_o(tmp_path / "other.pth")
    weights, _, _ = checkpoint("large")
    for name in ("encoder.layers.1.self_attn.grep_a", "layer_norm.bias", "encoder.pos_conv.0.bias"):
        short = {k: v for k, v in weights.items() if k != f"feature_extract.model.{name}"}
        with pytest.raises(ValueError, match="missing 1"):
            sim_o(saved(tmp_path / "short.pth", short))
    with pytest.raises(ValueError, match=r"unexpected 1 .*surprise"):
        sim_o(saved(tmp_path / "long.pth", weights | {"surprise": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"linear\.bias: expected shape \(24,\), got \(5,\)"):
        sim_o(saved(tmp_path / "wrong.pth", weights | {"linear.bias": torch.zeros(5)}))
    similarity = sim_o(saved(tmp_path / "w.pth", weights))
    with pytest.raises(ValueError, match="clip: expected at least 800 samples, got 700"):
        similarity.embed(torch.zeros(700))
    with pytest.raises(TypeError, match=r"clip: expected torch\.float32"):
        similarity.embed(torch.zeros(900, dtype=torch.float64))


def test_head_equals_f5_ttss(monkeypatch):
    """Live, where F5-TTS is installed: its ECAPA_TDNN over given states."""
    found = importlib.util.find_spec("f5_tts")
    if found is None:
        pytest.skip("needs f5-tts")
    path = Path(found.submodule_search_locations[0]) / "eval" / "ecapa_tdnn.py"
    spec = importlib.util.spec_from_file_location("ecapa_tdnn", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    states = torch.randn(5, 2, 40, 30)  # (L, B, N, F)

    class Upstream(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.model = SimpleNamespace(encoder=SimpleNamespace(layers=[]))

        def forward(self, clips):
            return {"hidden_states": tuple(states)}

    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: Upstream())
    monkeypatch.setattr(torch.hub, "_validate_not_a_forked_repo", None)  # they set it
    model = theirs.ECAPA_TDNN_SMALL(feat_dim=30, emb_dim=12).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.normal_(std=0.1)
            if name.endswith("running_var"):
                value.abs_().add_(1)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("feature_extract")}
    ours = ECAPA.from_state_dict(weights)(states.transpose(-1, -2))
    torch.testing.assert_close(ours, model(torch.zeros(2, 16000)), atol=1e-5, rtol=1e-5)
