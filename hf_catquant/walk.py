"""The walk: one model, two streams, one unit at a time, for any architecture.

A *unit* is a repeated block, or a layer outside the blocks. The walk runs the model's own forward again and again, with
every finished unit replaced by a :class:`Replay` that returns what the unit put out, and stops at the unit whose turn it
is. So nothing has to be known about how blocks are wired: masks, skip connections, encoders and decoders, custom code
all take their own path. There are two streams of recorded outputs, of the float units and of the quantized ones.

Only outputs that a later unit still reads are kept. Who reads what is found once, with autograd on one batch, and then
checked: each unit must receive the same inputs with the forgotten outputs replaced by zeros. If it does not (a model
that detaches its hidden states), everything is kept, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .log import logger
from .model import replace_module

Call = tuple[tuple[Any, ...], dict[str, Any]]
Outputs = list[list[Any]]  # by batch, by call


@dataclass
class Leaf:
    """A layer inside a unit.

    Attributes:
        name: its name relative to the unit, "" if it is the unit.
        source: stands for the tensor that it reads; leaves with one source read the same tensor.
        calls: how often one run of the unit runs it.
    """

    name: str
    source: int
    calls: int = 0


@dataclass
class Unit:
    """A part of the model that is quantized in one go.

    Attributes:
        name: its name in the model.
        leaves: the layers to treat inside, in the order the model runs them.
        calls: how often one forward runs the unit.
        reads: indices of the earlier units whose outputs its inputs depend on.
    """

    name: str
    leaves: list[Leaf] = field(default_factory=list)
    calls: int = 0
    reads: set[int] = field(default_factory=set)


@dataclass
class Plan:
    """The units in the order the model runs them; what its output reads; where its logits come from."""

    units: list[Unit]
    final_reads: set[int]
    logits_site: str | None


class _Stop(Exception):
    pass


class Replay(nn.Module):
    """Stands where a finished unit was and returns its recorded outputs; anything else is asked of the unit itself."""

    def __init__(self, original: nn.Module, recall: Callable[[int], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_recall", recall)
        object.__setattr__(self, "call", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the unit returned at this call of this batch."""
        object.__setattr__(self, "call", self.call + 1)
        return self._recall(self.call - 1)


class Walk:
    """Runs ``model`` over ``batches`` unit by unit. See the module docstring.

    Args:
        model: the model, in evaluation mode; finished units are replaced in place until :meth:`finish`.
        batches: keyword arguments of ``forward``, on the model's device.
        blocks: names of the repeated blocks.
        leaves: names of the layers to treat.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[dict[str, Tensor]], blocks: Sequence[str], leaves: Sequence[str]
    ) -> None:
        self.model = model
        self.batches = batches
        # Two samples show the wiring as well as a whole batch does, and autograd keeps all they touch.
        size = max((v.shape[0] for v in batches[0].values() if v.dim()), default=0)
        few = {k: v[:2] if v.dim() and v.shape[0] == size else v for k, v in batches[0].items()}
        self.plan = make_plan(model, few, blocks, leaves)
        self._replays: dict[int, Replay] = {}
        self._recorded: dict[str, dict[int, Outputs]] = {"float": {}, "quantized": {}}
        self._stream, self._batch = "float", 0
        self._last_read = self._last_reads()

    def inputs(self, index: int, stream: str) -> list[list[Call]]:
        """Arguments that unit ``index`` receives in ``stream``, by batch, by call."""
        return [self._catch(index, stream, batch, until="input")[0] for batch in range(len(self.batches))]

    def inputs_and_outputs(self, index: int, stream: str) -> tuple[list[list[Call]], Outputs]:
        """Arguments and results of unit ``index``, as it stands in the model now, by batch, by call."""
        pairs = [self._catch(index, stream, batch, until="output") for batch in range(len(self.batches))]
        return [calls for calls, _ in pairs], [outputs for _, outputs in pairs]

    def record(self, index: int, outputs: dict[str, Outputs]) -> None:
        """Put a :class:`Replay` in the place of unit ``index``; forget outputs that nobody reads any more."""
        name = self.plan.units[index].name
        for stream, values in outputs.items():
            self._recorded[stream][index] = values
        replay = Replay(self.model.get_submodule(name), lambda call: self._recall(index, call))
        self._replays[index] = replay
        replace_module(self.model, name, replay)
        for past in [i for i in self._replays if self._last_read[i] <= index]:
            for stream in self._recorded:
                self._recorded[stream][past] = pytree.tree_map_only(Tensor, _forget, self._recorded[stream][past])

    def outputs_of(self, name: str, stream: str) -> list[Any]:
        """What the module called ``name`` returns at its last call, by batch, once every unit is recorded."""
        results = []
        for batch in range(len(self.batches)):
            caught: list[Any] = []
            with hooked(
                self.model.get_submodule(name), after=lambda m, a, k, output, into=caught: into.append(output)
            ):
                self._run(stream, batch)
            results.append(_own(caught[-1]))
        return results

    def finish(self) -> None:
        """Put the units themselves back. The walk is over."""
        for index, replay in self._replays.items():
            replace_module(self.model, self.plan.units[index].name, object.__getattribute__(replay, "_original"))
        self._replays.clear()

    def _last_reads(self) -> dict[int, int]:
        units = self.plan.units
        readers = [(i, u.reads) for i, u in enumerate(units)] + [(len(units), self.plan.final_reads)]
        return {i: max([r for r, reads in readers if i in reads], default=i) for i in range(len(units))}

    def _catch(self, index: int, stream: str, batch: int, until: str) -> tuple[list[Call], list[Any]]:
        unit = self.plan.units[index]
        calls: list[Call] = []
        outputs: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((_own(args), _own(kwargs)))
            if until == "input" and len(calls) == unit.calls:
                raise _Stop

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(_own(output))
            if len(outputs) == unit.calls:
                raise _Stop

        with hooked(self.model.get_submodule(unit.name), before, after):
            self._run(stream, batch)
        if len(calls) != unit.calls:
            raise RuntimeError(
                f"{unit.name} ran {len(calls)} times on batch {batch} but {unit.calls} times on the first one: "
                "calibration needs batches that take the same path through the model"
            )
        return calls, outputs

    def _run(self, stream: str, batch: int) -> None:
        self._stream, self._batch = stream, batch
        for replay in self._replays.values():
            object.__setattr__(replay, "call", 0)
        run(self.model, self.batches[batch])

    def _recall(self, index: int, call: int) -> Any:
        return pytree.tree_map_only(
            (Tensor, _Forgotten), _revive, self._recorded[self._stream][index][self._batch][call]
        )


@dataclass(frozen=True)
class _Forgotten:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _forget(tensor: Tensor) -> _Forgotten:
    return _Forgotten(tensor.shape, tensor.dtype, tensor.device)


def _revive(value: Tensor | _Forgotten) -> Tensor:
    if isinstance(value, _Forgotten):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.clone()  # the model may write into what a unit returned


def _revived(outputs: list[Any], call: int) -> Any:
    return pytree.tree_map_only((Tensor, _Forgotten), _revive, outputs[call])


def _own(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """``model(**batch)`` without a cache of past keys; returns None if a hook stopped it."""
    extra = {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) else {}
    try:
        return model(**batch, **extra)
    except _Stop:
        return None


def leaf_inputs(root: nn.Module, leaf: Leaf, calls: list[Call]) -> list[Tensor]:
    """First argument of ``leaf`` at each of its runs while ``root``, a unit, runs on ``calls``."""
    if not leaf.name:
        return [_first(args, kwargs) for args, kwargs in calls]
    caught: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(_first(args, kwargs).detach().clone())
        if len(caught) % leaf.calls == 0:
            raise _Stop

    with hooked(root.get_submodule(leaf.name), before=before):
        run_unit(root, calls)
    return caught


def leaf_outputs(root: nn.Module, name: str, calls: list[Call]) -> list[Any]:
    """What the module called ``name`` inside ``root`` returns at each of its runs while ``root`` runs on ``calls``."""
    caught: list[Any] = []
    with hooked(root.get_submodule(name), after=lambda m, a, k, output: caught.append(_own(output))):
        run_unit(root, calls)
    return caught


def run_unit(root: nn.Module, calls: list[Call]) -> list[Any]:
    """Results of ``root`` on copies of ``calls``; None where a hook stopped it."""
    results = []
    for args, kwargs in calls:
        try:
            results.append(root(*_own(args), **_own(kwargs)))
        except _Stop:
            results.append(None)
    return results


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def hooked(
    module: nn.Module, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Forward hooks on ``module`` for the time of a ``with``: ``before(module, args, kwargs)``, ``after(..., output)``."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    if after is not None:
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_plan(model: nn.Module, batch: dict[str, Tensor], blocks: Sequence[str], leaves: Sequence[str]) -> Plan:
    """Run one batch and see which units run, in which order, and what each of them reads."""
    probe = _Probe(model, blocks, leaves)
    with torch.enable_grad():
        output = probe.run(batch)
    plan = Plan(probe.units, probe.reads(output), _logits_site(output, probe.returned))
    if not probe.check(plan, batch):
        logger.warning(
            "%s hides which of its blocks read which: all hidden states are kept in memory", type(model).__name__
        )
        for index, unit in enumerate(plan.units):
            unit.reads = set(range(index))
        plan.final_reads = set(range(len(plan.units)))
    return plan


def logits_site(model: nn.Module, batch: dict[str, Tensor]) -> str | None:
    """Name of the innermost module that returns the model's logits (its output, if that is a tensor), or None."""
    returned: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_hook(_note_into(returned, name)) for name, module in model.named_modules() if name
    ]
    try:
        return _logits_site(run(model, batch), returned)
    finally:
        for handle in handles:
            handle.remove()


def _note_into(returned: list[tuple[str, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            returned.append((name, output))

    return hook


def _logits_site(output: Any, returned: list[tuple[str, Tensor]]) -> str | None:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        return None
    same = [name for name, tensor in returned if tensor is logits]
    equal = [n for n, t in returned if t.shape == logits.shape and torch.equal(t.float(), logits.float())]
    found = same or equal
    return found[0] if found else None


class _Probe:
    """One forward in which every unit's output is a fresh leaf of the autograd graph."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], leaves: Sequence[str]) -> None:
        self.model = model
        inside = {leaf: block for block in blocks for leaf in leaves if leaf.startswith(f"{block}.")}
        self.names = list(dict.fromkeys(inside.get(leaf, leaf) for leaf in leaves))
        self.inside = inside
        self.units: list[Unit] = []
        self.order: dict[str, int] = {}
        self.inputs: list[list[Any]] = []
        self.outputs: list[list[Any]] = []
        self.graph_leaf: dict[int, int] = {}
        self.kept: list[Any] = []
        self.returned: list[tuple[str, Tensor]] = []

    def run(self, batch: dict[str, Tensor]) -> Any:
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        for leaf, block in self.inside.items():
            module = self.model.get_submodule(leaf)
            handles.append(module.register_forward_pre_hook(self._visit(leaf, block), with_kwargs=True))
        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_hook(_note_into(self.returned, name)))
        try:
            return run(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def reads(self, tree: Any) -> set[int]:
        """Indices of the units that the tensors in ``tree`` were computed from."""
        found: set[int] = set()
        stack = [_grad_node(t) for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
        seen = set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.graph_leaf:
                found.add(self.graph_leaf[id(variable)])
            stack.extend(next_node for next_node, _ in node.next_functions)
        return found

    @torch.no_grad()
    def check(self, plan: Plan, batch: dict[str, Tensor]) -> bool:
        """Whether every unit still gets the same inputs when all outputs it does not read are zeros."""
        originals = {u.name: self.model.get_submodule(u.name) for u in plan.units}
        try:
            return all(self._unit_agrees(plan, index, batch, originals) for index in range(len(plan.units)))
        finally:
            for name, module in originals.items():
                replace_module(self.model, name, module)

    def _unit_agrees(self, plan: Plan, index: int, batch: dict[str, Tensor], originals: dict[str, nn.Module]) -> bool:
        unit = plan.units[index]
        for past in range(index):
            outputs: Any = self.outputs[past]
            if past not in unit.reads:
                outputs = pytree.tree_map_only(Tensor, _forget, outputs)
            replay = Replay(originals[plan.units[past].name], partial(_revived, outputs))
            replace_module(self.model, plan.units[past].name, replay)
        caught: list[Any] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise _Stop

        with hooked(originals[unit.name], before=before):
            run(self.model, batch)
        return bool(caught) and _same(caught[0], self.inputs[index][0])

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name not in self.order:
                self.order[name] = len(self.units)
                self.units.append(Unit(name))
                self.inputs.append([])
                self.outputs.append([])
            index = self.order[name]
            self.units[index].calls += 1
            self.units[index].reads |= self.reads((args, kwargs)) - {index}
            self.inputs[index].append(_own((args, kwargs)))
            if name not in self.inside.values():
                self.units[index].leaves = [Leaf("", 0, 1)]

        return hook

    def _visit(self, leaf: str, block: str) -> Callable[..., None]:
        name = leaf.removeprefix(f"{block}.")

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.kept.extend(tensors)  # a freed tensor's id could come back as another's
            unit = self.units[self.order[block]]
            known = {entry.name: entry for entry in unit.leaves}
            if name not in known:
                known[name] = Leaf(name, id(tensors[0]) if tensors else 0)
                unit.leaves.append(known[name])
            known[name].calls += 1

        return hook

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            index = self.order[name]
            self.outputs[index].append(_own(output))
            return pytree.tree_map_only(Tensor, lambda tensor: self._fresh(tensor, index), output)

        return hook

    def _fresh(self, tensor: Tensor, index: int) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaf = tensor.detach().clone().requires_grad_()
        self.graph_leaf[id(leaf)] = index
        self.kept.append(leaf)
        return leaf.clone()  # not the leaf itself, so that the model may write into it


def _grad_node(tensor: Tensor) -> Any:
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    return torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None


def _same(a: Any, b: Any) -> bool:
    left, right = (t for t in (pytree.tree_leaves(a), pytree.tree_leaves(b)))
    if len(left) != len(right):
        return False
    for x, y in zip(left, right, strict=True):
        if isinstance(x, Tensor) and not (
            x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
        ):
            return False
    return True
