"""Feature discrimination, an ``evaluate`` metric: how well classes stay apart in features, float, binary and ternary.

``evaluate`` copies this script and the file it imports relatively, then runs the copy: neither imports the package.
It reads imports line by line, so each has a line of its own. What is computed, and why so, is in ``measure.py``.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .measure import DEFAULT_ETA
from .measure import feature_discrimination as measure

_DESCRIPTION = """
Expected squared distance between classes over that inside classes, of feature vectors and of their binary and ternary
quantization (arXiv 2504.13792). 0.5 means that the classes are not apart; higher is better.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: feature vectors, one row of numbers a sample.
    references: integer class labels.
    eta: the ternary threshold is eta times the mean magnitude of the standardised features.
Returns:
    discrimination: mean D over pairs of classes.
    discrimination_min: the least D of all pairs.
    binary, ternary: mean D of the quantized features.
    binary_ratio, ternary_ratio: these over discrimination.
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


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FeatureDiscrimination(evaluate.Metric):
    """The metric that ``evaluate.load`` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    # Not int64, which would cut a float label to a whole one without a word.
                    "references": datasets.Value("float64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2504.13792"],
        )

    def _compute(self, predictions: Any, references: Any, eta: float = DEFAULT_ETA) -> dict[str, Any]:
        odd = [label for label in references if int(label) != label]
        if odd:
            raise ValueError(f"labels (references) must be (n,) integers, got {odd[0]}")
        return measure(predictions, [int(label) for label in references], eta)
