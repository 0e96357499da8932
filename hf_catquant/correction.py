"""The output correction: cluster-wise affine transformation (CAT, arXiv 2509.26277), and its place on a model.

    y <- gamma[c] * y + beta[c],        c the nearest of C centroids to y @ basis

It acts on the last dimension of what a module returns (or on ``dim``, for images). One cluster is the plain affine map.
The blending factor alpha of the paper is folded in: gamma is 1 + alpha * (gamma - 1), beta is alpha * beta; the centring
of the PCA is absorbed by the centroids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import kernels  # noqa: F401  registers what the op computes

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class CatConfig:
    """How a correction is fitted, and where it sits.

    Args:
        num_clusters: clusters, or "auto": chosen by cross-validation among off, 1, 4, 8, 16, 32 and 64.
        projection: principal components that clusters are found in, or None for all dimensions.
        alpha: blending factor in (0, 1], or "auto": chosen by cross-validation.
        gamma: "std", the ratio of standard deviations, "ls", least squares, which attenuates, or "auto": chosen by
            cross-validation.
        shrinkage: rows that the prior counts for (times D / M where there are fewer rows M than channels D): clusters
            shrink to the affine map of all rows, that to one slope for all channels, that to the identity.
        at: "logits", "blocks", the name of a module, or several of these. Modules that run several times in a forward (the
            shared layers of ALBERT) have no correction: they are refused by name, and left out of "logits" and "blocks".
        seed: of the clustering and of the folds.

    Raises:
        ValueError: a value breaks its rule.
    """

    num_clusters: int | Literal["auto"] = "auto"
    projection: int | None = 50
    alpha: float | Literal["auto"] = "auto"
    gamma: Literal["std", "ls", "auto"] = "std"
    shrinkage: float = 32.0
    at: str | tuple[str, ...] = "logits"
    seed: int = 0

    def __post_init__(self) -> None:
        at: Any = self.at
        if isinstance(at, list):
            object.__setattr__(self, "at", tuple(at))
        places = at if isinstance(at, list | tuple) else (at,)
        rules = (
            (
                "num_clusters",
                '"auto" or an integer of at least 1',
                self.num_clusters == "auto" or is_count(self.num_clusters),
            ),
            ("projection", "None or an integer of at least 1", self.projection is None or is_count(self.projection)),
            ("alpha", '"auto" or a number above 0 and up to 1', self.alpha == "auto" or _number(self.alpha, 1) > 0),
            ("gamma", '"std", "ls" or "auto"', self.gamma in ("std", "ls", "auto")),
            ("shrinkage", "a finite number of at least 0", 0 <= _number(self.shrinkage) < float("inf")),
            ("at", '"logits", "blocks" or names of modules', bool(places) and all(isinstance(p, str) for p in places)),
            (
                "seed",
                "an integer from 0 to 2**32 - 1",
                isinstance(self.seed, int) and not isinstance(self.seed, bool) and 0 <= self.seed < 1 << 32,
            ),
        )
        for name, rule, holds in rules:
            if not holds:
                raise ValueError(f"CatConfig: {name} must be {rule}, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, at: str | tuple[str, ...] = "logits") -> CatConfig:
        """The method exactly as published: PCA 50, KMeans 64, least-squares gamma, alpha 0.4, no shrinkage."""
        return cls(num_clusters=64, projection=50, alpha=0.4, gamma="ls", shrinkage=0.0, at=at, seed=42)

    @classmethod
    def of(cls, value: CatConfig | dict[str, Any] | str | None) -> CatConfig | None:
        """What a request for a correction means: "cat" is the default, a dict its fields, None no correction.

        Raises:
            ValueError, TypeError: it is none of these, or a field breaks its rule.
        """
        if value is None or isinstance(value, CatConfig):
            return value
        if value == "cat":
            return cls()
        if isinstance(value, dict):
            return cls.from_dict(value)
        raise ValueError(f'correction must be None, "cat" or a CatConfig, got {value!r}')

    @property
    def chooses(self) -> bool:
        """Whether anything is left to the data: the number of clusters, alpha, or how far clusters shrink."""
        return self.may_be_off or self.shrinkage > 0

    @property
    def may_be_off(self) -> bool:
        """Whether "off" is among the choices."""
        return "auto" in (self.num_clusters, self.alpha, self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean fields."""
        fields = asdict(self)
        return {**fields, "at": fields["at"] if isinstance(self.at, str) else list(self.at)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CatConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown field, or a value that breaks its rule.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"CatConfig fields must be a dict, got {fields!r}")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"CatConfig has no field {', '.join(unknown)}; it has {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**fields)


def is_count(value: Any) -> bool:
    """Whether this is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any, most: float = float("inf")) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and value <= most
    return float(value) if good else float("nan")


class ClusterAffine(nn.Module):
    """The correction as a module. Buffers, float32 whatever the model's dtype:

    ``basis`` (D, P) or None, ``centroids`` (C, P), ``gamma`` (C, D), ``beta`` (C, D).
    """

    basis: Tensor | None
    centroids: Tensor
    gamma: Tensor
    beta: Tensor

    def __init__(self, width: int, clusters: int, rank: int | None, dim: int = -1, device: Any = None) -> None:
        """An identity for D = ``width``, waiting for its tensors; ``rank`` P, or None to cluster y itself."""
        super().__init__()
        self.dim = dim
        make: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer("basis", None if rank is None else torch.zeros(width, rank, **make))
        self.register_buffer("centroids", torch.zeros(clusters, width if rank is None else rank, **make))
        self.register_buffer("gamma", torch.ones(clusters, width, **make))
        self.register_buffer("beta", torch.zeros(clusters, width, **make))

    @classmethod
    def of(cls, basis: Tensor | None, centroids: Tensor, gamma: Tensor, beta: Tensor) -> ClusterAffine:
        """The correction with these tensors."""
        made = cls(gamma.shape[1], gamma.shape[0], None if basis is None else basis.shape[1], device=gamma.device)
        for name, value in (("basis", basis), ("centroids", centroids), ("gamma", gamma), ("beta", beta)):
            setattr(made, name, None if value is None else value.detach().float().contiguous())
        return made

    def forward(self, y: Tensor) -> Tensor:
        """y (..., D), or with D at ``dim``, corrected, in its own dtype."""
        if self.dim == -1:
            return torch.ops.catquant.cluster_affine(y, self.basis, self.centroids, self.gamma, self.beta)
        moved = y.movedim(self.dim, -1).contiguous()
        out = torch.ops.catquant.cluster_affine(moved, self.basis, self.centroids, self.gamma, self.beta)
        return out.movedim(-1, self.dim)

    def widened(self, columns: Tensor) -> ClusterAffine:
        """This correction of the ``columns`` (D,) bool of wider outputs; the others stay as they are."""
        if bool(columns.all()):
            return self
        width, narrow = len(columns), self.gamma.shape[1]
        gamma, beta = torch.ones(len(self.gamma), width), torch.zeros(len(self.gamma), width)
        gamma[:, columns], beta[:, columns] = self.gamma, self.beta
        basis = torch.zeros(width, self.centroids.shape[1])
        basis[columns] = torch.eye(narrow) if self.basis is None else self.basis
        return ClusterAffine.of(basis, self.centroids, gamma, beta)

    def fold_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight (D, K) and bias (D,) of the linear in front with a one-cluster correction folded in.

        Raises:
            ValueError: there is more than one cluster, or the weight is not a matrix of D rows.
        """
        if len(self.gamma) != 1:
            raise ValueError(f"only a correction of one cluster folds into a linear, this one has {len(self.gamma)}")
        gamma, beta = self.gamma[0], self.beta[0]
        if weight.dim() != 2 or len(weight) != len(gamma):
            raise ValueError(f"the weight must be ({len(gamma)}, K) to fold this in, got {tuple(weight.shape)}")
        shift = beta if bias is None else gamma * bias.float() + beta
        return (weight.float() * gamma[:, None]).to(weight.dtype), shift.to(weight.dtype)

    def extra_repr(self) -> str:
        """Sizes, as printed inside ``print(model)``."""
        return f"width={self.gamma.shape[1]}, clusters={self.gamma.shape[0]}, rank={self.centroids.shape[1]}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClusterAffine:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:  # undo the cast, not the move
                setattr(self, name, value.to(moved.device))
        return self


def attach(model: nn.Module, name: str, correction: ClusterAffine) -> None:
    """Make the module called ``name`` correct what it returns; a correction that is there already is replaced.

    Raises:
        ValueError: there is no such module, it is a container that would run the correction as one of its layers, it
            has a child or an attribute ``correction`` of its own, or it is a linear of another width.
    """
    site = _site(model, name)
    check_place(name, site, correction)
    detach(model, name)
    site.correction = correction
    site.register_forward_hook(correct_output)


def detach(model: nn.Module, name: str) -> ClusterAffine | None:
    """Take the correction off the module called ``name`` and return it, None if there is none.

    Raises:
        ValueError: there is no such module.
    """
    site = _site(model, name)
    for key in [key for key, hook in site._forward_hooks.items() if hook is correct_output]:
        del site._forward_hooks[key]
    if not isinstance(site._modules.get("correction"), ClusterAffine):
        return None
    correction: Any = site._modules.pop("correction")
    return correction


def corrections(model: nn.Module) -> dict[str, ClusterAffine]:
    """The corrections of a model by the name of the module they sit on."""
    found = {name: module._modules.get("correction") for name, module in model.named_modules()}
    return {name: value for name, value in found.items() if isinstance(value, ClusterAffine)}


def correct_output(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook: the output, or the first of several (of a dict, the first but ``loss``), corrected."""
    correction: Any = module.correction
    if isinstance(output, Tensor):
        return correction(output)
    if isinstance(output, tuple | list):
        corrected = (correction(output[0]), *output[1:])
        return type(output)(*corrected) if hasattr(output, "_fields") else type(output)(corrected)
    first = next(key for key in output if key != "loss")  # comes before the logits where labels were passed
    output[first] = correction(output[first])
    return output


def _site(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name!r} for a correction: {error}") from error


def check_place(name: str, site: nn.Module, correction: ClusterAffine) -> None:
    """Refuse a module that cannot carry this correction.

    Raises:
        ValueError: as :func:`attach` says.
    """
    if isinstance(site, CONTAINERS):
        children = [f"{name}.{child}".lstrip(".") for child, _ in site.named_children()]
        last = children[-1] if children else name
        raise ValueError(
            f"a correction cannot sit on {name!r}, a {type(site).__name__}: name its last child, {last!r}"
        )
    if not isinstance(getattr(site, "correction", None), ClusterAffine | None):
        raise ValueError(f"a correction cannot sit on {name!r}, whose {type(site).__name__} has its own `correction`")
    width = correction.gamma.shape[1]
    outputs = getattr(site, "out_features", None) if isinstance(getattr(site, "in_features", None), int) else None
    if isinstance(outputs, int) and outputs != width:
        raise ValueError(f"a correction of {name!r} must have its {outputs} output features, got {width}")
