"""scikit-learn's bundled handwritten digits, cut into public data for a foundation model and a private task."""

from __future__ import annotations

import numpy as np

from polyrank.core.rng import stream
from polyrank.data.source import Dataset, Source, stratified

# Shares of all 1,797 images; what remains is the clients' training split.
_PUBLIC, _VALIDATION, _TEST = 0.35, 0.10, 0.15


def digits() -> Dataset:
    """Handwritten digits (scikit-learn's, 8 x 8), rotated and inverted; bundled, no download.

    What `public_digits` leaves, turned by 90 degrees and inverted, so that a model of upright digits must adapt.
    """
    everything, parts = _parts()
    train, validation, test = (_turned(everything.select(part)) for part in parts[1:])
    return Dataset("digits", "image", train, validation, test, tuple("0123456789"))


def public_digits() -> Source:
    """Upright digits that are in no split of `digits`; a foundation model may be trained on them."""
    everything, parts = _parts()
    return everything.select(parts[0])


def _parts() -> tuple[Source, list[np.ndarray]]:
    """All images as they are, and the indices of public, train, validation and test. Always the same."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    pixels = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    left = np.arange(len(labels))
    taken = {}
    for name, share in (("public", _PUBLIC), ("validation", _VALIDATION), ("test", _TEST)):
        part = left[stratified(labels[left], round(share * len(labels)), stream(0, "digits", name))]
        taken[name] = part
        left = np.setdiff1d(left, part, assume_unique=True)
    return Source(pixels, labels), [taken["public"], left, taken["validation"], taken["test"]]


def _turned(source: Source) -> Source:
    turned = np.ascontiguousarray(255 - np.rot90(source.inputs, axes=(1, 2)))
    return Source(turned, source.labels, source.columns)
