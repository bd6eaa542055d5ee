"""The search after training: who is asked for which scores."""

import threading

import pytest
import torch
import yaml

from imf_kernels.distill import build, config, finish
from imf_kernels.o3s.metric import Ranks
from tests.distill.test_main import DOCUMENT
from tests.o3s.tools import on_ranks

CALLS = []
HERE = threading.local()


def longest(generated, references):
    CALLS.append((HERE.rank, [len(mel) for mel in generated]))
    assert [mel.shape for mel in generated] == [mel.shape for mel in references]
    return float(max(len(mel) for mel in generated))


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """The value of the uniform grid on so many ranks, each of which is a thread."""

    def of_ranks(cls, group=None):
        return HERE.ranks

    monkeypatch.setattr(Ranks, "of", classmethod(of_ranks))

    def value(ranks, **section):
        CALLS.clear()
        folder = f"{tmp_path}/{ranks}-{len(list(tmp_path.iterdir()))}"
        document = yaml.safe_load(DOCUMENT) | {"folder": folder, "previews": None}
        document["data"]["frames"] = 12  # three batches
        document["o3s"] = {"nfe": [2], "search": {"budget": 1}, **section}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(document))
        run = build.build(config.load(path))
        assert len(run.held_out) == 3

        def work(own):
            HERE.ranks, HERE.rank = own, own.rank
            return finish.search_grids(run, run.student.eval())[2].tolist()

        assert on_ranks(ranks, work) == [[0.0, 0.5, 1.0]] * ranks
        (found,) = run.config.folder.glob("o3s/*.json")
        return yaml.safe_load(found.read_text())["evaluations"][0]["value"]

    return value


def test_held_out_utterances_are_enough_batches_for_many_ranks(tmp_path):
    """Also where a batch of training would hold all of them."""
    document = yaml.safe_load(DOCUMENT) | {"folder": str(tmp_path), "previews": None}
    document["data"]["dataset"]["count"] = 80
    document["data"] |= {"frames": 1000, "held_out": {"share": 0.5, "items": 64}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    run = build.build(config.load(path))
    assert len(run.loader) == 1
    assert len(run.held_out) >= build.HELD_OUT_BATCHES
    rows = [name for batch in run.held_out for name in batch.names]
    assert len({*rows}) == len(rows) > 20
    section, lengths = run.config.data, torch.full((900,), 300)
    assert build._held_out_frames(lengths, section) == 1000, "no more than training's"
    assert build._held_out_frames(lengths + 800, section) == 1000


OWN = "tests.distill.test_finish:longest"


def test_an_utterance_is_scored_where_it_was_solved(searched):
    value = searched(2, metric=OWN, reference="truth")
    assert sorted(rank for rank, _ in CALLS) in ([0, 0, 1], [0, 1, 1])
    (a,), (b,), (c,) = (frames for _, frames in CALLS)
    assert value == (a + b + c) / 3
    assert searched(1, metric=OWN, reference="truth") == value


def test_a_set_is_scored_once(searched):
    value = searched(2, metric=OWN, over="set")
    ((rank, frames),) = CALLS
    assert (rank, len(frames), max(frames)) == (0, 3, value)


def named(generated, references, names):
    assert len(names) == len(generated)
    CALLS.append(names)
    return 0.0


@pytest.mark.parametrize("over", ["utterances", "set"])
def test_a_metric_is_told_the_names_that_it_asks_for(searched, over):
    searched(1, metric="tests.distill.test_finish:named", over=over)
    assert len(CALLS) == (1 if over == "set" else 3)
    assert len({name for names in CALLS for name in names}) == 3


def test_the_distance_to_the_teacher_is_that_of_all_frames(searched):
    value = searched(2)
    assert value == searched(1)
    assert value == pytest.approx(
        searched(1, metric="imf_kernels.metrics:to_teacher", over="set"), rel=1e-5
    )
