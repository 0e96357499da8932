"""What solvers share: the statistics they are given, the checks of their input, the measure of their result.

The N rows of a matrix are B equal consecutive runs, one for each group of a convolution (B = 1 for a linear). Run b
meets only the inputs of its own group, hence only ``gram[b]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Values of a matrix that a solver works on at once: a head of many rows must not take many times its size.
AT_ONCE = 1 << 22
SLICE = 1 << 20  # values that are rounded or compared at once, where that makes no difference


class Moments(NamedTuple):
    """Statistics over the M calibration rows that reach a matrix (N, K) in B runs.

    Attributes:
        gram: (B, K, K) float32, mean of x~^T x~, with x~ (1, K) the input in the quantized stream.
        cross: (B, K, K) float32, mean of x^T x~, with x (1, K) the input of the same row in the float stream.
        mean: (B, K) float32, mean of x~.
        float_mean: (B, K) float32, mean of x.
        count: M.
    """

    gram: Tensor
    cross: Tensor
    mean: Tensor
    float_mean: Tensor
    count: int  # type: ignore[assignment]  # a statistic beside the others, not tuple.count


def check_weight(weight: Tensor) -> None:
    """Refuse anything but a finite (N, K) floating-point matrix with N, K > 0.

    Raises:
        ValueError: naming the rule and the value.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        got = f"{tuple(weight.shape)} {weight.dtype}"
        raise ValueError(f"weight must be a (N, K) floating-point matrix with N, K > 0, got {got}")
    check_finite("weight", weight)


def check_moments(moments: Moments | None, weight: Tensor, solver: str) -> Moments:
    """``moments`` on the device of ``weight`` (N, K), if they are there, fit to it and are finite.

    Raises:
        ValueError: naming the statistic, the rule and the value.
    """
    if moments is None:
        raise ValueError(
            f"solver {solver} needs calibration moments, got None: calibrate with a dataset, or use solver rtn"
        )
    rows, columns = weight.shape
    runs = moments.gram.shape[0] if moments.gram.dim() == 3 else 1
    if runs < 1 or rows % runs:
        raise ValueError(f"moments.gram must have a number of runs that divides the {rows} rows, got {runs}")
    for name, value in moments._asdict().items():
        if not isinstance(value, Tensor):
            continue
        shape = (runs, columns) if name.endswith("mean") else (runs, columns, columns)
        if tuple(value.shape) != shape:
            raise ValueError(f"moments.{name} must be {shape} for weight {rows, columns}, got {tuple(value.shape)}")
        check_finite(f"moments.{name}", value, ": squares of the layer's inputs, so look for huge values in the data")
    if moments.count < 1:
        raise ValueError(f"moments.count must be at least 1, got {moments.count}")
    gram, cross, mean, float_mean = (value.to(weight.device, torch.float32) for value in moments[:4])
    return Moments(gram, cross, mean, float_mean, moments.count)


def check_finite(name: str, value: Tensor, why: str = "") -> None:
    """Refuse NaN and infinity; ``why`` ends the message.

    Raises:
        ValueError: counting them.
    """
    bad = value.numel() - sum(int(torch.isfinite(value[rows]).sum()) for rows in row_slices(value))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {value.numel()} values that are NaN or infinite{why}")


class Rows(Protocol):
    """A matrix (N, K) that gives some of its rows: a tensor, or what makes them when they are asked for."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Rows (n, K)."""


def output_error(weight: Tensor, w_hat: Rows, moments: Moments | None) -> float:
    """Relative output error ||(W - W_hat) x~||^2 / ||W x~||^2 of weights (N, K).

    Without moments, or where no calibration row excites the weight, every direction counts the same:
    ||W - W_hat||^2 / ||W||^2. An all-zero weight has error 0.
    """
    if moments is not None:
        noise, signal = output_energies(weight, w_hat, moments)
        if signal > 0:
            return noise / signal
    noise, signal = output_energies(weight, w_hat, None)
    return noise / signal if signal > 0 else 0.0


def output_energies(weight: Tensor, w_hat: Rows, moments: Moments | None) -> tuple[float, float]:
    """||(W - W_hat) x~||^2 and ||W x~||^2 of weights (N, K), summed over the calibration rows; over unit vectors without."""
    if moments is None:
        noise = sum(float((weight[r].float() - w_hat[r].float()).double().square().sum()) for r in row_slices(weight))
        return noise, sum(float(weight[rows].double().square().sum()) for rows in row_slices(weight))
    energies = (_energy(weight, other, moments.gram) for other in (w_hat, None))
    noise, signal = (moments.count * energy for energy in energies)
    return noise, signal


def output_distance(weight: Tensor, w_hat: Rows, moments: Moments) -> float:
    """||W x - W_hat x~||^2 of weights (N, K) less ||W x||^2, summed over the calibration rows.

    x is the input in the float stream and x~ in the quantized one, rounded if activations are: what is left out is the
    same for every W_hat, in every orthogonal basis.
    """
    total, rows = 0.0, len(weight) // len(moments.gram)
    for part in row_slices(weight, len(moments.gram)):
        run = part.start // rows
        gram, cross = (t[run].to(weight.device) for t in (moments.gram, moments.cross))
        w, found = weight[part].float(), w_hat[part].float()
        total += float(((found @ gram - 2 * (w @ cross)) * found).sum(dtype=torch.float64))
    return moments.count * total


def row_slices(matrix: Tensor, runs: int = 1) -> Iterator[slice]:
    """Slices of the first dimension of at most ``SLICE`` values (at least a row) that cross no border of ``runs``."""
    rows = len(matrix) // runs
    step = max(1, SLICE // max(1, matrix.numel() // max(1, len(matrix))))
    for first in range(0, len(matrix), max(1, rows)):
        for start in range(first, first + rows, step):
            yield slice(start, min(start + step, first + rows))


def _energy(weight: Tensor, w_hat: Rows | None, gram: Tensor) -> float:
    """||(W - W_hat) x||^2 summed over the rows of W (N, K); without ``w_hat`` that of W."""
    total, rows = 0.0, len(weight) // len(gram)
    for part in row_slices(weight, len(gram)):
        piece = weight[part].float() if w_hat is None else weight[part].float() - w_hat[part].float()
        total += float((piece @ gram[part.start // rows].to(piece.device)).mul_(piece).sum(dtype=torch.float64))
    return max(0.0, total)
