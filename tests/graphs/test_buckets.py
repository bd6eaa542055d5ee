import pytest
from hypothesis import given
from hypothesis import strategies as st

from imf_kernels.graphs import DEFAULT, PACKED, Bucket, PackedBucket, choose, waste
from imf_kernels.graphs.buckets import table

BUCKETS = st.lists(st.builds(Bucket, st.integers(1, 8), st.integers(1, 64)), min_size=1, max_size=9)
PACKS = st.lists(
    st.builds(PackedBucket, st.integers(1, 8), st.integers(1, 99), st.integers(1, 64)), max_size=9
)
LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=8)


@given(buckets=BUCKETS | PACKS, lengths=LENGTHS)
def test_the_choice_holds_the_rows_and_nothing_smaller_does(buckets, lengths):
    chosen = choose(buckets, lengths)
    fitting = [b for b in buckets if b.holds(lengths, sum(lengths))]
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert chosen in fitting
        assert chosen.size == min(bucket.size for bucket in fitting)
        assert chosen.size >= sum(lengths)


@given(buckets=BUCKETS, lengths=LENGTHS, data=st.data())
def test_the_choice_depends_on_no_order(buckets, lengths, data):
    shuffled = data.draw(st.permutations(buckets))
    assert choose(shuffled, data.draw(st.permutations(lengths))) == choose(buckets, lengths)


@given(buckets=BUCKETS, lengths=LENGTHS)
def test_what_holds_a_batch_holds_part_of_it(buckets, lengths):
    whole, part = choose(buckets, lengths), choose(buckets, lengths[1:] or lengths)
    if whole is not None:
        assert part is not None
        assert part.size <= whole.size


@given(buckets=PACKS, lengths=LENGTHS, data=st.data())
def test_fewer_valid_frames_fit_smaller_packed_buckets(buckets, lengths, data):
    total = data.draw(st.integers(len(lengths), sum(lengths)))
    whole, chosen = choose(buckets, lengths), choose(buckets, lengths, total)
    if whole is not None:
        assert chosen is not None
        assert total <= chosen.size <= whole.size


@given(buckets=BUCKETS | PACKS.filter(bool))
def test_a_table_has_each_bucket_once_and_the_largest_first(buckets):
    made = table([*buckets, *buckets])
    assert set(made) == set(buckets)
    assert len(made) == len(set(buckets))
    assert [b.size for b in made] == sorted((b.size for b in made), reverse=True)


@pytest.mark.parametrize(
    "buckets", [[], [(0, 4)], [(2, -1)], [(1, 2.5)], [(1, 2, 0)], [(1, 8), (1, 8, 8)], [(1,)]]
)
def test_table_errors(buckets):
    with pytest.raises(ValueError, match="buckets"):
        table(buckets)


def test_waste_counts_padding_and_misses():
    buckets = [Bucket(1, 10), Bucket(2, 20)]
    padding, missed = waste(buckets, [[5], [20, 20], [21]])
    assert padding == pytest.approx(1 - 45 / 50)
    assert missed == pytest.approx(1 / 3)


def test_default_tables():
    assert len(DEFAULT) == len(set(DEFAULT)) == 42
    for frames in range(1, 3201):
        bucket = choose(DEFAULT, [frames])
        assert bucket is not None
        assert frames < 64 or bucket.size <= 1.5 * frames
        assert choose(PACKED, [frames]) is not None
