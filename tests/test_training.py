"""The training loop keeps the best state by held-out batches, moves no global generator and restores what it touched."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import global_rng_untouched
from hf_catquant.training import BACK_OFF, PATIENCE, WARM_UP, learning, set_apart, train


def regression(noise: float = 0.0, count: int = 8) -> tuple[nn.Parameter, list[tuple[Tensor, Tensor]]]:
    """A weight at zero, and batches of a linear regression."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(6, generator=g)
    xs = [torch.randn(20, 6, generator=g) for _ in range(count)]
    return nn.Parameter(torch.zeros(6)), [(x, x @ truth + noise * torch.randn(20, generator=g)) for x in xs]


def test_learns():
    weight, data = regression()

    def loss_of(batch: int, learns: bool) -> Tensor:
        x, y = data[batch]
        return (x @ weight - y).square().mean()

    seen: list[int] = []
    with global_rng_untouched(), learning([weight]):
        done = train(
            [{"params": [weight], "lr": 0.1}], loss_of, range(6), range(6, 8), 200, 0, lambda s, _: seen.append(s)
        )
    assert done.held_out_after < 0.01 * done.held_out_before
    assert done.after < 0.01 * done.before
    assert seen == [25, 50, 75, 100, 125, 150, 175, 200]
    assert "held-out loss" in done.summary()


def test_a_start_that_is_best_is_kept():
    """What the batches ask for is the opposite of what the held-out ones do."""
    weight, data = regression()
    calls: list[bool] = []

    def loss_of(batch: int, learns: bool) -> Tensor:
        calls.append(learns)
        x, y = data[0]
        return (x @ weight - y).square().mean() if batch == 0 else weight.square().sum()

    with learning([weight]):
        done = train([{"params": [weight], "lr": 0.1}], loss_of, [0], [1], 400, 0)
    assert torch.equal(weight, torch.zeros(6))
    assert done.steps == 0
    assert done.held_out_after == done.held_out_before == 0
    assert done.after == done.before
    assert sum(calls) == PATIENCE * 50 < 400  # a look every 50 steps


def test_after_two_looks_without_a_better_one_it_starts_over_more_slowly():
    weight, data = regression()
    seen: list[Tensor] = []

    def loss_of(batch: int, learns: bool) -> Tensor:
        if learns:
            seen.append(weight.detach().clone())
        x, y = data[0]
        return (x @ weight - y).square().mean() if batch == 0 else weight.square().sum()

    with learning([weight]):
        train([{"params": [weight], "lr": 0.1}], loss_of, [0], [1], 400, 0)
    assert seen[99].abs().max() > 0.1
    assert torch.equal(seen[100], torch.zeros(6))  # step 101, after the looks at 50 and 100
    assert torch.equal(seen[1].abs().round(decimals=4), torch.full((6,), 0.1 / WARM_UP).round(decimals=4))
    first = seen[101].abs()  # Adam, begun again, moves every weight by its rate
    expected = 0.1 * BACK_OFF * 0.5 * (1 + math.cos(math.pi * 101 / 400))
    torch.testing.assert_close(first, torch.full((6,), expected), rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_a_number_ends_it_with_a_warning(caplog):
    weight, _ = regression()
    taken: list[bool] = []

    def loss_of(batch: int, learns: bool) -> Tensor:
        taken.append(learns)
        return weight.sum() * float("nan")

    with learning([weight]):
        done = train([{"params": [weight], "lr": 0.1}], loss_of, [0], [1], 100, 0)
    assert not any(taken)
    assert done.steps == 0
    assert "nothing is learned: the loss is nan before the first step" in caplog.text


class Memory:
    """A draft in memory, of which some writing is the last before the process dies."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.written, self.held = last, 0, None

    def read(self):
        return self.held

    def write(self, tensors, record) -> None:
        self.held = ({name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(record)))
        self.written += 1
        if self.written == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("last", range(1, 7))
def test_gone_on_with_it_ends_in_the_same_bits(last):
    def run(draft: Memory, seen: list[float]) -> tuple[Any, ...]:
        weight, data = regression(count=4)
        scale = nn.Parameter(torch.ones(()))

        def loss_of(batch: int, learns: bool) -> Tensor:
            x, y = data[batch]
            wanted = 0.2 * y if batch == 3 else y  # more is not better for long: it starts over, and ends early
            return (x @ weight * scale - wanted).square().mean()

        groups = [{"params": [weight], "lr": 0.05}, {"params": [scale], "lr": 0.05}]
        with learning([weight, scale]):
            done = train(groups, loss_of, range(3), [3], 160, 3, lambda _, loss: seen.append(loss), draft)
        return done, weight.tolist(), scale.tolist()

    whole, expected, found = Memory(), [], []
    done = run(whole, expected)
    assert whole.written == 6
    assert whole.held[1]["factor"] < BACK_OFF
    draft = Memory(last)
    with pytest.raises(KeyboardInterrupt):
        run(draft, found)
    draft.last = None
    assert run(draft, found) == done
    assert (
        found == expected
    )  # every look, though what went before a return to the best state leaves no trace in the end


def test_a_draft_of_other_parameters_is_refused():
    weight, draft = nn.Parameter(torch.ones(3)), Memory()
    with learning([weight]):
        train([{"params": [weight], "lr": 0.1}], lambda b, _: weight.square().sum(), [0], [], 16, 0, draft=draft)
    assert draft.written
    other = nn.Parameter(torch.ones(2))
    with learning([other]), pytest.raises(ValueError, match="learned other parameters"):
        train([{"params": [other], "lr": 0.1}], lambda b, _: other.square().sum(), [0], [], 16, 0, draft=draft)


def test_a_draft_of_other_batches_is_not_taken():
    """Batches become smaller where memory runs out: other samples are held out then, and losses are no longer the same."""

    def run(batches: range, held_out: list[int], draft: Memory | None) -> tuple[Any, ...]:
        weight, data = regression(count=8)
        with learning([weight]):
            groups = [{"params": [weight], "lr": 0.05}]
            done = train(
                groups,
                lambda b, _: (data[b][0] @ weight - data[b][1]).square().mean(),
                batches,
                held_out,
                80,
                0,
                None,
                draft,
            )
        return done, weight.tolist()

    draft = Memory(3)
    with pytest.raises(KeyboardInterrupt):
        run(range(3), [3], draft)
    draft.last = None
    assert run(range(6), [6, 7], draft) == run(range(6), [6, 7], None)


def test_without_held_out_batches_the_batches_decide():
    weight, data = regression()

    def loss_of(batch: int, learns: bool) -> Tensor:
        x, y = data[batch]
        return (x @ weight - y).square().mean()

    with learning([weight]):
        done = train([{"params": [weight], "lr": 0.1}], loss_of, range(8), [], 100, 0)
    assert done.held_out_before is None
    assert done.after < done.before
    assert done.summary() == f"loss {done.before:.4f} -> {done.after:.4f}"


def test_parameters_are_as_they_were():
    a, b = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    with learning([a, b]):
        assert a.requires_grad
        (a * b).sum().backward()
        assert a.grad is not None
    assert (a.requires_grad, b.requires_grad) == (False, True)
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize(
    ("sizes", "parts", "held_out"),
    [
        ([16] * 9, [16] * 6 + [12, 16, 16, 4], [7, 8, 9]),
        ([16] * 7, [16] * 6 + [2, 14], [7]),
        ([16, 16, 1], [16, 13, 4], [2]),
        ([8, 8, 2], [8, 8, 2], [2]),
        ([16], [14, 2], [1]),
        ([2], [1, 1], [1]),
        ([1, 1], [1, 1], [1]),
    ],
)
def test_some_samples_are_always_kept_from_learning(sizes, parts, held_out):
    rows = list(torch.arange(sum(sizes)).split(sizes))
    given = [{"a": row, "b": row.unsqueeze(1)} for row in rows]
    batches, kept = set_apart(given, 0)
    assert not given
    assert [len(batch["a"]) for batch in batches] == parts
    assert list(kept) == held_out
    for key in ("a", "b"):
        found = torch.cat([batch[key].flatten() for batch in batches])
        assert torch.equal(found.sort().values, torch.arange(sum(sizes)))
    again, _ = set_apart([{"a": row} for row in rows], 0)
    assert all(torch.equal(one["a"], two["a"]) for one, two in zip(batches, again, strict=True))


def test_what_is_kept_is_drawn_from_all_of_sorted_data():
    """Data in folders of classes, and data whose classes take turns."""
    for classes in (torch.arange(10).repeat_interleave(16), torch.arange(4).repeat(40)):
        batches, kept = set_apart([{"a": rows} for rows in classes.split(16)], 0)
        found = torch.cat([batches[index]["a"] for index in kept])
        assert found.unique().equal(classes.unique())
        assert found.bincount().max() <= 2 * len(found) / len(classes.unique())


def test_kept_samples_of_different_lengths_stay_apart():
    batches, kept = set_apart([{"a": torch.zeros(8, length)} for length in (5, 5, 7)], 0)
    assert [tuple(batches[index]["a"].shape) for index in kept] == [(2, 5), (1, 7)]
    assert [tuple(batch["a"].shape) for batch in batches[: kept.start]] == [(8, 5), (6, 5), (7, 7)]
