"""A LoRA adapter of PEFT beside a packed linear layer.

A merged adapter becomes the float16 product that a packed layer can add to its weight (``low_rank_out`` times
``low_rank_in``): nothing is rounded to codes again.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers.linear import QuantizedLinear
from .lora_merge import merge_refusal, product_of

INITS = (True, False, "gaussian", "orthogonal")  # those that leave the weight of the layer alone


class LoraOnQuantized(Linear):
    """A LoRA adapter beside a packed linear layer, as PEFT's own beside a float one.

    Raises:
        ValueError: the adapter is of a kind that reads or changes the float weight (DoRA, PiSSA, LoftQ and others).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        config.fan_in_fan_out = False  # the matrix of a packed layer is (N, K), that of a Conv1D too
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before_merge: Any = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.columns, layer.rows_

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add one more adapter, the first one, too."""
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of the layer, which is packed: use "
                f"one of {', '.join(map(repr, INITS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """None: only plain LoRA does without the float weight."""
        variant = super().resolve_lora_variant(**kwargs)
        if variant is not None:
            raise ValueError(
                f"{type(variant).__name__} reads the float weight of the layer, which is packed: use plain LoRA"
            )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the float weight, where the layer was dequantized: (N, K), of a ``Conv1D`` (K, N)."""
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        return super().get_delta_weight(adapter)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the float16 product of the packed layer; where that was dequantized since, to its weight.

        Args:
            safe_merge: changes nothing: what is not finite is refused in any case.
            adapter_names: of the adapters; None: those that are active.

        Raises:
            ValueError: an adapter is not finite or too large for float16, or has a bias, or the layer carries a correction
                or shares its weight with another.
        """
        reason = merge_refusal(self, adapter_names)
        if reason is not None:
            raise ValueError(reason)
        layer: Any = self.get_base_layer()
        if not isinstance(layer, QuantizedLinear):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if self._before_merge is None:
                self._before_merge = (layer.scheme, layer.low_rank_out, layer.low_rank_in)
            layer.add_product(*product_of(self, name))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the product of the layer back as it was.

        Raises:
            ValueError: the layer was dequantized since.
        """
        layer: Any = self.get_base_layer()
        if not isinstance(layer, QuantizedLinear):
            if self._before_merge is not None:
                raise ValueError(
                    f"{', '.join(self.merged_adapters)} was merged into a packed layer, which has been dequantized since: "
                    "it is part of the float weight now"
                )
            super().unmerge()
            return
        if self._before_merge is not None:
            layer.scheme, layer.low_rank_out, layer.low_rank_in = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()
