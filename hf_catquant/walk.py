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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .memory import small_blocks_mapped
from .modules import replace_module
from .probe import make_plan
from .replay import Call, Replay, Rerun, Stop, forget, hooked, own, own_random_numbers, revived, run
from .units import Leaf, Unit

__all__ = ["Call", "Leaf", "Outputs", "Unit", "Walk", "leaf_inputs", "leaf_outputs", "run_unit"]

Outputs = list[list[Any]]  # by batch, by call
# Arguments of a unit over all batches that are larger than this are caught again when asked for, and outputs that only the
# model itself reads (logits) are computed again.
KEPT_BYTES = 1 << 30


class Walk:
    """Runs ``model`` over ``batches`` unit by unit. See the module docstring.

    Args:
        model: the model, in evaluation mode; finished units are replaced in place until :meth:`finish`.
        batches: keyword arguments of ``forward``, on the model's device.
        blocks: names of the repeated blocks.
        leaves: names of the layers to treat.
        watched: names of modules whose outputs in the float stream :meth:`outputs_of` will be asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Tensor]],
        blocks: Sequence[str],
        leaves: Sequence[str],
        watched: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.batches = batches
        # Two samples show the wiring as well as a whole batch does, and autograd keeps all they touch.
        size = max((v.shape[0] for v in batches[0].values() if v.dim()), default=0)
        few = {k: v[:2] if v.dim() and v.shape[0] == size else v for k, v in batches[0].items()}
        with small_blocks_mapped():
            self.plan = make_plan(model, few, blocks, leaves, watched)
        self._replays: dict[int, Replay] = {}
        self._recorded: dict[str, dict[int, Outputs]] = {"float": {}, "quantized": {}}
        self._stream, self._batch = "float", 0
        self._last_reads = {stream: self.plan.last_reads(watched=stream == "float") for stream in self._recorded}

    def inputs(self, index: int, stream: str) -> Sequence[list[Call]]:
        """Arguments that unit ``index`` receives in ``stream``, by batch, by call; until the unit is recorded."""
        first = self._catch(index, stream, 0, until="input")[0]
        if _nbytes(first) * len(self.batches) > KEPT_BYTES:
            return _CaughtAgain(lambda batch: self._catch(index, stream, batch, until="input")[0], len(self.batches))
        rest = range(1, len(self.batches))
        return [first, *(self._catch(index, stream, batch, until="input")[0] for batch in rest)]

    def outputs(self, index: int, stream: str) -> Outputs:
        """Results of unit ``index``, as it stands in the model now, by batch, by call."""
        return [self._catch(index, stream, batch, until="output")[1] for batch in range(len(self.batches))]

    def inputs_and_outputs(self, index: int, stream: str) -> tuple[Sequence[list[Call]], Outputs]:
        """Both, in one run where the arguments are small."""
        first = self._catch(index, stream, 0, until="output")
        if _nbytes(first[0]) * len(self.batches) > KEPT_BYTES:
            return self.inputs(index, stream), self.outputs(index, stream)
        rest = range(1, len(self.batches))
        pairs = [first, *(self._catch(index, stream, batch, until="output") for batch in rest)]
        return [calls for calls, _ in pairs], [outputs for _, outputs in pairs]

    def is_too_wide(self, index: int) -> bool:
        """Whether unit ``index`` is a layer whose outputs are too large to keep, and only the model's output reads them."""
        is_layer = [leaf.name for leaf in self.plan.units[index].leaves] == [""]
        if not is_layer or self._last_reads["quantized"][index] < len(self.plan.units):
            return False
        outputs = self._catch(index, "float", 0, until="output")[1]
        return _nbytes(outputs) * len(self.batches) > KEPT_BYTES

    def run_again(self, index: int, float_unit: nn.Module) -> None:
        """Let unit ``index`` run whenever its outputs are asked for, in the float stream ``float_unit`` in its place."""
        unit = self.plan.units[index]
        live = self.model.get_submodule(unit.name)
        for last_read in self._last_reads.values():
            for read in unit.reads:
                last_read[read] = len(self.plan.units)
        self._put(index, Rerun(live, lambda call: float_unit if self._stream == "float" else live))

    def record(self, index: int, outputs: dict[str, Outputs]) -> None:
        """Put a :class:`Replay` in the place of unit ``index``; forget outputs that nobody reads any more."""
        name = self.plan.units[index].name
        for stream, values in outputs.items():
            self._recorded[stream][index] = values
        self._put(index, Replay(self.model.get_submodule(name), lambda call: self._recall(index, call)))

    def _put(self, index: int, replay: Replay) -> None:
        """Put ``replay`` in the place of unit ``index``; forget outputs that nobody reads any more."""
        self._replays[index] = replay
        replace_module(self.model, self.plan.units[index].name, replay)
        for stream, recorded in self._recorded.items():
            for past in [i for i in recorded if self._last_reads[stream][i] <= index]:
                recorded[past] = pytree.tree_map_only(Tensor, forget, recorded[past])

    def recorded(self, stream: str) -> dict[int, Outputs]:
        """What the finished units put out, by index; forgotten tensors are no tensors any more."""
        return self._recorded[stream]

    def outputs_of(self, name: str, stream: str, batches: Sequence[int]) -> Iterator[Any]:
        """What the module called ``name`` returns at its last call, by batch, once every unit is recorded.

        The module is the model itself (""), the one that returns its logits, or a watched one in the float stream: what
        others read is forgotten by then.
        """
        for batch in batches:
            caught: list[Any] = []
            with hooked(
                self.model.get_submodule(name), after=lambda m, a, k, output, into=caught: into.append(output)
            ):
                self._run(stream, batch)
            yield own(caught[-1])

    def finish(self) -> None:
        """Put the units themselves back. The walk is over."""
        for index, replay in self._replays.items():
            replace_module(self.model, self.plan.units[index].name, replay.original)
        self._replays.clear()

    @torch.no_grad()
    def _catch(self, index: int, stream: str, batch: int, until: str) -> tuple[list[Call], list[Any]]:
        unit = self.plan.units[index]
        calls: list[Call] = []
        outputs: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((own(args), own(kwargs)))  # the unit may write into what it was given
            if until == "input" and len(calls) == unit.calls:
                raise Stop

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs.append(own(output))
            if len(outputs) == unit.calls:
                raise Stop

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
            replay.rewind()
        run(self.model, self.batches[batch])

    def _recall(self, index: int, call: int) -> Any:
        return revived(self._recorded[self._stream][index][self._batch][call])


class _CaughtAgain(Sequence[list[Call]]):
    """Arguments of a unit by batch, from a new run of the model every time one is asked for."""

    def __init__(self, catch: Callable[[int], list[Call]], count: int) -> None:
        self._batches = range(count)
        self._catch = catch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: Any) -> Any:
        return self._catch(self._batches[batch])

    def __iter__(self) -> Iterator[list[Call]]:
        return map(self._catch, self._batches)


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def leaf_inputs(root: nn.Module, leaf: Leaf, calls: list[Call]) -> list[Tensor]:
    """First argument of ``leaf`` at each of its runs while ``root``, a unit, runs on ``calls``."""
    if not leaf.name:
        return [_first(args, kwargs) for args, kwargs in calls]
    caught: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append(_first(args, kwargs).detach().clone())
        if len(caught) % leaf.calls == 0:
            raise Stop

    with hooked(root.get_submodule(leaf.name), before=before):
        run_unit(root, calls)
    return caught


def leaf_outputs(root: nn.Module, name: str, calls: list[Call]) -> list[Any]:
    """What the module called ``name`` inside ``root`` returns at each of its runs while ``root`` runs on ``calls``."""
    caught: list[Any] = []
    with hooked(root.get_submodule(name), after=lambda m, a, k, output: caught.append(own(output))):
        run_unit(root, calls)
    return caught


def run_unit(root: nn.Module, calls: list[Call]) -> list[Any]:
    """Results of ``root`` on copies of ``calls``; None where a hook stopped it."""
    results = []
    for args, kwargs in calls:
        try:
            with own_random_numbers():
                results.append(root(*own(args), **own(kwargs)))
        except Stop:
            results.append(None)
    return results


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
