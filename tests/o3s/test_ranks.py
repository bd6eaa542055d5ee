"""Two processes under gloo find what one finds."""

from torch import multiprocessing

from imf_kernels import o3s
from tests.o3s import ranks


def test_two_processes_search_as_one(tmp_path):
    """To the bit; also after a failure on one of them, of whose evaluations none is paid again."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    want = ranks.found(alone, ranks.quietly)
    multiprocessing.spawn(ranks.work, (together,), nprocs=2)
    for name in ("found.json", "rank0.json", "rank1.json"):
        assert o3s.SearchResult.load(together / name) == want
    sizes = [len(list((folder / "evaluations").iterdir())) for folder in (alone, together)]
    assert sizes == [len(want.evaluations)] * 2
