"""Feature discrimination, an ``evaluate`` metric: how well classes stay apart in features, float, binary and ternary.

    D(a, b) = (v_a + v_b + |m_a - m_b|^2) / (2 (v_a + v_b))

with the mean m (d,) and the trace v of the unbiased covariance of each class: expected squared distance between classes
over that inside classes (arXiv 2504.13792). The numerator uses population variances, which makes it equal to the mean over
all pairs of samples. D is at least about 1/2, where classes are not apart at all; features without any spread count 1/2.

This file stands alone: ``evaluate`` copies it and scans its imports, so it imports nothing of the package; the package
imports its functions from here.
"""

import datasets
import evaluate
import numpy as np

DEFAULT_ETA = 0.75

_DESCRIPTION = """
Ratio of the expected squared distance between classes to that inside classes, of feature vectors and of their binary and
ternary quantization (arXiv 2504.13792). 0.5 means that the classes are not apart; higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: feature vectors, one list of floats a sample.
    references: integer class labels.
    eta: the ternary threshold is eta times the mean magnitude of the standardised features.
Returns:
    discrimination: mean D over pairs of classes.
    discrimination_min: the least D of all pairs.
    binary, ternary: mean D of the quantized features.
    binary_ratio, ternary_ratio: these over discrimination.
    n, num_classes, num_features: sizes.
Examples:
    >>> metric.compute(predictions=[[0.0], [0.2], [1.0], [1.2]], references=[0, 0, 1, 1])["num_classes"]
    2
"""

_CITATION = """
@article{lu2025binary,
  title={The Binary and Ternary Quantization Can Improve Feature Discrimination},
  author={Lu, Weizhi and Chen, Mingrui and Li, Weiyu},
  journal={arXiv preprint arXiv:2504.13792},
  year={2025}
}
"""


def feature_discrimination(features, labels, eta=DEFAULT_ETA):
    """Discrimination of features (n, d) with labels (n,): a dict of floats and ints, see ``_KWARGS_DESCRIPTION``.

    Raises:
        ValueError: features are not a finite matrix, labels do not match, or fewer than two classes have two samples.
    """
    x, y = _checked(features, labels, eta)
    spread = x.std(0)
    standard = (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)
    plain = _pairwise(standard, y)
    threshold = eta * np.abs(standard).mean()
    binary = _pairwise((standard > 0).astype(np.float64), y)
    ternary = _pairwise(np.sign(standard) * (np.abs(standard) > threshold), y)
    value, binary_value, ternary_value = float(plain.mean()), float(binary.mean()), float(ternary.mean())
    return {
        "discrimination": value,
        "discrimination_min": float(plain.min()),
        "binary": binary_value,
        "ternary": ternary_value,
        "binary_ratio": binary_value / value,
        "ternary_ratio": ternary_value / value,
        "n": len(y),
        "num_classes": len(np.unique(y)),
        "num_features": int(x.shape[1]),
    }


def pairwise_discrimination(features, labels):
    """D (pairs,) of every pair of classes, in the order of the sorted labels, of the features as they are."""
    return _pairwise(*_checked(features, labels, DEFAULT_ETA))


def _pairwise(x, y):
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    population = np.array([x[y == c].var(0).sum() for c in classes])
    unbiased = np.array([x[y == c].var(0, ddof=1).sum() for c in classes])
    a, b = np.triu_indices(len(classes), k=1)
    between = population[a] + population[b] + np.square(means[a] - means[b]).sum(1)
    inside = 2 * (unbiased[a] + unbiased[b])
    return np.where(inside > 0, between / np.where(inside > 0, inside, 1.0), np.where(between > 0, np.inf, 0.5))


def _checked(features, labels, eta):
    try:
        x = np.asarray(features, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"predictions must be feature vectors of one length: {error}") from error
    y = np.asarray(labels).reshape(-1)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"predictions must be a matrix (n, d) of at least one row and column, got shape {x.shape}")
    if len(x) != len(y):
        raise ValueError(f"predictions and references must be of one length, got {len(x)} and {len(y)}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise ValueError(f"predictions must be finite, sample {bad[0]} is not")
    counts = np.unique(y, return_counts=True)
    if len(counts[0]) < 2:
        raise ValueError(f"references must have at least two classes, got {counts[0].tolist()}")
    if counts[1].min() < 2:
        raise ValueError(f"every class needs at least two samples, class {counts[0][counts[1].argmin()]} has one")
    if not eta >= 0:
        raise ValueError(f"eta must be a number of at least 0, got {eta!r}")
    return x, y


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FeatureDiscrimination(evaluate.Metric):
    """The metric that ``evaluate.load`` returns."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2504.13792"],
        )

    def _compute(self, predictions, references, eta=DEFAULT_ETA):
        return feature_discrimination(predictions, references, eta)
