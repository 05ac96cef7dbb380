"""The split in which every client holds a few whole-numbered classes, in unequal amounts."""

from __future__ import annotations

import numpy as np

from polyrank.data.partition import Partition, from_owners, members
from polyrank.data.source import DataError, Source

_Random = np.random.Generator | np.random.RandomState


def pathological(
    source: Source,
    clients: int | None,
    rng: np.random.Generator,
    *,
    classes: int,
    minimum: int = 10,
    released_seed: int | None = None,
) -> Partition:
    """A fixed number of classes per client, each class in random unequal amounts.

    The classes are dealt like cards: a shuffled deck of all classes, `classes` to each client in turn, shuffled
    again whenever it is used up. A class with n examples and u holders gives each of them
    ``minimum + floor(Dirichlet(1, ..., 1) * (n - minimum * u))`` examples, and what rounding leaves one by one to
    holders drawn with replacement. Holders take consecutive slices of the class in the order of the data.

    Args:
        source: the training split.
        clients: how many clients; clients * classes must reach every class.
        rng: the randomness.
        classes: classes per client.
        minimum: examples of each of its classes that a client surely has.
        released_seed: draw as the released code does under this numpy seed instead of from `rng` (it takes the
            deck from the global stream and the amounts from a stream that is always seeded 2); its published
            splits use 0.

    References:
        HRALoRA's and Fed-HeLLo's released code (`pat_10_dir`, `pat_20_dir`).

    Note:
        Where `classes` does not divide the number of classes, the released code can deal a client the same class
        twice. Here such a card goes back into the deck.
    """
    deck = np.unique(source.labels)
    _check(source, clients, classes, minimum, len(deck))
    deal, amounts = (rng, rng)
    if released_seed is not None:
        deal, amounts = np.random.RandomState(released_seed), np.random.RandomState(2)
    dealt = _deal(deck, clients * classes, classes, deal)
    owners = np.full(len(source), -1, np.int64)
    cards, examples = members(dealt), members(source.labels)
    for label, own in sorted(examples.items(), key=lambda item: item[1][0]):  # by first appearance
        holders = cards[label] // classes
        owners[own] = np.repeat(holders, _amounts(label, len(own), len(holders), minimum, amounts))
    return from_owners(owners, clients)


def _check(source: Source, clients: int | None, classes: int, minimum: int, present: int) -> None:
    if clients is None:
        raise DataError("partition 'pathological' needs the number of clients")
    if not 1 <= clients <= len(source):
        raise DataError(
            f"partition 'pathological': {clients} clients, but the training split has {len(source)} examples"
        )
    if not 1 <= classes <= present:
        raise DataError(f"partition 'pathological': classes is {classes}, but the training split has {present} classes")
    if clients * classes < present:
        raise DataError(
            f"partition 'pathological': {clients} clients of {classes} classes reach at most {clients * classes}"
            f" of the {present} classes; raise one of the two"
        )
    if minimum < 0:
        raise DataError(f"partition 'pathological': minimum is {minimum}; it must be at least 0")


def _deal(deck: np.ndarray, total: int, hand: int, rng: _Random) -> np.ndarray:
    """`total` classes in dealing order, `hand` for each client, none twice in a hand."""
    deck = deck.copy()
    rounds: list[np.ndarray] = []
    while (count := len(rounds) * len(deck)) < total:
        # Each shuffle starts from the last order: that is what the released code does.
        rng.shuffle(deck)
        dealt = deck.copy()
        if started := count % hand:
            # The client in turn holds `started` cards already; doubles of them wait until its hand is full.
            doubles = np.isin(deck, rounds[-1][-started:])
            fresh, missing = deck[~doubles], hand - started
            rest = np.concatenate([fresh[missing:], deck[doubles]])
            dealt = np.concatenate([fresh[:missing], rng.permutation(rest)])
        rounds.append(dealt)
    return np.concatenate(rounds)[:total]


def _amounts(label: int, count: int, holders: int, minimum: int, rng: _Random) -> np.ndarray:
    """How many of a class's `count` examples each of its holders gets, int64 (holders,)."""
    spread = count - minimum * holders
    if spread < 0:
        raise DataError(
            f"partition 'pathological': class {label} has {count} examples for {holders} clients of at least"
            f" {minimum}; lower minimum to at most {count // holders}, or the number of clients or classes"
        )
    amounts = np.floor(rng.dirichlet(np.ones(holders)) * spread).astype(np.int64)
    lucky = rng.choice(holders, size=spread - amounts.sum())
    return minimum + amounts + np.bincount(lucky, minlength=holders)
