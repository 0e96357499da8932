"""Fused experts: E matrices (N, K) in one tensor, each met by the rows of x that the router sends to it.

transformers holds all experts of a layer in one module with two 3-D parameters, which its ``grouped_mm`` and its other
implementations multiply. To quantize them the module is *opened*: :class:`Experts` stands in its place and does the same
with two children, ``up`` (the gate with it) and ``down``, which are layers like any other: their weight is seen as a matrix
(E * N, K) whose run e of N rows belongs to expert e.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import QuantizedModule, Scheme, Window, waves

UP, DOWN = "up", "down"
_OWN = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Fused:
    """What kind of module experts were fused in.

    Attributes:
        kind: its class, whose gate is used.
        up, down: names of its 3-D parameters; biases (E, N) have "_bias" after them.
        is_transposed: whether they are (E, K, N).
    """

    kind: type[nn.Module]
    up: str
    down: str
    is_transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> Fused | None:
        """How ``module`` holds its experts; None if it is no module of fused experts that can be opened."""
        held = dict(module.named_parameters(recurse=False))
        up = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        known = {up, f"{up}_bias", "down_proj", "down_proj_bias"}
        whole = {up, "down_proj"} <= held.keys() <= known and not module._buffers
        if not whole or not hasattr(module, "_apply_gate"):
            return None
        if not all(held[name].dim() == 3 and held[name].is_floating_point() for name in (up, "down_proj")):
            return None
        return cls(type(module), up, "down_proj", bool(getattr(module, "is_transposed", False)))


class ExpertLinear(nn.Module):
    """E linears in float: ``weight`` (E, N, K), ``bias`` (E, N) or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (S, K), sorted by expert, to (S, N); expert e has the rows from ``ends[e - 1]`` to ``ends[e]``."""
        return multiply(x, ends, self.weight, self.bias)


class Experts(nn.Module):
    """Opened experts: ``forward`` as that of the module it stands for, whatever ``experts_implementation`` says."""

    up: nn.Module
    down: nn.Module

    def __init__(self, original: nn.Module, fused: Fused) -> None:
        super().__init__()
        self._copy_state(original)
        self.fused = fused
        for child, name in ((UP, fused.up), (DOWN, fused.down)):
            weight, bias = original._parameters[name], original._parameters.get(f"{name}_bias")
            assert weight is not None
            setattr(self, child, ExpertLinear(self._turned(weight), bias).train(original.training))
        self.experts = len(self.up.weight)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Rows (T, K), the experts of each (T, k) and their weights (T, k) to (T, K); an index of E or more is nobody."""
        count = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        ends = self.ends(experts)
        out = self.down(self.between(self.up(hidden_states[order // count], ends)), ends)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)  # type: ignore[operator]
        out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        # Back in the order of the tokens, and summed: index_add_ would add in an order of its own on CUDA.
        out = out[order.argsort()].view(len(hidden_states), count, -1).sum(1)
        return out.to(hidden_states.dtype)

    def ends(self, experts: Tensor) -> Tensor:
        """Where the rows of each expert end (E,), among rows sorted by their ``experts`` (S,)."""
        return torch.searchsorted(experts, torch.arange(self.experts, device=experts.device), right=True)

    def between(self, x: Tensor) -> Tensor:
        """What ``down`` reads, of what ``up`` returned."""
        if self.fused.up != "gate_up_proj":
            return self.act_fn(x)  # type: ignore[operator]
        kind: Any = self.fused.kind
        return kind._apply_gate(self, x)

    def close(self) -> nn.Module:
        """The module that was opened, with the float weights of the children."""
        module = self.fused.kind.__new__(self.fused.kind)
        nn.Module.__init__(module)
        Experts._copy_state(module, self)  # type: ignore[arg-type]
        for name in ("fused", "experts"):
            del module.__dict__[name]
        for child, name in ((UP, self.fused.up), (DOWN, self.fused.down)):
            linear: Any = module._modules.pop(child)
            weight = self._turned(linear.weight)
            weight.data = weight.data.contiguous()
            module.register_parameter(name, weight)
            if linear.bias is not None:
                module.register_parameter(f"{name}_bias", linear.bias)
        return module

    def _turned(self, weight: nn.Parameter) -> nn.Parameter:
        """From the original's order of dimensions to (E, N, K) or back: the very parameter, if the order is the same."""
        return nn.Parameter(weight.detach().mT, weight.requires_grad) if self.fused.is_transposed else weight

    def _copy_state(self, other: nn.Module) -> None:
        """Take over what ``other`` is, but for its parameters: attributes that its class reads, and its children."""
        self.__dict__.update({name: value for name, value in vars(other).items() if name not in _OWN})
        self._modules.update(other._modules)

    @property
    def is_float(self) -> bool:
        """Whether neither child is quantized."""
        return not any(isinstance(child, QuantizedModule) for child in (self.up, self.down))

    def sentinel(self) -> dict[str, Tensor]:
        """What a file holds under the name of the original parameter, so that a load without this package fails.

        Loaders merge files with one tensor an expert: it is one that can be split.
        """
        return {self.fused.down: torch.zeros(self.experts, 1, 1, dtype=torch.uint8)}


class QuantizedExpertLinear(QuantizedModule):
    """E linears with packed weights; activations get a range for every row."""

    wraps: ClassVar[type[nn.Module]] = ExpertLinear
    rotates = True
    takes_product = False
    sentinel = ""  # :class:`Experts` has it

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        super().__init__(original, scheme)
        self.runs = len(original.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (S, K), sorted by expert, to (S, N)."""
        scheme = self.scheme
        return torch.ops.catquant.expert_linear(
            self.rotated(x), ends, *self._packed(), self.bias, scheme.weights, scheme.group_size, scheme.activations
        )

    @classmethod
    def matrix_shape(cls, module: nn.Module) -> tuple[int, int]:
        """(E * N, K)."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.shape[0] * weight.shape[1], weight.shape[2]

    @classmethod
    def to_matrix(cls, weight: Tensor) -> Tensor:
        """(E, N, K) to (E * N, K)."""
        return weight.reshape(-1, weight.shape[-1])

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None, *where: Tensor) -> Tensor:
        """x (S, K), sorted by expert, to (S, N)."""
        (ends,) = where
        return multiply(x, ends, matrix.view(self.weight_shape), bias)

    @staticmethod
    def input_rows(module: nn.Module, x: Tensor, window: Window | None = None) -> None:
        """None: which rows meet which expert, the router says."""
        return None

    @classmethod
    def example(cls, module: nn.Module) -> Tensor:
        """One row."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return waves(weight, (1, weight.shape[-1]))

    def to_float(self) -> nn.Module:
        """An :class:`ExpertLinear`."""
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return ExpertLinear(nn.Parameter(self.weight.detach(), requires_grad=False), bias).train(self.training)


def multiply(x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (S, K), sorted by expert, times the float ``weight`` (E, N, K) of each row's expert: (S, N)."""
    parts = [
        nn.functional.linear(x[start:end], weight[expert], None if bias is None else bias[expert])
        for expert, start, end in runs_of(ends)
    ]
    rest = x.shape[0] - sum(len(part) for part in parts)
    return torch.cat([*parts, x.new_zeros(rest, weight.shape[1])])


def runs_of(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, row after the last) of every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, start, end
        start = end


@torch.no_grad()
def does_the_same(opened: Experts, original: nn.Module) -> bool:
    """Whether ``opened`` returns what ``original`` does, for three rows; on the meta device there is nothing to compare."""
    weight: Tensor = opened.up.weight  # type: ignore[assignment]
    if weight.is_meta:
        return True
    x = waves(weight, (3, weight.shape[-1]))
    index = torch.tensor([[0], [opened.experts - 1], [0]], device=x.device)
    shares = waves(weight, (3, 1)).abs() + 0.25
    try:
        wanted, found = type(original).forward(original, x, index, shares), opened(x, index, shares)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
        return False
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return False
    return float((wanted - found).norm()) <= 0.02 * float(wanted.norm()) + 1e-12
