"""Feature discrimination, an ``evaluate`` metric: how well classes stay apart in features, float, binary and ternary.

``evaluate`` copies this script and the files that it imports relatively itself, then runs the copy: none of them imports
the package. It reads imports line by line, so each has a line of its own. What is computed, and why so, is in
``measure.py``.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .accuracy import CLASSIFIERS
from .bootstrap import intervals
from .inputs import EXACT, checked_features, checked_labels
from .measure import feature_discrimination as measure
from .moments import Moments
from .streaming import FeatureStatistics
from .thresholds import search

# What is listed here but not used is imported because evaluate copies only files that this one imports.
__all__ = [
    "CLASSIFIERS",
    "FeatureDiscrimination",
    "FeatureStatistics",
    "Moments",
    "intervals",
    "search",
]

_DESCRIPTION = """
Expected squared distance between classes over that inside classes, of feature vectors and of their binary and ternary
quantization (arXiv 2504.13792). 0.5 means that the classes are not apart; higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: feature vectors, one row of numbers a sample.
    references: class labels, integers or strings.
    eta: the ternary threshold "mean" is eta times the mean magnitude of the standardised features.
    binary_threshold: a number in deviations, or "best": of 0 and 1024 quantiles of all values (fewer from 129 classes
        on) the one, for all features, of highest mean D over pairs of classes on these very data.
    ternary_threshold: a number in deviations, "mean" or "best".
    per_feature: add D of every feature on its own.
    pairs: add D of every pair of classes.
    accuracy: "knn", "linear" or both: add their accuracy in 5-fold cross-validation (fewer folds where a class
        has fewer than 5 samples, of which it needs 3).
    bootstrap: add 95 % intervals from so many resamples.
    seed: of the folds and the resamples.
Returns:
    discrimination: mean D over pairs of classes.
    discrimination_min: the least D of all pairs.
    binary, ternary: mean D of the quantized features.
    binary_ratio, ternary_ratio: these over discrimination.
    binary_threshold, ternary_threshold: those that were used.
    n, num_classes, num_features: sizes.
Examples:
    >>> result = metric.compute(predictions=[[0.0], [1.0], [2.0], [3.0]], references=[0, 0, 1, 1])
    >>> result["discrimination"]
    2.25
"""

_CITATION = """
@article{lu2025binary,
  title={The Binary and Ternary Quantization Can Improve Feature Discrimination},
  author={Lu, Weizhi and Chen, Mingrui and Li, Weiyu},
  journal={arXiv preprint arXiv:2504.13792},
  year={2025}
}
"""

_ROWS = datasets.Sequence(datasets.Value("float64"))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FeatureDiscrimination(evaluate.Metric):
    """The metric that ``evaluate.load`` returns."""

    writer: Any
    selected_feature_format: Any

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # The first form that fits the first label. Not int64, which would cut a float to a whole number without a word.
            features=[
                datasets.Features({"predictions": _ROWS, "references": datasets.Value("string")}),
                datasets.Features({"predictions": _ROWS, "references": datasets.Value("float64")}),
            ],
            reference_urls=["https://arxiv.org/abs/2504.13792"],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add rows and their labels, at least one: ``evaluate`` reads the form of the labels off the first."""
        # evaluate itself would drop imaginary parts and read numbers in strings, without a word.
        predictions = checked_features(predictions).astype("float64", copy=False)
        references = self._labels(references)
        first = self.writer is None
        try:
            super().add_batch(predictions=predictions, references=references, **kwargs)
        except ValueError:
            if first and self.num_process == 1:
                self._forget()
            raise

    def _forget(self) -> None:
        """Drop the file that was begun for rows that were refused, and the form of labels that it was begun for."""
        if self.writer is not None:
            self.writer.close()
        self.writer = self.selected_feature_format = None

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add a row and its label."""
        row = checked_features([prediction])[0].astype("float64")
        super().add(prediction=row, reference=self._labels([reference])[0], **kwargs)

    def _labels(self, references: Any) -> list[Any]:
        """Labels as integers or strings, of the form of those before: evaluate takes "1" for 1 and 1 for "1"."""
        labels, form = _labels(references), self.selected_feature_format
        if form is not None and labels and isinstance(labels[0], str) != (form["references"].dtype == "string"):
            raise ValueError("labels (references) must be all integers or all strings, got both")
        return labels

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return measure(predictions, references, **options)


def _labels(references: Any) -> list[Any]:
    """Labels as integers or strings, checked before ``evaluate`` makes them float64 or strings."""
    labels = checked_labels(references).tolist()
    large = [label for label in labels if not isinstance(label, str) and abs(label) > EXACT]
    if large:
        raise ValueError(
            f"labels (references) must be integers up to 2**53 in size, got {large[0]}: pass them as strings"
        )
    return labels
