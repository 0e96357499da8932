"""Running a model under hooks: stop it anywhere, keep what a module was given, and replay what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stop(Exception):
    """Raised by a hook that has seen enough: the model need not run further."""


class Replay(nn.Module):
    """Stands where a finished unit was and returns its recorded outputs; anything else is asked of the unit itself."""

    def __init__(self, original: nn.Module, recall: Callable[[int], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_recall", recall)
        object.__setattr__(self, "call", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)

    @property
    def original(self) -> nn.Module:
        """The unit itself."""
        return object.__getattribute__(self, "_original")

    def rewind(self) -> None:
        """The next call is the first of a batch."""
        object.__setattr__(self, "call", 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the unit returned at this call of this batch."""
        object.__setattr__(self, "call", self.call + 1)
        return self._recall(self.call - 1)


class Rerun(Replay):
    """Stands where a finished unit was whose outputs are too large to keep: runs the module that is recalled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What that module returns."""
        return self._recall(0)(*args, **kwargs)


@dataclass(frozen=True)
class Forgotten:
    """What is left of a tensor that nobody reads any more."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def forget(tensor: Tensor) -> Forgotten:
    """The shape, dtype and device of ``tensor`` without its values."""
    return Forgotten(tensor.shape, tensor.dtype, tensor.device)


def revive(value: Tensor | Forgotten) -> Tensor:
    """A tensor that the model may use: a copy of a kept one, zeros for a forgotten one."""
    if isinstance(value, Forgotten):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.clone()  # the model may write into what a unit returned


def revived(output: Any) -> Any:
    """``output`` of a unit with every tensor revived."""
    return pytree.tree_map_only((Tensor, Forgotten), revive, output)


def own(tree: Any) -> Any:
    """``tree`` with a copy of every tensor: what the model does to its own does not reach them."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """``model(**batch)`` on a copy of the batch, without a cache of past keys; None if a hook stopped it.

    Raises:
        RuntimeError: the model cannot run on the batch; says what was in it.
    """
    try:
        with without_cache(model), own_random_numbers():
            return model(**own(batch))
    except Stop:
        return None
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        raise RuntimeError(f"{type(model).__name__} cannot run on a batch of {shapes}: {error}") from error


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """The same random numbers in every run, and the global generators as they were.

    A model that draws in its forward (the masks of ViTMAE) has to draw alike in both streams, or they are not comparable.
    """
    # For a device that nothing ran on, torch.manual_seed() takes a traceback every time.
    used = torch.cuda.is_initialized() or torch.xpu.is_initialized() or torch.backends.mps.is_available()
    with torch.random.fork_rng():
        (torch.manual_seed if used else torch.default_generator.manual_seed)(0)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No config of ``model`` or of a model inside asks for past keys: units run many times, and a cache would grow."""
    held = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    asking: list[Any] = [config for config in held.values() if getattr(config, "use_cache", False)]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


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
