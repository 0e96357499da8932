"""Where clusters are found: principal components and KMeans, both scikit-learn's."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .correction import CatConfig


class ClusterSpace:
    """Where clusters are found: the rows projected on their principal components."""

    def __init__(self, q: Tensor, config: CatConfig, notes: list[str]) -> None:
        self.seed = config.seed
        self.mean = q.mean(0)
        self.basis: Tensor | None = None
        if config.projection is not None and config.projection < q.shape[1]:
            rank = min(config.projection, len(q))
            if rank < config.projection:
                notes.append(f"projection {config.projection} lowered to {rank}: there are {len(q)} rows")
            components = PCA(n_components=rank, random_state=config.seed).fit(q.numpy()).components_
            self.basis = torch.from_numpy(np.ascontiguousarray(components.T)).float()
        self.points = q if self.basis is None else (q - self.mean) @ self.basis
        self._centroids: dict[int, Tensor] = {}

    def centroids(self, clusters: int) -> Tensor:
        """Centroids (C, P) of the rows' own projections, centring absorbed."""
        if clusters not in self._centroids:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
                fitted = KMeans(n_clusters=clusters, random_state=self.seed).fit(self.points.numpy())
            centers = torch.from_numpy(fitted.cluster_centers_).float()
            self._centroids[clusters] = centers if self.basis is None else centers + self.mean @ self.basis
        return self._centroids[clusters]
