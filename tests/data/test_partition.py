"""Partitioners: disjoint, covering, deterministic, and exactly what they promise."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.data import PARTITIONERS, DataError, Partition, Source
from polyrank.data.partition import from_owners, top_up

by_column, by_quantity, dirichlet, iid, pathological, shards = (
    PARTITIONERS[name] for name in ("by_column", "by_quantity", "dirichlet", "iid", "pathological", "shards")
)


def source(labels, **columns) -> Source:
    labels = np.asarray(labels, np.int64)
    return Source(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, columns)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_disjoint(partition: Partition, size: int, covering: bool = True) -> None:
    assert partition.offsets[0] == 0
    assert partition.offsets[-1] == len(partition.order)
    assert len(np.unique(partition.order)) == len(partition.order)
    assert set(partition.order.tolist()) <= set(range(size))
    if covering:
        assert len(partition.order) == size


# Every partitioner that divides by a number of clients, with options that suit 12 classes of about 30.
COVERING = {
    "by_quantity": {"alpha": 0.3},
    "dirichlet": {"alpha": 0.1},
    "iid": {},
    "pathological": {"classes": 5, "minimum": 1},
    "shards": {"per_client": 3},
}
LABELS = rng(7).integers(0, 12, 360)


def test_every_partitioner_is_in_the_laws_below():
    assert sorted(PARTITIONERS) == list(PARTITIONERS)
    assert set(PARTITIONERS) == {*COVERING, "by_column"}


@pytest.mark.parametrize("name", COVERING)
@settings(deadline=None, max_examples=40)
@given(clients=st.integers(3, 20), seed=st.integers(0, 2**32 - 1))
def test_disjoint_covering_deterministic(name, clients, seed):
    partition = PARTITIONERS[name](source(LABELS), clients, rng(seed), **COVERING[name])
    again = PARTITIONERS[name](source(LABELS), clients, rng(seed), **COVERING[name])
    assert len(partition) == clients
    assert_disjoint(partition, len(LABELS))
    np.testing.assert_array_equal(partition.order, again.order)
    np.testing.assert_array_equal(partition.offsets, again.offsets)


@pytest.mark.parametrize("name", COVERING)
def test_another_seed_gives_another_split(name):
    first, second = (PARTITIONERS[name](source(LABELS), 10, rng(s), **COVERING[name]) for s in (0, 1))
    assert first.order.tolist() != second.order.tolist()


@pytest.mark.parametrize("name", COVERING)
def test_more_clients_than_samples_names_both_numbers(name):
    with pytest.raises(DataError, match=r"(?s)361 .*360"):
        PARTITIONERS[name](source(LABELS), 361, rng(), **COVERING[name])


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("clients", [None, 0, -1])
def test_needs_a_number_of_clients(name, clients):
    with pytest.raises(DataError, match="clients"):
        PARTITIONERS[name](source(LABELS), clients, rng(), **COVERING[name])


def test_partition_views_sizes_and_counts():
    partition = from_owners(np.array([1, 0, -1, 1, 3]), 4)
    assert [part.tolist() for part in partition] == [[1], [0, 3], [], [4]]
    assert partition.sizes.tolist() == [1, 2, 0, 1]
    counts = partition.counts(np.array([0, 2, 2, 0, 1]), 3)
    assert counts.tolist() == [[0, 0, 1], [2, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert np.shares_memory(partition[1], partition.order)
    with pytest.raises(IndexError, match="client 4 of 4"):
        partition[4]


@settings(deadline=None)
@given(clients=st.integers(1, 12), minimum=st.integers(0, 6), extra=st.integers(0, 40), seed=st.integers(0, 999))
def test_top_up_moves_only_what_is_missing_from_the_largest(clients, minimum, extra, seed):
    draw = rng(seed)
    owners = draw.integers(0, draw.integers(1, clients + 1), clients * minimum + extra)
    before = np.bincount(owners, minlength=clients)
    after = np.bincount(top_up(owners, clients, minimum, draw), minlength=clients)
    expected = before.copy()
    for client in np.flatnonzero(before < minimum):
        for _ in range(minimum - before[client]):
            expected[np.argmax(expected)] -= 1
            expected[client] += 1
    assert sorted(after) == sorted(expected)
    short = before < minimum
    assert (after[short] == minimum).all()
    assert (after[~short] <= before[~short]).all()


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(iid(source(LABELS), 7, rng()).sizes.tolist()) == [51, 51, 51, 51, 52, 52, 52]


def test_dirichlet_tends_to_uniform_as_alpha_grows():
    labels = np.arange(20_000) % 10
    spreads = []
    for alpha in (0.1, 1.0, 100.0, 1e6):
        counts = dirichlet(source(labels), 20, rng(), alpha=alpha).counts(labels, 10)
        spreads.append(np.abs(counts / 100 - 1).max())
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 3
    assert spreads[-1] <= 0.02


def test_dirichlet_takes_random_examples_of_a_class():
    parts = list(dirichlet(source(np.zeros(1000)), 4, rng(), alpha=1e6))
    assert all(np.ptp(part) > 900 for part in parts)


def test_dirichlet_of_small_alpha_gives_a_class_to_one_client():
    labels = np.arange(10_000) % 10
    counts = dirichlet(source(labels), 5, rng(), alpha=1e-4, minimum=0).counts(labels, 10)
    assert (counts.max(axis=0) > 990).all()


@settings(deadline=None, max_examples=50)
@given(alpha=st.sampled_from([1e-300, 0.01, 0.5, 50.0]), minimum=st.integers(0, 30), seed=st.integers(0, 999))
def test_dirichlet_respects_the_minimum(alpha, minimum, seed):
    partition = dirichlet(source(LABELS), 12, rng(seed), alpha=alpha, minimum=minimum)
    assert_disjoint(partition, len(LABELS))
    assert partition.sizes.min() >= minimum


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0\.0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"minimum": -1}, "minimum is -1"),
        ({"minimum": 37}, r"10 clients of at least 37 .* need 370.* 360"),
    ],
)
def test_dirichlet_refuses(options, message):
    with pytest.raises(DataError, match=message):
        dirichlet(source(LABELS), 10, rng(), **options)


# First five sizes, smallest and largest, as the released code splits CIFAR-100's 50,000 labels.
GOLDEN = [
    (20, 10, [3027, 2572, 2084, 2527, 2859], 1770, 3248),
    (20, 20, [2579, 2219, 2517, 2173, 2420], 1788, 3107),
    (100, 10, [534, 443, 484, 586, 411], 299, 849),
    (100, 20, [494, 560, 536, 459, 495], 374, 642),
]


@pytest.mark.parametrize(("clients", "classes", "first", "smallest", "largest"), GOLDEN)
def test_pathological_reproduces_the_released_splits(clients, classes, first, smallest, largest):
    labels = np.arange(50_000) % 100
    partition = pathological(source(labels), clients, rng(), classes=classes, released_seed=0)
    assert partition.sizes[:5].tolist() == first
    assert (partition.sizes.min(), partition.sizes.max()) == (smallest, largest)
    assert_disjoint(partition, 50_000)
    held = partition.counts(labels, 100) > 0
    assert (held.sum(axis=1) == classes).all()
    assert (held.sum(axis=0) == clients * classes // 100).all()


def test_pathological_hands_out_slices_in_the_order_of_the_data():
    labels = np.arange(400) % 4
    partition = pathological(source(labels), 4, rng(), classes=2)
    for label in range(4):
        held = [part[labels[part] == label] for part in partition]
        assert np.concatenate([part for part in held if len(part)]).tolist() == list(range(label, 400, 4))


@settings(deadline=None, max_examples=60)
@given(clients=st.integers(12, 40), classes=st.integers(1, 12), seed=st.integers(0, 999))
def test_pathological_deals_whole_hands_and_keeps_the_minimum(clients, classes, seed):
    labels = np.arange(12 * 130) % 12
    partition = pathological(source(labels), clients, rng(seed), classes=classes, minimum=3)
    counts = partition.counts(labels, 12)
    assert_disjoint(partition, len(labels))
    assert ((counts > 0).sum(axis=1) == classes).all()
    assert counts[counts > 0].min() >= 3
    holders = (counts > 0).sum(axis=0)
    assert holders.max() - holders.min() <= (1 if 12 % classes == 0 else 2)


@pytest.mark.parametrize(
    ("clients", "options", "message"),
    [
        (10, {"classes": 13}, r"classes is 13.* 12 classes"),
        (10, {"classes": 0}, "classes is 0"),
        (3, {"classes": 3}, r"3 clients of 3 classes .* 9 of the 12"),
        (12, {"classes": 12}, r"class \d+ has \d+ examples for 12 clients of at least 10; lower minimum"),
        (12, {"classes": 1, "minimum": -1}, "minimum is -1"),
    ],
)
def test_pathological_refuses(clients, options, message):
    with pytest.raises(DataError, match=message):
        pathological(source(LABELS), clients, rng(), **options)


def test_shards_give_few_classes_and_equal_sizes():
    labels = rng(1).permutation(np.arange(1000) % 10)
    partition = shards(source(labels), 50, rng(), per_client=2)
    assert partition.sizes.tolist() == [20] * 50
    assert ((partition.counts(labels, 10) > 0).sum(axis=1) <= 2).all()
    with pytest.raises(DataError, match="per_client is 0"):
        shards(source(labels), 50, rng(), per_client=0)


def test_by_quantity_gives_the_sizes_asked_for():
    partition = by_quantity(source(LABELS), None, rng(), sizes=[5, 100, 1])
    assert partition.sizes.tolist() == [5, 100, 1]
    assert_disjoint(partition, 360, covering=False)


def test_by_quantity_dirichlet_is_skewed_and_leaves_nobody_empty():
    partition = by_quantity(source(LABELS), 100, rng(), alpha=0.05)
    assert partition.sizes.min() == 1
    assert partition.sizes.max() > 36


@pytest.mark.parametrize(
    ("clients", "options", "message"),
    [
        (3, {}, "one of sizes and alpha"),
        (3, {"sizes": [1], "alpha": 1.0}, "one of sizes and alpha"),
        (3, {"sizes": [1, 2]}, "3 clients, but 2 sizes"),
        (2, {"sizes": [300, 61]}, "sum to 361.* 360"),
        (2, {"sizes": [3, 0]}, "at least 1"),
        (3, {"alpha": -1.0}, r"alpha is -1\.0"),
    ],
)
def test_by_quantity_refuses(clients, options, message):
    with pytest.raises(DataError, match=message):
        by_quantity(source(LABELS), clients, rng(), **options)


def test_by_column_makes_natural_clients():
    writers = np.array(["mia", "bo", "mia", "al", "bo", "mia", "cy", "al"], object)
    data = source(np.zeros(8), writer=writers)
    everyone = by_column(data, None, rng(), column="writer")
    assert everyone.names == ("al", "bo", "cy", "mia")
    assert [part.tolist() for part in everyone] == [[3, 7], [1, 4], [6], [0, 2, 5]]
    # al and bo tie: the first in order of value stays.
    largest = by_column(data, 2, rng(), column="writer")
    assert largest.names == ("al", "mia")
    assert [part.tolist() for part in largest] == [[3, 7], [0, 2, 5]]


def test_by_column_refuses():
    data = source([0, 1, 0], writer=np.array([4, 5, 4]))
    with pytest.raises(DataError, match=r"no column 'writter'; did you mean 'writer'\?"):
        by_column(data, None, rng(), column="writter")
    with pytest.raises(DataError, match=r"3 clients, but column 'writer' has 2 values"):
        by_column(data, 3, rng(), column="writer")


@pytest.mark.parametrize("name", COVERING)
def test_a_hundred_thousand_clients_take_seconds(name):
    data = source(np.arange(300_000) % 10)
    options = {**COVERING[name], **({"classes": 2, "minimum": 0} if name == "pathological" else {})}
    started = time.perf_counter()
    assert len(PARTITIONERS[name](data, 100_000, rng(), **options)) == 100_000
    assert time.perf_counter() - started < 20
