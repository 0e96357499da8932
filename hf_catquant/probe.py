"""Finding the plan of a walk: which units the model runs, in which order, and whose outputs each of them reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .log import logger
from .logits import find_logits, note_into
from .modules import replace_module
from .replay import Replay, Stop, forget, hooked, own, revived, run
from .units import Leaf, Plan, Unit


def make_plan(
    model: nn.Module,
    batch: dict[str, Tensor],
    blocks: Sequence[str],
    leaves: Sequence[str],
    watched: Sequence[str] = (),
) -> Plan:
    """Run one batch and see which units run, in which order, and what each of them reads.

    ``watched`` are names of modules whose outputs are asked for when all units are done; those inside a unit do not count.
    """
    probe = _Probe(model, blocks, leaves, watched)
    with torch.enable_grad():
        output = probe.run(batch)
    _detach_caches(model)
    if probe.silent:
        return make_plan(model, batch, [block for block in blocks if block not in probe.silent], leaves, watched)
    plan = Plan(probe.units, probe.reads(output), find_logits(output, probe.returned), probe.watched_reads, probe.runs)
    if not probe.check(plan, batch, own(output)):
        logger.warning(
            "%s hides which of its blocks read which: all hidden states are kept in memory", type(model).__name__
        )
        for index, unit in enumerate(plan.units):
            unit.reads = set(range(index))
        plan.final_reads = plan.watched = set(range(len(plan.units)))
    return plan


def _detach_caches(model: nn.Module) -> None:
    """What modules remember of a forward (LeViT its attention biases) must not hold on to the graph of the probe."""
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and any(_has_graph(leaf) for leaf in pytree.tree_leaves(value)):
                setattr(module, name, pytree.tree_map_only(Tensor, Tensor.detach, value))


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


class _Probe:
    """One forward in which every unit's output is a fresh leaf of the autograd graph."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], leaves: Sequence[str], watched: Sequence[str]) -> None:
        self.model = model
        inside = {leaf: block for block in blocks for leaf in leaves if leaf.startswith(f"{block}.")}
        self.names = list(dict.fromkeys(inside.get(leaf, leaf) for leaf in leaves))
        self.inside = inside
        within = tuple(f"{name}." for name in self.names)
        self.watched = [name for name in watched if not name.startswith(within)]
        self.watched_reads: set[int] = set()
        self.watched_outputs: list[Any] = []
        self.units: list[Unit] = []
        self.order: dict[str, int] = {}
        self.inputs: list[list[Any]] = []
        self.outputs: list[list[Any]] = []
        self.graph_leaf: dict[int, int] = {}
        self.kept: list[Any] = []
        self.visited: list[Any] = []  # tensors of the block in work
        self.blocks, self.last_block = set(inside.values()), "\0"
        self.returned: list[tuple[str, Tensor]] = []
        self.runs: Counter[str] = Counter()
        self.silent: set[str] = (
            set()
        )  # blocks whose forward the model calls past their hooks: their layers stand alone

    def run(self, batch: dict[str, Tensor]) -> Any:
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))
        for leaf, block in self.inside.items():
            module = self.model.get_submodule(leaf)
            handles.append(module.register_forward_pre_hook(self._visit(leaf, block), with_kwargs=True))
        for name in self.watched:
            handles.append(self.model.get_submodule(name).register_forward_hook(self._watch))
        for name, module in self.model.named_modules():
            if name:
                handles.append(module.register_forward_hook(note_into(self.returned, name)))
                handles.append(module.register_forward_hook(partial(self._count, name)))
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
    def check(self, plan: Plan, batch: dict[str, Tensor], output: Any) -> bool:
        """Whether every unit, the model's output and the watched ones stay the same, outputs being zeros once all read."""
        replays: dict[int, Replay] = {}
        last_reads = plan.last_reads(watched=True)

        def recall(past: int, call: int) -> Any:
            output = self.outputs[past][call]
            # As many replays as the walk has by now: their number is the index of the unit whose turn it is.
            forgotten = last_reads[past] < len(replays)
            return revived(pytree.tree_map_only(Tensor, forget, output) if forgotten else output)

        try:
            for index, unit in enumerate(plan.units):
                module = self.model.get_submodule(unit.name)
                if not self._unit_agrees(unit, module, self.inputs[index], replays, batch):
                    return False
                replays[index] = Replay(module, partial(recall, index))
                replace_module(self.model, unit.name, replays[index])
            return self._rest_agrees(replays, batch, output)
        finally:
            for index, replay in replays.items():
                replace_module(self.model, plan.units[index].name, replay.original)
            replays.clear()  # they and what they recall know each other, and through it all that the probe has seen

    def _unit_agrees(
        self, unit: Unit, module: nn.Module, inputs: list[Any], replays: dict[int, Replay], batch: dict[str, Tensor]
    ) -> bool:
        caught: list[Any] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(own((args, kwargs)))
            if len(caught) == unit.calls:
                raise Stop

        with hooked(module, before=before):
            _replayed(self.model, replays, batch)
        return _same(caught, inputs)

    def _rest_agrees(self, replays: dict[int, Replay], batch: dict[str, Tensor], output: Any) -> bool:
        caught: list[Any] = []
        with ExitStack() as hooks:
            for name in self.watched:
                module = self.model.get_submodule(name)
                hooks.enter_context(hooked(module, after=lambda m, a, k, output: caught.append(own(output))))
            return _same(_replayed(self.model, replays, batch), output) and _same(caught, self.watched_outputs)

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        self.watched_reads |= self.reads(output)
        self.watched_outputs.append(own(output))

    def _count(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.runs[name] += 1

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
            self.inputs[index].append(own((args, kwargs)))
            if name not in self.inside.values():
                self.units[index].leaves = [Leaf("", 0, 1)]

        return hook

    def _visit(self, leaf: str, block: str) -> Callable[..., None]:
        name = leaf.removeprefix(f"{block}.")

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if block not in self.order:
                self.silent.add(block)
                return
            tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.visited.extend(tensors)  # a freed tensor's id could come back as another's
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
            self.outputs[index].append(own(output))
            if name in self.blocks:
                self._forget_inside(name)
            return pytree.tree_map_only(Tensor, lambda tensor: self._fresh(tensor, index), output)

        return hook

    def _forget_inside(self, block: str) -> None:
        """The block has run: what layers inside the one before returned is not the model's output, and holds its weights."""
        self.visited.clear()
        if self.last_block != block:
            inside = f"{self.last_block}."
            self.returned[:] = [pair for pair in self.returned if not pair[0].startswith(inside)]
        self.last_block = block

    def _fresh(self, tensor: Tensor, index: int) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaf = tensor.detach().clone().requires_grad_()
        self.graph_leaf[id(leaf)] = index
        self.kept.append(leaf)
        return leaf.clone()  # not the leaf itself, so that the model may write into it


def _replayed(model: nn.Module, replays: dict[int, Replay], batch: dict[str, Tensor]) -> Any:
    for replay in replays.values():
        replay.rewind()
    return run(model, batch)


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
