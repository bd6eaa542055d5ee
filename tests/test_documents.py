"""The Python blocks of each page run, in order, as one program; tables are of committed runs."""

import importlib
import json
import re

import pytest
import torch

from benchmarks import buckets, deployment, distillation, f5_sampler
from docs.figures.__main__ import FIGURES
from imf_kernels.distill.__main__ import main as distill
from imf_kernels.hosts.f5_tts import F5TTS
from imf_kernels.metrics import Similarity
from imf_kernels.models.token_encoder import LookaheadEncoder
from tests import pages
from tests.distill import made
from tests.hosts.cosyvoice_host import HostCFM, HostFlow, small
from tests.models.tools import small_model

DOCS = pages.ROOT / "docs"
RUN_APART = {pages.README, DOCS / "cosyvoice.md", DOCS / "distilling.md"}


def run(blocks, monkeypatch, place, **names):
    """The names that a page's program leaves, given some."""
    assert blocks
    monkeypatch.chdir(place)
    names["__name__"] = "page"
    for block in blocks:
        exec(compile(block, block.splitlines()[0], "exec"), names)
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
    """Every recipe by itself, as its reader copies it."""
    given = clients(tmp_path) | {"device": torch.device("cpu")}
    *hosts, own = pages.blocks(pages.README, "python")
    for recipe in hosts:
        run([recipe], monkeypatch, tmp_path, **given)
    names = run([own], monkeypatch, tmp_path)
    assert (tmp_path / "o3s.json").exists()
    assert names["mel"].shape == (8, 120, 80)


def test_cosyvoice(tmp_path, monkeypatch):
    played: list[torch.Tensor] = []
    given = clients(tmp_path) | {"device": torch.device("cpu"), "play": played.append}
    run(pages.blocks(DOCS / "cosyvoice.md", "python"), monkeypatch, tmp_path, **given)
    assert [len(mel) for mel in played] == [0, 0, 30, 0, 0, 50, 10]


def test_distilling(tmp_path, monkeypatch):
    """Its documents are run, each before the program that reads what it writes; then its metric."""
    page = DOCS / "distilling.md"
    documents, programs = (pages.blocks(page, language) for language in ("yaml", "python"))
    *programs, metric = programs
    for make, document, program in zip(
        (made.f5, made.cosyvoice2), documents, programs, strict=True
    ):
        place = tmp_path / make.__name__
        place.mkdir()
        monkeypatch.chdir(place)
        make(place)
        (place / "run.yaml").write_text(document)
        assert distill(["run.yaml", "--debug"]) == 0
        names = run([program], monkeypatch, place)
    assert len(names["student"].grid) == 2

    names = run([metric], monkeypatch, tmp_path)
    similarity = Similarity(lambda clip: clip[:, :8000], "cpu")  # the voice is the wave
    names["sim_o"] = lambda weights: similarity
    mel = torch.randn(60, 100)
    assert names["alike"]([mel], [mel]) == pytest.approx(1.0)
    assert names["alike"]([mel], [torch.randn(60, 100)]) < 0.9


@pytest.mark.parametrize(
    "page",
    [page for page in pages.PAGES if pages.blocks(page, "python") and page not in RUN_APART],
    ids=pages.name,
)
def test_page(page, tmp_path, monkeypatch):
    given = clients(tmp_path) if page.stem == "f5-tts" else {}
    run(pages.blocks(page, "python"), monkeypatch, tmp_path, **given)


# -- tables and figures ---------------------------------------------------------------------------


def measured(name):
    return json.loads((pages.ROOT / f"benchmarks/results/cpu/{name}.json").read_text())


def test_table_of_speed_is_the_committed_run():
    run, page = measured("f5_sampler"), pages.README.read_text()
    prompt = f5_sampler.PROMPT_SHARE * run["seconds"]
    generated = run["seconds"] - prompt
    caption = " ".join(page.split("## Speed")[1].split("|")[0].split())
    assert f"F5TTS_v1_{run['size'].title()}: {generated:.1f} s generated after a" in caption
    assert (
        f"prompt of {prompt:.1f} s, float32, {['no', 'one', 'two'][run['threads']]} cores"
        in caption
    )
    titles = {
        "equal, guided": "3, guided",
        "equal, unguided": "3, without guidance",
        "default, 32 guided to 3": "its default of 32, guided, against 3 without",
    }
    for row in run["rows"]:
        cells = [titles[row["comparison"]]]
        for name in ("client", "ours"):
            seconds = row["ms"][name]["median"] / 1e3
            cells += [f"{seconds:.2f}", f"{seconds / generated:.3f}"]
        assert f"| {' | '.join(cells)} | {row['ratio']:.3g}x |" in page


def test_table_of_streams_is_the_committed_run():
    page = (DOCS / "benchmarks.md").read_text()
    for row in measured("streaming")["rows"]:
        frames, ms = row["frames_evaluated"], row["ms"]
        seconds = f"{ms['incremental'] / 1e3:.2f} / {ms['prefix'] / 1e3:.2f} s, {row['ratio']:.1f}x"
        assert seconds in page
        if row["seconds"] == 30:
            said = (
                f"{frames['incremental']} / {frames['prefix']} | {row['stream_bytes'] / 1e6:.0f} |"
            )
            assert said in page


def test_tables_of_distillation_are_the_committed_run():
    page = (DOCS / "benchmarks.md").read_text()
    for table in distillation.tables(measured("distillation")).split("\n\n"):
        assert table in page


def test_table_of_deployment_is_the_committed_run():
    assert deployment.table(measured("deployment")) in (DOCS / "deployment.md").read_text()


def test_table_of_padding_is_what_the_script_says():
    page = (DOCS / "serving.md").read_text()
    assert buckets.table() in page
    for guided, claim in ((False, "72 MiB"), (True, "122 MiB guided")):
        assert f"{buckets.static_bytes(8, 3200, guided) / 2**20:.0f} MiB" in claim
        assert claim in page


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn(name, tmp_path):
    drawn = importlib.import_module(f"docs.figures.{name}")
    drawn.draw().savefig(tmp_path / drawn.FILE, metadata=drawn.METADATA)
    committed = (DOCS / "figures" / drawn.FILE).read_bytes()
    assert drawn.METADATA["Source"].encode() in committed, "draw it again: make figures"
    assert len(committed) < 200_000


def test_memory_of_adapters_is_added_up():
    """In the recipe's header, and on the page that speaks of it."""
    recipe = (pages.ROOT / "recipes/f5_lora_24gb.yaml").read_text()
    *rest, activations = (float(x) for x in re.findall(r"^#.* (\d*\.\d)$", recipe, re.MULTILINE))
    recomputed, kept = sum(rest) + activations, sum(rest) + 8.6
    assert f"# are {recomputed:.1f} of 24," in recipe
    assert (
        f"8.6 (docs/benchmarks.md: 48.1 GiB of 38,400 frames), and the whole {kept:.1f}." in recipe
    )
    page = " ".join((DOCS / "distilling.md").read_text().split())
    assert f"{recomputed:.1f} GB, and {kept:.1f} without it" in page
