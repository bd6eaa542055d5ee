"""The Python blocks of the README, and of each page of docs, run, in order, as one program."""

import json
import re
from pathlib import Path

import torch

from benchmarks import buckets, distillation
from imf_kernels.distill.__main__ import main as distill
from imf_kernels.hosts.f5_tts import F5TTS
from imf_kernels.models.token_encoder import LookaheadEncoder
from tests.distill import made
from tests.hosts.cosyvoice_host import HostCFM, HostFlow, small
from tests.models.tools import small_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def run(path, tmp_path, monkeypatch, **names):
    """The names that a page's program leaves, given some."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert blocks
    names["__name__"] = path.stem
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
    return names


class Flow(HostFlow):
    """With the signature of the client's own training."""

    def forward(self, batch, device):
        return super().forward(**batch)


def clients(tmp_path):
    """What the README's reader has: live objects of the clients, in small, and data for them."""
    vocab = {chr(ord("a") + i): i for i in range(20)}
    cfm = F5TTS(small_model("f5_v1", channels=100), vocab_char_map=vocab)
    flow = Flow(HostCFM(small("dit"), inference_cfg_rate=0.7))
    encoder = LookaheadEncoder(vocab=10, channels=80, speaker=12, inner=16, lookahead=3)
    decoder = {name: value for name, value in flow.state_dict().items() if "decoder." in name}
    (tmp_path / "pretrained").mkdir()
    torch.save(encoder.state_dict() | decoder, tmp_path / "pretrained" / "flow.pt")
    mels, lens = torch.randn(2, 40, 100), torch.tensor([40, 23])
    batch = {
        "token": torch.randint(10, (2, 30)),
        "mel": torch.randn(2, 30, 80),
        "lengths": torch.tensor([30, 17]),
        "speaker": torch.randn(2, 12),
        "streaming": False,
    }
    texts = {"prompt": mels[:1], "text": "abcab", "texts": ["abc", "cab"]}
    tokens = {"prompt_tokens": torch.arange(10), "tokens": torch.randint(10, (5, 9))}
    voice = {"prompt_mel": torch.randn(20, 80), "speaker": torch.randn(1, 12)}
    given = {"cfm": cfm, "flow": flow, "mels": mels, "lens": lens, "batch": batch}
    return given | texts | tokens | voice


def test_readme(tmp_path, monkeypatch):
    played: list[torch.Tensor] = []
    given = clients(tmp_path) | {"device": torch.device("cpu"), "play": played.append}
    names = run(README, tmp_path, monkeypatch, **given)
    assert [len(mel) for mel in played] == [0, 0, 30, 0, 0, 50, 10]
    assert (tmp_path / "o3s.json").exists()
    assert names["mel"].shape == (8, 120, 80)


def test_bring_your_own_model(tmp_path, monkeypatch):
    run(ROOT / "docs/bring-your-own-model.md", tmp_path, monkeypatch)


def test_distilling(tmp_path, monkeypatch):
    """Its documents are run, each before the program that reads what it writes."""
    page = ROOT / "docs/distilling.md"
    parts = re.split(r"^## CosyVoice", page.read_text(), flags=re.MULTILINE)
    for make, part in zip((made.f5, made.cosyvoice2), parts, strict=True):
        place = tmp_path / make.__name__
        place.mkdir()
        monkeypatch.chdir(place)
        make(place)
        (document,) = re.findall(r"```yaml\n(.*?)```", part, re.DOTALL)
        (place / "run.yaml").write_text(document)
        (place / "part.md").write_text(part)
        assert distill(["run.yaml", "--debug"]) == 0
        names = run(place / "part.md", place, monkeypatch)
    assert len(names["student"].grid) == 2


def test_table_of_streams_is_the_committed_run():
    run = json.loads((ROOT / "benchmarks/results/cpu/streaming.json").read_text())
    for row in run["rows"]:
        frames, ms = row["frames_evaluated"], row["ms"]
        seconds = f"{ms['incremental'] / 1e3:.2f} / {ms['prefix'] / 1e3:.2f} s, {row['ratio']:.1f}x"
        assert seconds in README.read_text()
        if row["seconds"] == 30:
            said = (
                f"{frames['incremental']} / {frames['prefix']} | {row['stream_bytes'] / 1e6:.0f} |"
            )
            assert said in README.read_text()


def test_tables_of_distillation_are_the_committed_run():
    run = json.loads((ROOT / "benchmarks/results/cpu/distillation.json").read_text())
    for table in distillation.tables(run).split("\n\n"):
        assert table in README.read_text()


def test_table_of_padding_is_what_the_script_says():
    assert buckets.table() in README.read_text()
    for guided, claim in ((False, "72 MiB"), (True, "122 MiB guided")):
        assert f"{buckets.static_bytes(8, 3200, guided) / 2**20:.0f} MiB" in claim
        assert claim in README.read_text()
