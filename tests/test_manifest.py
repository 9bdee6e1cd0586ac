"""Positions, permutations and the ledger."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.manifest import Ledger, Manifest, keyed, mix, permute, shuffle

KEYS = st.integers(0, 2**64 - 1).map(np.uint64)
BUCKETS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 25)), min_size=1, max_size=4)
MANIFESTS = st.builds(
    lambda buckets, own, epochs, size, seed: Manifest(
        tuple(rows for rows, _ in buckets), epochs, size, seed, tuple(size for _, size in buckets) if own else ()
    ),
    BUCKETS, st.booleans(), st.integers(1, 3), st.integers(1, 25), st.integers(0, 2**31 - 1),
)  # fmt: skip
INDEX_SETS = st.sets(st.integers(0, 60))


# ---- permutations


@given(st.integers(0, 3000), KEYS)
def test_permute_is_a_bijection(size: int, key: np.uint64) -> None:
    image = permute(np.arange(size), size, key)
    assert image.dtype == np.int64
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(0, 2000), KEYS, st.integers(1, 40), st.integers(1, 9))
def test_shuffle_is_a_bijection(size: int, key: np.uint64, group: int, window: int) -> None:
    image = shuffle(np.arange(size), size, key, group, window)
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(2, 1500), KEYS, st.integers(1, 40), st.integers(1, 9), st.data())
def test_a_visit_does_not_depend_on_those_asked_for_with_it(
    size: int, key: np.uint64, group: int, window: int, data: st.DataObject
) -> None:
    some = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.int64)
    assert (
        shuffle(some, size, key, group, window).tolist()
        == shuffle(np.arange(size), size, key, group, window)[some].tolist()
    )
    assert permute(some, size, key).tolist() == permute(np.arange(size), size, key)[some].tolist()


def test_neighbours_in_a_visit_lie_in_few_places_of_the_file() -> None:
    size, group, window = 100_003, 32, 8
    rows = shuffle(np.arange(size), size, keyed(1), group, window)
    places = [len(np.unique(rows[first : first + 64] // group)) for first in range(0, size - 64, 64)]
    assert max(places) <= 2 * window
    assert not np.array_equal(rows, np.sort(rows))


def test_large_permutations_look_random() -> None:
    size = 100_000
    image = permute(np.arange(size), size, keyed(3))
    fixed = int((image == np.arange(size)).sum())
    assert fixed < 10  # Poisson(1): more than 9 once in 9 million
    correlation = np.corrcoef(np.arange(size), image)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(size)


def test_large_domains_are_computed_in_place() -> None:
    size = 2**40 + 7
    some = np.array([0, 1, 2**39, size - 1])
    image = permute(some, size, keyed(5))
    assert len(set(image.tolist())) == 4
    assert ((image >= 0) & (image < size)).all()


def test_keys_depend_on_every_part_and_its_place() -> None:
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, -1), (2**64 - 1, 0), (1, 0, 0)]
    assert len({int(keyed(*some)) for some in parts}) == len(parts)
    assert keyed(0, -1) == keyed(0, 2**64 - 1)


def test_mix_is_the_finalizer_of_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * n) % 2**64 for n in (1, 2, 3)], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # the reference C code from seed 1234567
    assert mix(states).tolist() == expected


# ---- micro-batches


@given(MANIFESTS)
def test_every_epoch_visits_every_row_exactly_once(manifest: Manifest) -> None:
    for epoch in range(manifest.epochs):
        visits: list[tuple[int, int]] = []
        for index in range(epoch * manifest.per_epoch, (epoch + 1) * manifest.per_epoch):
            slot = manifest.slot(index)
            assert (slot.index, slot.epoch) == (index, epoch)
            assert 1 <= len(slot.rows) == len(slot.positions) <= manifest.size_of(slot.bucket)
            visits += [(slot.bucket, row) for row in slot.rows.tolist()]
        every = [(bucket, row) for bucket, rows in enumerate(manifest.bucket_rows) for row in range(rows)]
        assert sorted(visits) == every


@given(MANIFESTS)
def test_positions_are_distinct_and_cover_the_run(manifest: Manifest) -> None:
    positions = [p for n in range(manifest.num_micro_batches) for p in manifest.slot(n).positions.tolist()]
    assert sorted(positions) == list(range(manifest.num_positions))
    assert manifest.num_positions == manifest.epochs * manifest.num_rows


@given(MANIFESTS, st.integers(0, 50))
def test_slots_outside_hold_nothing(manifest: Manifest, beyond: int) -> None:
    for index in (manifest.num_micro_batches + beyond, -1 - beyond):
        slot = manifest.slot(index)
        assert len(slot.rows) == len(slot.positions) == 0


def test_at_most_one_micro_batch_of_a_bucket_is_short() -> None:
    manifest = Manifest((10, 3, 8), 1, 4, 0)
    sizes: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(manifest.per_epoch):
        slot = manifest.slot(index)
        sizes[slot.bucket].append(len(slot.rows))
    assert {bucket: sorted(found) for bucket, found in sizes.items()} == {0: [2, 4, 4], 1: [3], 2: [4, 4]}


@given(MANIFESTS)
def test_every_row_counts_as_much_as_any_other(manifest: Manifest) -> None:
    """A micro-batch's mean loss is weighed by its rows over these: 1 on average, or where it is full."""
    if manifest.bucket_sizes:
        assert manifest.mean_rows * manifest.per_epoch == pytest.approx(manifest.num_rows)
    else:
        assert manifest.mean_rows == manifest.micro_batch_size


def test_a_bucket_has_a_size_of_its_own() -> None:
    manifest = Manifest((10, 3, 8), 1, 4, 0, (5, 2, 8))
    sizes = sorted((slot.bucket, len(slot.rows)) for slot in map(manifest.slot, range(manifest.per_epoch)))
    assert sizes == [(0, 5), (0, 5), (1, 1), (1, 2), (2, 8)]


def orders(seed: int, epochs: int) -> list[list[tuple[int, ...]]]:
    """The micro-batches of each epoch, in their order."""
    manifest = Manifest((200, 100), epochs, 8, seed)
    flat = [(slot.bucket, *slot.rows.tolist()) for slot in map(manifest.slot, range(manifest.num_micro_batches))]
    return [flat[first : first + manifest.per_epoch] for first in range(0, len(flat), manifest.per_epoch)]


def test_seeds_and_epochs_give_different_orders() -> None:
    found = [*orders(0, 3), *orders(1, 3)]
    for first, second in itertools.combinations(found, 2):
        assert [batch[0] for batch in first] != [batch[0] for batch in second]  # which bucket comes when
        assert {tuple(sorted(batch)) for batch in first}.isdisjoint({tuple(sorted(batch)) for batch in second})
    assert orders(0, 3) == orders(0, 3)
    assert orders(0, 2) == orders(0, 3)[:2]


# ---- the ledger


@given(INDEX_SETS, INDEX_SETS)
def test_a_ledger_is_a_set(first: set[int], second: set[int]) -> None:
    second -= first
    ledger = Ledger().adding(first).adding(sorted(second, reverse=True))
    assert len(ledger) == len(first | second)
    assert {index for index in range(70) if index in ledger} == first | second
    assert ledger == Ledger().adding(first | second)
    ends = [end for piece in ledger.ranges for end in piece]
    assert ends == sorted(set(ends))  # ascending, disjoint, and joined where they touch


@given(st.integers(0, 9), st.integers(1, 7))
def test_whole_steps_are_what_is_done(steps: int, per_step: int) -> None:
    assert Ledger().adding(range(steps * per_step)).done(per_step) == steps


@pytest.mark.parametrize("consumed", [[0, 1, 2], [1, 2], [0, 1, 4, 5]])
def test_a_step_is_never_done_in_part(consumed: list[int]) -> None:
    with pytest.raises(AssertionError, match="whole steps of 2"):
        Ledger().adding(consumed).done(2)


@given(INDEX_SETS.filter(bool), st.data())
def test_nothing_is_consumed_twice(consumed: set[int], data: st.DataObject) -> None:
    again = data.draw(st.sampled_from(sorted(consumed)))
    with pytest.raises(ValueError, match=f"micro-batch {again} consumed twice"):
        Ledger().adding(consumed).adding([again])
    with pytest.raises(ValueError, match="consumed twice"):
        Ledger().adding([again, again])
