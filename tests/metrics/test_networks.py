"""The x-vector and UTMOS on tiny networks with random weights."""

import pytest
import torch

from imf_kernels.metrics import sim_xvector, utmos

CLIP = 0.1 * torch.sin(torch.arange(8000) / 9)


@pytest.fixture(scope="module")
def xvector(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="needs the [eval] extra")
    folder = tmp_path_factory.mktemp("wavlm-base-plus-sv")
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=[8] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        tdnn_dim=[16] * 5, xvector_output_dim=12, num_buckets=16,
    )  # fmt: skip
    transformers.WavLMForXVector(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


def test_xvector_similarity(xvector):
    similarity = sim_xvector(xvector)
    other = 0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(0))
    assert similarity.embed(CLIP).shape == (12,)
    assert similarity(CLIP, CLIP) == pytest.approx(1, abs=1e-6)
    assert similarity(CLIP, other) == similarity(other, CLIP) < 0.9999
    assert similarity(CLIP, 0.3 * CLIP) == pytest.approx(1, abs=1e-3), "its extractor normalises"


def test_xvector_pools_what_transformers_does(xvector):
    from transformers import WavLMForXVector

    model = WavLMForXVector.from_pretrained(xvector).eval()
    normal = (CLIP - CLIP.mean()) / CLIP.std(correction=0)
    with torch.no_grad():
        expected = model(normal[None]).embeddings[0]
    torch.testing.assert_close(sim_xvector(xvector).embed(CLIP), expected, atol=1e-4, rtol=1e-3)


def test_utmos_of_torchscript(tmp_path):
    class Loudness(torch.nn.Module):
        def forward(self, wave: torch.Tensor, rate: int):
            return 1 + wave.square().mean(dim=1) * rate

    torch.jit.script(Loudness()).save(tmp_path / "utmos.pt")
    score = utmos(tmp_path / "utmos.pt")
    assert score(CLIP) == pytest.approx(1 + 16000 * float(CLIP.square().mean()), rel=1e-5)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="metric 'utmos': expected a TorchScript file"):
        utmos(tmp_path / "text.pt")


HUBCONF = """
import torch
dependencies = ["torch"]

class Scale(torch.nn.Linear):
    def forward(self, wave, rate):
        return super().forward(wave.mean(dim=1, keepdim=True)).squeeze(1) + rate

def utmos22_strong(progress=True, pretrained=True):
    assert not pretrained, "would fetch its weights"
    return Scale(1, 1)
"""


def test_utmos_of_a_repository(tmp_path):
    with pytest.raises(ValueError, match=r"no hubconf\.py"):
        utmos(tmp_path)
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    weights = {"weight": torch.tensor([[3.0]]), "bias": torch.tensor([0.5])}
    torch.save(weights, tmp_path / "utmos22_strong_step7459_v1.pt")
    assert utmos(tmp_path)(CLIP + 2) == pytest.approx(3 * float(CLIP.mean() + 2) + 16000.5)


def test_missing_weights_are_named(tmp_path):
    for name, metric in (("utmos", utmos), ("sim_xvector", sim_xvector)):
        with pytest.raises(FileNotFoundError, match=f"metric '{name}': expected weights at .*none"):
            metric(tmp_path / "none")
