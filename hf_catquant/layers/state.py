"""State dicts of quantized layers, and layers that hold the weight of another one.

A scheme is no tensor: two layers can have the same tensors and stand for other weights. So a state dict carries the scheme
where torch keeps versions, in its ``_metadata``, and a load compares the two. ``torch.save`` keeps it. A dict that was made
of a state dict, and a safetensors file, has lost it: there only dtypes and shapes are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..kernels import cuda, layout

if TYPE_CHECKING:
    from .base import Scheme

SHARED = ("weight_packed", "weight_scale", "weight_offset", "low_rank_out", "low_rank_in")
_KEY = "catquant_scheme"  # in the metadata of a layer
_WAY_OUT = (
    "load it into a model that was quantized in the same way, or use save_pretrained and from_pretrained, which builds the "
    "layers that were saved"
)


class PackedState(nn.Module):
    """The buffers of a quantized layer: whose they are, and what a state dict of them holds and refuses.

    ``load_state_dict`` refuses the state of a layer in another scheme, as far as that shows: a state dict knows its schemes,
    also after ``torch.save``; of tensors in a plain dict or a safetensors file only dtypes and shapes can be told, and a
    rotation, an activation format or some group sizes are in neither.
    """

    scheme: Scheme
    weight_packed: Tensor
    owner: PackedState | None = None  # the layer whose packed weight this one shares, and which alone is saved
    sharers: tuple[PackedState, ...] = ()  # the layers that share this one's packed weight

    @property
    def is_shared(self) -> bool:
        """Whether other layers share its packed weight."""
        return bool(self.sharers)

    def share(self, owner: nn.Module) -> None:
        """Hold the very buffers of ``owner``, which alone are saved, also after they are moved or loaded anew.

        Raises:
            TypeError: it is no quantized layer, but something that only answers for one.
        """
        if not isinstance(owner, PackedState):
            raise TypeError(f"a {type(owner).__name__} is no quantized layer: its weight cannot be shared")
        for buffer in SHARED:
            setattr(self, buffer, getattr(owner, buffer))
            self._non_persistent_buffers_set.add(buffer)
        self.scheme = owner.scheme
        if self not in owner.sharers:
            owner.sharers = (*owner.sharers, self)
        self.__dict__["owner"] = owner  # past nn.Module, which would make it a child

    def stop_sharing(self) -> None:
        """Hold the weight of the owner for itself: it is saved with this layer then."""
        if self.owner is not None:
            self.owner.sharers = tuple(layer for layer in self.owner.sharers if layer is not self)
            del self.__dict__["owner"]
            self._non_persistent_buffers_set.difference_update(SHARED)

    def reunite(self) -> None:
        """After a move: let what shared a weight before hold the very same buffers again, where it is on one device."""
        for sharer in self.sharers if self.owner is None else (self,):
            sharer._follow()

    def _follow(self, copy: bool = False) -> None:
        """Hold the very buffers of the owner, if both are on one device; with ``copy`` their values on another one, and
        the very buffers where this layer had none yet.
        """
        assert self.owner is not None
        for name in SHARED:
            here, there = self._buffers[name], self.owner._buffers[name]
            empty = (
                copy and here is not None and here.is_meta and not hasattr(self, "_hf_hook")
            )  # or offloaded to disk
            if here is None or there is None or here.device == there.device or empty:
                self._buffers[name] = there
            elif copy and not here.is_meta and not there.is_meta:
                self._buffers[name] = there.to(here.device, copy=True)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_KEY] = asdict(self.scheme)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = self._differences(state_dict, prefix, local_metadata)
        if wrong:
            error_msgs += wrong
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if any(prefix + name in state_dict for name in self._buffers):
            self._loaded()

    def _differences(self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> list[str]:
        """What shows that a state dict is of a layer in another scheme, one line each; nothing if this is not in it."""
        name = prefix[:-1] or type(self).__name__
        scheme, found = metadata.get(_KEY), []
        if scheme is not None:
            here = asdict(self.scheme)
            other = [field for field in sorted({*here, *scheme}) if here.get(field) != scheme.get(field)]
            found += [
                f"{name}: {field} is {scheme.get(field)!r} in the state dict, {here.get(field)!r} here"
                for field in other
            ]
        for buffer, held in self._buffers.items():
            if found or held is None or buffer in self._non_persistent_buffers_set:
                continue
            given = state_dict.get(prefix + buffer)
            if isinstance(given, Tensor) and given.dtype != held.dtype:
                found.append(f"{name}.{buffer} is {given.dtype} in the state dict, {held.dtype} here")
        return [f"{found[0]}: {_WAY_OUT}", *found[1:]] if found else []

    def _loaded(self) -> None:
        """After tensors were written into this layer: kernels read them anew, and layers that share its weight have it.

        Writing to an inference tensor is not counted by torch, so that kernels could not know.
        """
        if self.weight_packed.is_cpu:
            layout.forget(self.weight_packed)
        cuda.layouts.doubt(self.weight_packed)
        for sharer in self.sharers:
            sharer._follow(copy=True)
