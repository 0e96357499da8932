"""What tests of features need: random ones, and discrimination by its definition, over all pairs of samples."""

from __future__ import annotations

import numpy as np


def standardise(x):
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1)


def all_pairs(x, y):
    """D (pairs,) of every pair of classes, from the distance of every sample to every other one."""
    square = np.square(x[:, None] - x[None]).sum(-1)
    classes = [np.flatnonzero(y == c) for c in np.unique(y)]
    inside = [square[np.ix_(c, c)].sum() / (len(c) * (len(c) - 1)) for c in classes]
    return np.array(
        [
            square[np.ix_(classes[a], classes[b])].mean() / (inside[a] + inside[b])
            for a in range(len(classes))
            for b in range(a + 1, len(classes))
        ]
    )


def pooled_pairs(x, y):
    """Sum over pairs of classes of the mean distance between them over that of the mean distances inside, of all x."""
    square = np.square(x[:, None] - x[None]).sum(-1)
    classes = [np.flatnonzero(y == c) for c in np.unique(y)]
    inside = [square[np.ix_(c, c)].sum() / (len(c) * (len(c) - 1)) for c in classes]
    found = [
        (square[np.ix_(classes[a], classes[b])].mean(), inside[a] + inside[b])
        for a in range(len(classes))
        for b in range(a + 1, len(classes))
    ]
    between, within = np.sum(found, 0)
    return 0.5 if between == within == 0 else np.inf if within == 0 else between / within


def random_features(rows=60, columns=5, classes=3):
    generator = np.random.default_rng(0)
    y = np.arange(rows) % classes
    return generator.normal(size=(rows, columns)) + 0.5 * y[:, None], y
