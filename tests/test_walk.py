"""The walk hands every unit what the whole model hands it, whatever the wiring, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tiny_models
from helpers import slow
from hf_catquant import CatQuantConfig, probe, quantize, walk
from hf_catquant.layers import layer_for
from hf_catquant.log import logger
from hf_catquant.model import stacks
from hf_catquant.replay import Replay, own, run
from hf_catquant.walk import Walk, hooked, leaf_inputs
from toys import TOYS, Deep, Layer, make


def walk_over(model: nn.Module, batches: list[dict[str, Tensor]], watched: Sequence[str] = ()) -> Walk:
    blocks = [block for names in stacks(model).values() for block in names]
    leaves = [name for name, m in model.named_modules() if layer_for(m) is not None or isinstance(m, nn.BatchNorm2d)]
    return Walk(model, batches, blocks, leaves, watched)


@contextmanager
def lines(level: int = logging.INFO) -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    found: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def assert_same(a: Any, b: Any) -> None:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        if isinstance(x, Tensor):
            assert torch.equal(x, y)


def direct_inputs(model: nn.Module, name: str, batch: dict[str, Tensor]) -> list[Any]:
    """Arguments of the module called ``name`` in an ordinary forward of the model."""
    caught: list[Any] = []
    model = copy.deepcopy(model)
    with hooked(model.get_submodule(name), before=lambda m, a, k: caught.append(own((a, k)))):
        model(**batch)
    return caught


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_every_unit_receives_exactly_what_the_model_gives_it(name):
    model, batches = make(name)
    original = copy.deepcopy(model)
    walk = walk_over(model, batches)
    assert walk.plan.units
    for index, unit in enumerate(walk.plan.units):
        calls, outputs = walk.inputs_and_outputs(index, "float")
        for batch, caught in zip(batches, calls, strict=True):
            assert_same(caught, direct_inputs(original, unit.name, batch))
            assert len(caught) == unit.calls
        assert_same(walk.inputs(index, "float"), calls)  # what units write in place does not reach the recordings
        walk.record(index, {"float": outputs, "quantized": outputs})
    walk.finish()
    assert not any(isinstance(m, Replay) for m in model.modules())
    assert_same(model(**batches[0]), original(**batches[0]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "cnn", "towers", "deep", "t5", "albert", "shared"])
def test_the_quantized_stream_carries_the_change_of_earlier_units(name):
    model, batches = make(name)
    walk = walk_over(model, batches)
    changed: nn.Module | None = None
    for index, unit in enumerate(walk.plan.units):
        _, float_outputs = walk.inputs_and_outputs(index, "float")
        calls = walk.inputs(index, "quantized")
        if changed is not None:
            assert_same(calls[0], direct_inputs(changed, unit.name, batches[0]))
        if index == 0:
            for parameter in model.get_submodule(unit.name).parameters():
                parameter.mul_(0.9)
            changed = make(name)[0]
            changed.get_submodule(unit.name).load_state_dict(model.get_submodule(unit.name).state_dict())
        outputs = walk.inputs_and_outputs(index, "quantized")[1]
        walk.record(index, {"float": float_outputs, "quantized": outputs})
    walk.finish()


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_what_watched_modules_return_in_float_can_be_asked_for_at_the_end(name):
    model, batches = make(name)
    original = copy.deepcopy(model)
    last = [last_outputs(original, batch) for batch in batches]
    units = [unit.name for unit in walk_over(model, batches).plan.units]
    watched = [name for name in last[0] if name and not name.startswith(tuple(f"{unit}." for unit in units))]
    assert set(units) <= set(watched)
    walk = walk_over(model, batches, watched)
    for index in range(len(units)):
        outputs = walk.outputs(index, "float")
        other = pytree.tree_map_only(Tensor, torch.zeros_like, outputs)
        walk.record(index, {"float": outputs, "quantized": other})
    for name in watched:
        assert_same(list(walk.outputs_of(name, "float", range(len(batches)))), [found[name] for found in last])


def last_outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What every module returns at its last call in an ordinary forward."""
    found: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(hooked(module, after=lambda m, a, k, out, name=name: found.update({name: own(out)})))
        run(model, batch)
    return found


def test_units_come_in_the_order_they_run():
    model, batches = make("towers")
    plan = walk_over(model, batches).plan
    assert [unit.name for unit in plan.units] == ["vision.0", "vision.1", "text.0", "text.1", "join"]
    reads = [unit.reads for unit in plan.units]
    assert reads == [set(), {0}, set(), {2}, {1, 3}]
    assert plan.units[4].calls == 2
    assert plan.final_reads == {4}


def test_a_residual_cnn_is_read_block_by_block():
    model, batches = make("cnn")
    plan = walk_over(model, batches).plan
    assert [unit.name for unit in plan.units] == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert [leaf.name for leaf in plan.units[1].leaves] == ["conv1", "norm1", "conv2", "norm2"]
    assert [unit.reads for unit in plan.units] == [set(), {0}, {1}, {2}, {3}]
    assert plan.logits_site == "head"


def test_an_encoder_decoder_reads_the_encoder_from_every_decoder_block():
    model, batches = make("t5")
    plan = walk_over(model, batches).plan
    index = {unit.name: i for i, unit in enumerate(plan.units)}
    last_encoder = index["encoder.block.1"]
    for block in ("decoder.block.0", "decoder.block.1"):
        assert last_encoder in plan.units[index[block]].reads
    assert plan.logits_site == "lm_head"


def test_a_shared_block_is_one_unit_that_runs_often():
    model, batches = make("albert")
    plan = walk_over(model, batches).plan
    assert max(unit.calls for unit in plan.units) == 3


@torch.no_grad()
def test_a_module_at_two_names_is_replaced_at_both():
    model, batches = make("shared")
    walk = walk_over(model, batches)
    outputs = walk.inputs_and_outputs(0, "float")[1]
    walk.record(0, {"float": outputs, "quantized": outputs})
    assert model.first is model.second
    assert isinstance(model.second, Replay)
    walk.finish()
    assert isinstance(model.second, nn.Linear)


def test_detached_hidden_states_are_noticed_and_all_kept():
    model, batches = make("detached")
    with lines() as found:
        plan = walk_over(model, batches).plan
    assert found == ["Detached hides which of its blocks read which: all hidden states are kept in memory"]
    assert [unit.reads for unit in plan.units] == [set(range(i)) for i in range(4)]


def test_a_last_hidden_state_that_is_detached_is_noticed_too():
    class Cut(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach() * 2

    with lines() as found, torch.no_grad():
        plan = walk_over(Cut(3).eval(), [{"x": torch.randn(4, 6)}]).plan
    assert len(found) == 1
    assert plan.final_reads == {0, 1, 2}


@pytest.mark.parametrize("name", [name for name in TOYS if name != "detached"])
def test_no_other_model_is_taken_for_one_that_detaches(name):
    model, batches = make(name)
    with lines() as found:
        walk_over(model, batches)
    assert found == []


@torch.no_grad()
def test_hidden_states_are_released_as_soon_as_nobody_reads_them():
    model, batches = make("deep")
    walk = walk_over(model, batches)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    for index in range(len(walk.plan.units)):
        outputs = walk.inputs_and_outputs(index, "float")[1]
        alive += [weakref.ref(tensor) for tensor in pytree.tree_leaves(outputs)]
        walk.record(index, {"float": outputs, "quantized": outputs})
        del outputs
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 8 * len(batches)
    assert most <= 2 * len(batches)  # what the next unit reads, and what it just returned


def test_what_finding_the_plan_took_is_freed_at_once():
    """The graph of the probe holds a block's weights, and the garbage collector may not come by for long."""
    model, batches = make("deep")
    gc.collect()
    gc.disable()
    try:
        walk_over(model, batches)
        left = [thing for thing in gc.get_objects() if type(thing) in (probe._Probe, Replay)]
    finally:
        gc.enable()
    assert left == []


@torch.no_grad()
def test_a_unit_that_runs_another_number_of_times_is_named():
    class Fickle(Deep):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[: 3 if len(x) == 4 else 2]:
                x = block(x)
            return x

    # The plan is made on two rows: three blocks never run then.
    walk = walk_over(Fickle(3).eval(), [{"x": torch.randn(2, 6)}])
    assert [unit.name for unit in walk.plan.units] == ["blocks.0", "blocks.1"]

    class Skipping(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) if float(x[0, 0]) > 0 else self.blocks[1](x)

    batches = [{"x": torch.ones(4, 6)}, {"x": -torch.ones(4, 6)}]
    walk = walk_over(Skipping(2).eval(), batches)
    with pytest.raises(RuntimeError, match=r"blocks\.0 ran 0 times on batch 1 but 1 times on the first"):
        walk.inputs_and_outputs(0, "float")


@torch.no_grad()
def test_a_model_that_cannot_run_says_on_what():
    model, _ = make("mlp")
    with pytest.raises(RuntimeError, match=r"Mlp cannot run on a batch of \{'x': \(2, 13\)\}"):
        walk_over(model, [{"x": torch.randn(4, 13)}])
    assert not any(isinstance(m, Replay) for m in model.modules())


@torch.no_grad()
def test_leaf_inputs_do_not_see_later_writes():
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            x.zero_()
            return self.two(y)

    unit = Writer()
    walk = walk_over(nn.Sequential(unit, Writer()), [{"input": torch.ones(2, 4)}])
    leaf = walk.plan.units[0].leaves[0]
    calls = walk.inputs(0, "float")[0]
    for _ in range(2):  # the recorded inputs are as they were, however often they are used
        assert torch.equal(leaf_inputs(unit, leaf, calls)[0], torch.ones(2, 4))


def test_layers_that_read_one_tensor_share_a_source():
    class Attention(Layer):
        def __init__(self) -> None:
            super().__init__(6)
            self.other = nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x) * self.other(x))

    model = nn.Sequential(Attention(), Attention()).eval()
    leaves = walk_over(model, [{"input": torch.randn(4, 6)}]).plan.units[0].leaves
    assert [leaf.name for leaf in leaves] == ["up", "other", "down"]
    assert leaves[0].source == leaves[1].source != leaves[2].source


@pytest.mark.parametrize("solver", ["gptq", "reconstruct"])
@pytest.mark.parametrize("arch", [*slow("resnet"), "llama_tied"])
def test_arguments_and_answers_too_large_to_keep_are_computed_again(arch, solver, monkeypatch):
    options = {"block_steps": 3, "model_steps": 2} if solver == "reconstruct" else None
    config = {"batch_size": 4, "solver": solver, "solver_options": options, "activations": "int4"}
    states = []
    for kept in (walk.KEPT_BYTES, 0):
        monkeypatch.setattr(walk, "KEPT_BYTES", kept)
        model = tiny_models.build(arch)
        quantize(model, CatQuantConfig(dataset=tiny_models.samples(arch, 16, seed=0), **config))
        states.append(model.state_dict())
    assert_same(states[0], states[1])
    assert states[0].keys() == states[1].keys()
