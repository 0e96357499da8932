"""Fitting a correction from sums, and choosing it by cross-validation: what lowers the held-out loss beyond chance, or none.

The estimator of each map is in ``cluster_sums.py``. Clusters and alpha (gamma too, if asked) are chosen by 5-fold
cross-validation, with "off" among the choices: the published fixed ones do harm on few rows. ``held_out.py`` judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .answers import Kind, agreement
from .cluster_space import ClusterSpace
from .cluster_sums import Sums, solve
from .correction import CatConfig, ClusterAffine
from .held_out import CHUNK, FOLDS, folds_of, interval, keeps_answers, losses, standard_error
from .kernels.reference import nearest_centroid

LEAST_ROWS = 2 * FOLDS
CLUSTERS = (1, 4, 8, 16, 32, 64)
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
GAMMAS = ("std", "ls")
ROWS_PER_CLUSTER = 64
MAX_SUMS = 1 << 24  # floats: wider outputs get fewer clusters, so that sums by fold stay small
ONE_ANSWER = 0.95  # share of rows: of data sorted by class, or of one class alone
NOISE = 1e-6  # nats, or share of the mean square: differences of loss that are rounding, not a gain
LARGEST = 1e15  # what is larger is the mark of a class that a model never gives, and its square is no use

Choice = tuple[int, float, int]  # clusters, alpha and the number of gamma in GAMMAS: smaller ones are simpler


class UnusableTeacher(ValueError):
    """The float model's own outputs are such that nothing can be fitted to them."""


@dataclass
class CorrectionFit:
    """What fitting found.

    Attributes:
        correction: the correction, or None: "off" was best.
        clusters, alpha, gamma: what was chosen; 0, 0.0 and "" for "off".
        gain: loss without minus loss with correction, mean over rows that the map of their fold had not seen; None if it
            was not measured (clusters, alpha and gamma are fixed). A little too good: projection and centroids are of all
            rows, and the same folds chose among the candidates.
        gain_low, gain_high: 95 % interval of that mean, by the paired bootstrap over samples.
        loss_before, loss_after: mean loss over the same rows.
        metric: "kl" (Kullback-Leibler divergence to the teacher, nats) or "mse".
        rows: rows that were fitted on.
        candidates: mean held-out loss by "clusters/alpha/gamma".
    """

    correction: ClusterAffine | None
    clusters: int
    alpha: float
    gamma: str
    rows: int
    metric: str
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    candidates: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All but the correction, JSON-clean."""
        return {k: v for k, v in self.__dict__.items() if k != "correction"}

    def summary(self) -> str:
        """One line."""
        gain = (
            ""
            if self.gain is None
            else (
                f", held-out {self.metric} {self.loss_before:.5f} -> {self.loss_after:.5f}, "
                f"gain {self.gain:.5f} [{self.gain_low:.5f}, {self.gain_high:.5f}]"
            )
        )
        chosen = f"{self.clusters} clusters, alpha {self.alpha:g}, gamma {self.gamma}" if self.clusters else "off"
        return f"{chosen}{gain} ({self.rows} rows)"


def fit(
    quantized: Tensor,
    teacher: Tensor,
    config: CatConfig,
    kind: Kind,
    max_bytes: int | None = None,
    samples: Tensor | None = None,
) -> CorrectionFit:
    """Fit a correction of rows ``quantized`` (M, D) towards ``teacher`` (M, D), token by token the same.

    ``max_bytes`` bounds the size of the correction where ``num_clusters`` is "auto"; one cluster is always allowed.
    ``samples`` (M,) int64 says which sample each row belongs to, counted from 0; None: each is one of its own. Columns that
    mark what is never answered (values beyond 1e15, such as the lowest of the dtype) are left as they are, with a note.

    Raises:
        ValueError: too few rows, shapes that differ, or values that are not finite (``UnusableTeacher`` where they are the
            float model's own).
    """
    q, f = quantized.detach().float().cpu(), teacher.detach().float().cpu()
    _check_rows(q, f)
    notes: list[str] = []
    usable = (q.abs().amax(0) < LARGEST) & (f.abs().amax(0) < LARGEST)
    if not bool(usable.any()):
        raise UnusableTeacher(f"all outputs are beyond {LARGEST:g}: a correction cannot be fitted")
    if not bool(usable.all()):
        notes.append(f"{int((~usable).sum())} columns with values beyond {LARGEST:g} are left as they are")
        q, f = q[:, usable], f[:, usable]
    rows = torch.arange(len(q))
    samples = rows if samples is None else samples.cpu()
    if len(samples.unique()) < FOLDS:
        notes.append(f"fewer than {FOLDS} samples: their rows were judged as if each were a sample")
        samples = rows
    samples = samples.unique(return_inverse=True)[1]  # some have no row left; folds are to be of equal size
    # With more channels than rows each channel's own map is mostly noise: the prior counts for as much more.
    config = replace(config, shrinkage=config.shrinkage * max(1.0, q.shape[1] / len(q)))
    space = ClusterSpace(q, config, notes)
    if config.num_clusters != "auto" and config.num_clusters > len(q):
        notes.append(f"num_clusters {config.num_clusters} lowered to {len(q)}, the number of rows")
    if "auto" not in (config.num_clusters, config.alpha, config.gamma):
        clusters, alpha = min(int(config.num_clusters), len(q)), float(config.alpha)
        correction = _fit_all(q, f, space, clusters, alpha, config.gamma, config.shrinkage)
        result = CorrectionFit(correction, clusters, alpha, config.gamma, len(q), _metric(kind), notes=notes)
    else:
        choices = _cluster_choices(q, space, config, max_bytes, len(usable))
        result = _choose(q, f, samples, space, config, kind, choices, notes)
    if result.correction is not None:
        result.correction = result.correction.widened(usable)
    return result


def _fit_all(
    q: Tensor, f: Tensor, space: ClusterSpace, clusters: int, alpha: float, kind: str, shrinkage: float
) -> ClusterAffine:
    centroids = space.centroids(clusters)
    sums = _sums(
        q, f, nearest_centroid(q, space.basis, centroids), torch.zeros(len(q), dtype=torch.int64), clusters, 1
    )
    gamma, beta = solve(*sums.without(None), kind, shrinkage)
    # One cluster needs no projection at all.
    basis = space.basis if clusters > 1 else torch.zeros(q.shape[1], 1)
    centroids = centroids if clusters > 1 else torch.zeros(1, 1)
    return ClusterAffine.of(basis, centroids, 1 + alpha * (gamma - 1), alpha * beta)


def _choose(
    q: Tensor,
    f: Tensor,
    samples: Tensor,
    space: ClusterSpace,
    config: CatConfig,
    kind: Kind,
    choices: list[int],
    notes: list[str],
) -> CorrectionFit:
    folds = folds_of(samples, config.seed)
    before, agreed = losses(q, f, kind), agreement(f, q, kind)
    if kind == "classes" and _are_one_answer(f):
        notes.append(
            f"off: the float model gives one answer to more than {100 * ONE_ANSWER:g} % of {len(f)} rows, and what a "
            "correction does to the others cannot be judged: calibrate on samples of all classes"
        )
        choices = []
    gains: dict[Choice, Tensor] = {}
    candidates: dict[str, float] = {}
    for clusters in choices:
        cluster = nearest_centroid(q, space.basis, space.centroids(clusters))
        sums = _sums(q, f, cluster, folds, clusters, FOLDS)
        for number, gamma in enumerate(GAMMAS):
            if config.gamma not in ("auto", gamma):
                continue
            maps = [solve(*sums.without(fold), gamma, config.shrinkage) for fold in range(FOLDS)]
            for alpha in ALPHAS if config.alpha == "auto" else (float(config.alpha),):
                corrected = _held_out(q, cluster, folds, maps, alpha)
                after = losses(corrected, f, kind)
                candidates[f"{clusters}/{alpha:g}/{gamma}"] = float(after.mean())
                if keeps_answers(agreement(f, corrected, kind) - agreed, samples):
                    gains[clusters, alpha, number] = before - after
    result = CorrectionFit(
        None,
        0,
        0.0,
        "",
        len(q),
        _metric(kind),
        0.0,
        0.0,
        0.0,
        float(before.mean()),
        float(before.mean()),
        candidates,
        notes,
    )
    if not gains:
        return result
    best = max(gains, key=lambda key: (float(gains[key].mean()), -key[0]))
    chosen = _simplest(gains, best, samples)
    gain, low, high = interval(gains[chosen], samples, config.seed)
    if low > NOISE * (1.0 if kind != "values" else float(f.square().mean())):
        result.clusters, result.alpha, result.gamma = *chosen[:2], GAMMAS[chosen[2]]
        result.gain, result.gain_low, result.gain_high = gain, low, high
        result.loss_after = float(before.mean()) - gain
        result.correction = _fit_all(q, f, space, *chosen[:2], result.gamma, config.shrinkage)
    return result


def _are_one_answer(teacher: Tensor) -> bool:
    return float(teacher.argmax(1).bincount().max()) > ONE_ANSWER * len(teacher)


def _cluster_choices(
    q: Tensor, space: ClusterSpace, config: CatConfig, max_bytes: int | None, width: int
) -> list[int]:
    """How many clusters may be tried, for a correction that is stored ``width`` wide."""
    if config.num_clusters != "auto":
        return [min(int(config.num_clusters), len(q))]
    rank = space.points.shape[1]
    basis = 0 if rank == width else width * rank
    budget = math.inf if max_bytes is None else max_bytes
    return [
        c
        for c in CLUSTERS
        if c == 1
        or (
            len(q) >= ROWS_PER_CLUSTER * c
            and 5 * FOLDS * c * width <= MAX_SUMS
            and 4 * (basis + c * (2 * width + rank)) <= budget
        )
    ]


def _simplest(gains: dict[Choice, Tensor], best: Choice, samples: Tensor) -> Choice:
    """Fewest clusters, then smallest alpha, that is within one standard error of the best, sample by sample."""
    for key in sorted(gains):
        difference = gains[best] - gains[key]
        if float(difference.mean()) <= standard_error(difference, samples):
            return key
    return best


def _held_out(q: Tensor, cluster: Tensor, folds: Tensor, maps: list[tuple[Tensor, Tensor]], alpha: float) -> Tensor:
    """Every row (M, D) corrected by the map of the folds that it is not in."""
    corrected = torch.empty_like(q)
    for fold, (gamma, beta) in enumerate(maps):
        rows = (folds == fold).nonzero().flatten()
        for part in rows.split(max(1, CHUNK // q.shape[1])):
            slope, shift = gamma.float()[cluster[part]], beta.float()[cluster[part]]
            corrected[part] = q[part] + alpha * ((slope - 1) * q[part] + shift)
    return corrected


def _sums(q: Tensor, f: Tensor, cluster: Tensor, fold: Tensor, clusters: int, folds: int) -> Sums:
    sums = Sums(clusters, q.shape[1], folds)
    size = max(1, CHUNK // q.shape[1])
    for parts in zip(*(t.split(size) for t in (q, f, cluster, fold)), strict=True):
        sums.add(*parts)
    return sums


def _metric(kind: Kind) -> str:
    return "mse" if kind == "values" else "kl"


def _check_rows(q: Tensor, f: Tensor) -> None:
    if q.dim() != 2 or q.shape != f.shape:
        raise ValueError(
            f"quantized and teacher rows must be (M, D) of one shape, got {tuple(q.shape)}, {tuple(f.shape)}"
        )
    if len(q) < LEAST_ROWS:
        raise ValueError(f"fitting a correction needs at least {LEAST_ROWS} rows, got {len(q)}: pass more samples")
    for name, rows, kind in (("teacher", f, UnusableTeacher), ("quantized", q, ValueError)):
        if not bool(torch.isfinite(rows).all()):
            raise kind(f"the {name} outputs have values that are not finite: a correction cannot be fitted")
