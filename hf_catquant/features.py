"""Binary and ternary features for scikit-learn: quantizers that learn where to cut and how to scale from training rows.

    binary   c_j = 1[z_j > t_j]                    ternary   c_j = sign(z_j) 1[|z_j| > t_j]

with z_j = (x_j - mean_j) / deviation_j of the training rows (arXiv 2504.13792), or the features as they are. Packed codes
take 1 bit, 2 bits or 1.6 bits a feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from .formats import get_format
from .metrics.feature_discrimination.inputs import as_array, check_classes, check_rows, checked_number
from .metrics.feature_discrimination.measure import DEFAULT_ETA
from .metrics.feature_discrimination.moments import Moments
from .metrics.feature_discrimination.streaming import CHUNK, Coder
from .metrics.feature_discrimination.thresholds import search
from .packing import check_bytes, pack, packed_width, unpack

WORDS = ("mean", "discrimination")


class _Quantizer(TransformerMixin, BaseEstimator):
    _ternary: bool
    _packings: tuple[str | None, ...]

    def fit(self, X: Any, y: Any = None) -> Any:
        """Learn means, deviations and thresholds.

        Args:
            X: (n, d) training features: array, table or tensor (bfloat16 too, on any device).
            y: (n,) classes; only the threshold "discrimination" looks at them.

        Returns:
            The quantizer itself.

        Raises:
            ValueError: the features are not a finite matrix, a parameter is none, or "discrimination" lacks classes.
        """
        x = validate_data(self, as_array(X), dtype=(np.float64, np.float32))
        least = 0.0 if self._ternary else -np.inf
        threshold = checked_number(self.threshold, "threshold", least, WORDS)
        eta = checked_number(self.eta, "eta", 0)
        for name in ("per_feature", "standardize"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.packing not in self._packings:
            raise ValueError(f"packing must be one of {', '.join(map(repr, self._packings))}, got {self.packing!r}")
        check_rows(x, 0)
        mean, inverse = _standard(x) if self.standardize else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
        if threshold == "mean":
            threshold = eta * _magnitude(x, mean, inverse, self.per_feature)
        elif threshold == "discrimination":
            index, counts = _classes(x, y)
            threshold = search(x, index, counts, (mean, inverse), self._ternary, self.per_feature)
        self.mean_, self.inverse_deviation_ = mean, inverse
        self.threshold_ = np.broadcast_to(np.asarray(threshold, np.float64), x.shape[1]).copy()
        return self

    def transform(self, X: Any) -> NDArray[Any]:
        """Codes of features (n, d): in the dtype of X, or packed (n, bytes) uint8.

        Raises:
            ValueError: the features are not a finite matrix of the width that was fitted.
        """
        check_is_fitted(self)
        x = validate_data(self, as_array(X), dtype=(np.float64, np.float32), reset=False)
        coder = Coder(self.mean_, self.inverse_deviation_, self.threshold_, self._ternary)
        coded = (coder(rows.astype(np.float64)) for rows in _chunks(x))
        if self.packing is None:
            return np.concatenate([codes.astype(x.dtype) for codes in coded])
        return np.concatenate([self._pack(codes.astype(np.int8)) for codes in coded])

    def unpack(self, packed: Any) -> NDArray[np.int8]:
        """The codes (n, d) int8 in what :meth:`transform` packed.

        Raises:
            ValueError: it is not packed that way, or the quantizer does not pack.
        """
        check_is_fitted(self)
        packed = np.ascontiguousarray(packed)
        width = self._packed_width()
        if self.packing is None or packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != width:
            raise ValueError(
                f"packed codes must be (n, {width}) uint8 of a quantizer that packs, got {packed.dtype} of shape "
                f"{packed.shape} with packing={self.packing!r}"
            )
        if self.packing == "base3":
            check_bytes(torch.from_numpy(packed), get_format("ternary"))
        return self._unpack(packed)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """Names of the columns of :meth:`transform`: those of the features, or numbered bytes."""
        check_is_fitted(self)
        if self.packing is not None:
            return np.asarray([f"{type(self).__name__.lower()}{i}" for i in range(self._packed_width())], dtype=object)
        known = getattr(self, "feature_names_in_", None)
        if input_features is None:
            input_features = known if known is not None else [f"x{i}" for i in range(self.n_features_in_)]
        names = np.asarray(input_features, dtype=object)
        if len(names) != self.n_features_in_ or (known is not None and not np.array_equal(names, known)):
            raise ValueError("input_features must be the names of the features that were fitted")
        return names

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = self.threshold == "discrimination"
        tags.transformer_tags.preserves_dtype = [] if self.packing else ["float64", "float32"]
        return tags

    def _packed_width(self) -> int:
        fmt = get_format("ternary" if self.packing == "base3" else "binary")
        planes = 2 if self._ternary and self.packing == "bits" else 1
        return planes * packed_width(fmt, self.n_features_in_, -1)

    def _pack(self, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
        if self.packing == "base3":
            return _packed(codes + 1, "ternary")
        if self._ternary:
            return np.hstack([_packed(codes != 0, "binary"), _packed(codes < 0, "binary")])
        return _packed(codes, "binary")

    def _unpack(self, packed: NDArray[np.uint8]) -> NDArray[np.int8]:
        if self.packing == "base3":
            return _unpacked(packed, "ternary", self.n_features_in_) - np.int8(1)
        if self._ternary:
            used, negative = (_unpacked(part, "binary", self.n_features_in_) for part in np.hsplit(packed, 2))
            if (negative > used).any():
                raise ValueError('packed codes must have no bit "negative" where the bit "not 0" is unset')
            return used - 2 * negative
        return _unpacked(packed, "binary", self.n_features_in_)


class BinaryQuantizer(_Quantizer):
    """Features to one bit each: 1 above a threshold, else 0.

    Parameters:
        threshold: a number, in deviations if standardised; "mean": ``eta`` times the mean magnitude of the training
            features; "discrimination": where the training classes are farthest apart, O(n log n) a feature.
        eta: of the threshold "mean", at least 0.
        per_feature: whether "mean" and "discrimination" give every feature a threshold of its own, or all the same one.
        standardize: whether features get mean 0 and deviation 1 first, by the training rows. False: cut as they are, as
            is usual for sentence embeddings.
        packing: None: codes in the dtype of the features; "bits": (n, ceil(d / 8)) uint8, the first feature in the lowest
            bit, zeros behind the last.

    Attributes:
        threshold_: (d,) float64, in deviations if standardised.
        mean_, inverse_deviation_: (d,) float64; 0 and 1 if not standardised. A constant has inverse deviation 0.
    """

    _ternary = False
    _packings = (None, "bits")

    def __init__(
        self,
        threshold: float | str = 0.0,
        *,
        eta: float = DEFAULT_ETA,
        per_feature: bool = False,
        standardize: bool = True,
        packing: str | None = None,
    ) -> None:
        self.threshold = threshold
        self.eta = eta
        self.per_feature = per_feature
        self.standardize = standardize
        self.packing = packing


class TernaryQuantizer(_Quantizer):
    """Features to three values: the sign of those whose magnitude is above a threshold, else 0.

    Parameters:
        threshold: at least 0, as for :class:`BinaryQuantizer`.
        eta, per_feature, standardize: as there.
        packing: None; "bits": (n, 2 ceil(d / 8)) uint8, the bits of "not 0" and then those of "negative", which
            :class:`hf_catquant.similarity.PackedIndex` reads; "base3": (n, ceil(d / 5)) uint8, five codes in a byte.

    Attributes:
        threshold_, mean_, inverse_deviation_: as there.
    """

    _ternary = True
    _packings = (None, "bits", "base3")

    def __init__(
        self,
        threshold: float | str = "mean",
        *,
        eta: float = DEFAULT_ETA,
        per_feature: bool = False,
        standardize: bool = True,
        packing: str | None = None,
    ) -> None:
        self.threshold = threshold
        self.eta = eta
        self.per_feature = per_feature
        self.standardize = standardize
        self.packing = packing


def _standard(x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and inverse deviation (d,); the inverse is 0 for a constant feature."""
    moments = Moments()
    for rows in _chunks(x):
        moments.add(rows.astype(np.float64))
    spread = np.sqrt(moments.squares / moments.count)
    return moments.mean, np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)


def _magnitude(x: NDArray[Any], mean: NDArray[Any], inverse: NDArray[Any], per_feature: bool) -> Any:
    """Mean |z|, of every feature or of all."""
    sums = sum(np.abs((rows - mean) * inverse).sum(0) for rows in _chunks(x))
    return sums / len(x) if per_feature else np.sum(sums) / x.size


def _classes(x: NDArray[Any], y: Any) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Class numbers (n,) and samples of each class."""
    if y is None:
        raise ValueError('threshold="discrimination" requires y to be passed, but the target y is None: the classes')
    check_classification_targets(y)
    labels = column_or_1d(y, warn=True)
    check_consistent_length(x, labels)
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f'threshold="discrimination" needs at least two classes, got one class, {classes[0]}')
    check_classes(classes.tolist(), counts.tolist())
    return index, counts


def _chunks(x: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = max(1, CHUNK // x.shape[1])
    return (x[start : start + step] for start in range(0, len(x), step))


def _packed(codes: NDArray[Any], name: str) -> NDArray[np.uint8]:
    return pack(torch.from_numpy(codes.astype(np.uint8)), get_format(name), -1).numpy()


def _unpacked(packed: NDArray[np.uint8], name: str, columns: int) -> NDArray[np.int8]:
    return unpack(torch.from_numpy(packed.copy()), get_format(name), -1, columns).numpy().astype(np.int8)
