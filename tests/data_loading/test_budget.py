"""Which utterances make up a batch, of which rank, when."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imf_kernels.data import Budget

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def epoch_of(budget, epoch):
    """All batches of an epoch, of all ranks."""
    positions = range(epoch * len(budget), (epoch + 1) * len(budget))
    return [budget.batch(rank, at) for at in positions for rank in range(budget.ranks)]


@st.composite
def budgets(draw):
    lengths = draw(LENGTHS)
    options = {
        "max_rows": draw(st.none() | st.integers(1, 8)),
        "packed": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }
    frames = draw(st.integers(max(lengths), 200))
    batches = len(Budget(lengths, frames, **options))
    return lengths, frames, options | {"ranks": draw(st.integers(1, batches))}


@given(budgets(), st.integers(0, 5))
def test_an_epoch(made, epoch):
    lengths, frames, options = made
    budget, all_batches = (
        Budget(lengths, frames, **options),
        len(
            Budget(
                lengths,
                frames,
                **{name: value for name, value in options.items() if name != "ranks"},
            )
        ),
    )
    batches = epoch_of(budget, epoch)
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        size = sum(sizes) if options["packed"] else len(sizes) * max(sizes)
        assert 0 < size <= frames
        assert len(batch) <= (options["max_rows"] or len(batch))
    assert max(Counter(i for batch in batches for i in batch).values()) == 1
    assert 0 <= all_batches - len(batches) < budget.ranks, "left out, so that ranks are even"
    if options["ranks"] == 1:
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


@given(budgets(), st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_a_position_tells_the_batch(made, positions):
    """In whatever order it is asked."""
    lengths, frames, options = made
    budget = Budget(lengths, frames, **options)
    for position in positions:
        fresh = Budget(lengths, frames, **options)
        for rank in range(budget.ranks):
            assert budget.batch(rank, position) == fresh.batch(rank, position)


@given(LENGTHS, st.booleans())
def test_batches_are_as_large_as_they_may_be(lengths, packed):
    """Any batch and the shortest utterance of the next, which is no shorter, would not fit."""
    frames = 2 * max(lengths)
    batches = [
        [lengths[i] for i in batch] for batch in epoch_of(Budget(lengths, frames, packed=packed), 0)
    ]
    batches.sort(key=lambda sizes: (min(sizes), max(sizes), -len(sizes)))
    for batch, following in pairwise(batches):
        assert max(batch) <= min(following)
        sizes = [*batch, min(following)]
        assert (sum(sizes) if packed else len(sizes) * max(sizes)) > frames


def test_every_epoch_is_another():
    budget = Budget([10] * 40 + [20] * 40, 100, seed=3)
    first, second = epoch_of(budget, 0), epoch_of(budget, 1)
    assert len({tuple(batch) for batch in first} & {tuple(batch) for batch in second}) <= 1
    assert [len(batch) for batch in first] != [len(batch) for batch in second]
    assert epoch_of(Budget([10] * 40 + [20] * 40, 100, seed=4), 0) != first


def test_what_ranks_leave_out_is_another_in_every_epoch():
    budget = Budget([1] * 7, 1, ranks=4)
    left = [set(range(7)) - {i for batch in epoch_of(budget, e) for i in batch} for e in range(20)]
    assert {len(some) for some in left} == {3}
    assert set.union(*left) == set(range(7))


def test_long_utterances():
    lengths, names = [10, 60, 20, 70], ["a", "b", "c", "d"]
    message = "frames: expected no fewer .* got 50 for 2 longer ones, the longest d of 70"
    with pytest.raises(ValueError, match=message):
        Budget(lengths, 50, names=names)
    with pytest.raises(ValueError, match="the longest utterance 3 of 70"):
        Budget(lengths, 50)
    budget = Budget(lengths, 50, drop_long=True)
    assert budget.left_out == 2
    assert sorted(budget.batch(0, 0)) == [0, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 0}, "frames: expected an integer >= 1, got 0"),
        ({"max_rows": 0}, "max_rows: expected an integer >= 1, got 0"),
        ({"ranks": 3}, "ranks: expected no more than the 2 batches that 2 utterances make, got 3"),
        ({"lengths": []}, "ranks: expected no more than the 0 batches"),
        ({"lengths": [3, 0]}, "lengths: expected a frame or more each, got none for utterance 1"),
    ],
)
def test_errors(changed, message):
    given = {"lengths": [3, 4], "frames": 5, "ranks": 1} | changed
    with pytest.raises(ValueError, match=message):
        Budget(given.pop("lengths"), given.pop("frames"), **given)
