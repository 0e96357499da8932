"""CatQuantConfig: what a user asks for, and what a checkpoint stores.

The two halves never mix: the request (format, solver, data) is what ``from_pretrained`` takes; the stored half
(``modules``, ``corrections``, ``format_version``) is written by quantizing and is all that loading needs. How the codes
were found is kept as ``provenance`` and is never needed to load. Data and processors never reach JSON.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from . import solvers
from .correction import CatConfig
from .entries import check_checksums, check_corrections, check_modules
from .formats import FORMATS, get_format
from .layers import Scheme
from .request_checks import (
    OVERRIDABLE,
    check_budget,
    check_choice,
    check_count,
    check_names,
    check_overrides,
    check_seed,
)

QUANT_METHOD = "catquant"
FORMAT_VERSION = 1
_RUNTIME = ("dataset", "processor")
_COARSE_WEIGHTS, _COARSE_INPUTS = 8, 16  # levels


class CatQuantConfig(QuantizationConfigMixin):
    """How to quantize a model, and how a quantized one is stored.

    Args:
        weights: format of the weights: binary, ternary, ternary_symmetric (no offsets), int2, int3, int4 or int8.
        group_size: columns that share a scale, a positive multiple of 8, or -1 for one group a row.
        activations: None, or the format of the inputs: int2, int3, int4 or int8. Linears find a range for every token;
            convolutions calibrate one.
        solver: how codes are found: "rtn" needs no data; "gptq" needs ``dataset``; "reconstruct" starts from "gptq" and
            learns block after block, then the whole model.
        solver_options: ``{option: value}`` of the solver, see ``hf_catquant.solvers.reconstruct.Options``.
        correction: None, "cat" or a :class:`CatConfig`: the output correction, fitted on ``dataset``.
        dataset: calibration samples: a ``datasets.Dataset`` or ``IterableDataset``, a DataLoader, a list of dicts or of
            raw samples, or any iterable. Test data does not belong here.
        processor: tokenizer, image processor or feature extractor, for raw samples.
        num_samples: how many samples to take.
        batch_size: samples in one forward.
        seed: of the choice of samples and rows, and of all that is random in solvers; a correction has its own
            (``CatConfig.seed``).
        edge_weights: format of the layers outside the repeated blocks (embeddings, stem, pooler, head), which low bits
            hurt most; None: the same as ``weights``. Never fewer bits than ``weights``.
        modules_to_not_convert: names of modules to leave in float with all that they hold, matched as transformers does.
        overrides: ``{regex: {field: value}}`` with fields weights, group_size, activations, low_rank, rotation; the
            expression is searched in the module's name, later entries win.
        strict: raise if any layer with a weight would be skipped.
        low_rank: rank r of a float16 product (N, r) times (r, K) that is added to every weight inside the repeated blocks;
            it costs 16 r (N + K) bits. A layer of fewer rows or columns takes as many as it has. Without repeated blocks the
            first and the last layer count as outside. Notes of the report say how many layers go without.
        rotation: "hadamard": linears inside the repeated blocks rotate their input, which spreads outliers over many weights
            and activations; None: they do not; "auto": where the weight has at most 8 levels or the input at most 16; where
            inputs are not rounded, unless calibration finds that the layer's output is nearer to float without it.
        average_bits: None, or how many bits a weight inside the repeated blocks may take on average, scales and offsets
            included: layers that matter most get wider formats than ``weights``.
        target_bytes: the same for all tensors of the quantized model together, a share for the correction included; one of
            these two at most.

    Raises:
        ValueError, TypeError: a value breaks its rule, or a field is unknown.
    """

    def __init__(
        self,
        weights: str = "ternary",
        group_size: int = 128,
        activations: str | None = None,
        solver: str = "gptq",
        correction: str | dict[str, Any] | CatConfig | None = "cat",
        dataset: Any = None,
        processor: Any = None,
        num_samples: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        edge_weights: str | None = "int8",
        modules_to_not_convert: list[str] | None = None,
        overrides: dict[str, dict[str, Any]] | None = None,
        strict: bool = False,
        solver_options: dict[str, Any] | None = None,
        low_rank: int = 0,
        rotation: str | None = "auto",
        average_bits: float | None = None,
        target_bytes: int | None = None,
        *,
        quant_method: str = QUANT_METHOD,
        bits: int | None = None,
        format_version: int = FORMAT_VERSION,
        modules: dict[str, dict[str, Any]] | None = None,
        corrections: dict[str, dict[str, Any]] | None = None,
        checksums: dict[str, int] | None = None,
        entries_checksum: int = 0,
        provenance: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(n for n in CatQuantConfig.__init__.__annotations__ if n not in ("return", "unknown"))
            raise ValueError(f"CatQuantConfig has no field {', '.join(map(repr, unknown))}; its fields are {known}")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {quant_method!r}")
        self.quant_method: Any = QUANT_METHOD
        self.format_version = format_version
        self.weights = weights
        self.group_size = group_size
        self.activations = activations
        self.edge_weights = edge_weights
        self.low_rank = low_rank
        self.rotation = rotation
        self.average_bits = average_bits
        self.target_bytes = target_bytes
        self.solver = solver
        self.solver_options = {} if solver_options is None else solver_options
        self.correction = CatConfig.of(correction)
        self.dataset = dataset
        self.processor = processor
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.modules_to_not_convert = modules_to_not_convert
        self.overrides = {} if overrides is None else overrides
        self.strict = strict
        self.modules = modules
        self.corrections = {} if corrections is None else corrections
        self.checksums = {} if checksums is None else checksums
        self.entries_checksum = entries_checksum
        self.provenance = provenance or {}
        self._check()

    @property
    def bits(self) -> int:
        """Storage bits of a weight, rounded up: what the Hub's pages show."""
        return get_format(self.weights).bits

    def scheme_for(self, name: str, edge: bool) -> Scheme:
        """Format, group size and activations of the layer called ``name``; ``edge``: it is outside the blocks."""
        fields = self._fields(name, edge)
        if fields["rotation"] == "auto":
            fields["rotation"] = "hadamard" if is_coarse(fields["weights"], fields["activations"]) else None
        return Scheme(**fields)

    def rotates_by_rule(self, name: str, edge: bool) -> bool:
        """Whether the formats of the layer called ``name`` say if it rotates, and data where its inputs are not rounded."""
        return self._fields(name, edge)["rotation"] == "auto"

    def asked(self, option: str, name: str) -> Any:
        """What is asked of the layer called ``name`` if it does not matter where it lies."""
        return self._fields(name, edge=False)[option]

    def _fields(self, name: str, edge: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {f: getattr(self, f) for f in OVERRIDABLE}
        if edge:
            fields.update(low_rank=0, rotation=None)
        if edge and self.edge_weights is not None:
            fields["weights"] = _wider(self.weights, self.edge_weights)
            if self.activations is not None:
                fields["activations"] = _wider(self.activations, "int8")
        for pattern, values in self.overrides.items():
            if re.search(pattern, name):
                fields.update(values)
        return fields

    @property
    def budget(self) -> str | None:
        """The field that says how much mixed formats may take, None if formats are not mixed."""
        return next((name for name in ("average_bits", "target_bytes") if getattr(self, name) is not None), None)

    def leaves_free(self, name: str, edge: bool) -> bool:
        """Whether a budget may choose the format of the layer called ``name``."""
        set_by_hand = any("weights" in v and re.search(pattern, name) for pattern, v in self.overrides.items())
        return not edge and not set_by_hand

    def needs_data(self) -> list[str]:
        """The settings that cannot work without a dataset, in words."""
        reasons = []
        if solvers.get(self.solver).NEEDS_MOMENTS:
            reasons.append(f'solver="{self.solver}"')
        if self.correction is not None:
            reasons.append("correction")
        if self.budget is not None:
            reasons.append(self.budget)
        return reasons

    def check_data(self) -> None:
        """Refuse a request that needs a dataset and has none.

        Raises:
            ValueError: naming what needs it and the way out.
        """
        reasons = self.needs_data()
        if reasons and self.dataset is None:
            raise ValueError(
                f"{' and '.join(reasons)} need{'s' if len(reasons) == 1 else ''} calibration data, but dataset is None: "
                'pass dataset=samples, or solver="rtn" with correction=None, which need none'
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean fields; dataset and processor stay behind."""
        fields = {k: v for k, v in self.__dict__.items() if k not in _RUNTIME}
        fields["correction"] = None if self.correction is None else self.correction.to_dict()
        return copy.deepcopy({"quant_method": self.quant_method, "bits": self.bits, **fields})

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: a checkpoint says everything, defaults change."""
        return self.to_dict()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> CatQuantConfig | tuple[CatQuantConfig, dict[str, Any]]:
        """Build from stored fields; fields that this version does not know raise.

        Raises:
            ValueError: an unknown field or ``format_version``.
        """
        config_dict = dict(config_dict)
        check_format_version(config_dict.get("format_version", FORMAT_VERSION))
        own = {k: kwargs.pop(k) for k in list(kwargs) if k in ("dataset", "processor")}
        config = cls(**config_dict, **own)
        return (config, kwargs) if return_unused_kwargs else config

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> CatQuantConfig:
        # transformers copies the config several times; data sets and generators are passed on, never copied.
        new = object.__new__(type(self))
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in _RUNTIME else copy.deepcopy(value, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {k: (None if k in _RUNTIME else v) for k, v in self.__dict__.items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CatQuantConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = {k: v for k, v in self.to_dict().items() if k not in ("modules", "checksums", "provenance")}
        fields["modules"] = None if self.modules is None else f"{len(self.modules)} modules"
        return f"CatQuantConfig {json.dumps(fields, indent=2)}"

    def _check(self) -> None:
        check_format_version(self.format_version)
        for name, check in OVERRIDABLE.items():
            check(name, getattr(self, name))
        if self.edge_weights is not None:
            check_choice("edge_weights", self.edge_weights, FORMATS, "None or ")
        if not isinstance(self.solver_options, dict):
            raise TypeError(f"solver_options must be {{option: value}}, got {self.solver_options!r}")
        if self.modules is None:  # a stored config only remembers its solver, it does not need it
            check_choice("solver", self.solver, solvers.names())
            solvers.options(self.solver, self.solver_options)
        else:
            check_modules(self.modules)
        check_corrections(self.corrections)
        check_checksums(self.checksums, self.entries_checksum)
        check_count("num_samples", self.num_samples, 2)
        check_count("batch_size", self.batch_size, 1)
        check_seed("seed", self.seed)
        check_budget(self.average_bits, self.target_bytes)
        check_names(self.modules_to_not_convert)
        check_overrides(self.overrides)
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be True or False, got {self.strict!r}")


def check_format_version(version: Any) -> None:
    """Refuse a stored format that this version cannot read.

    Raises:
        ValueError: naming both versions and the way out.
    """
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {version!r}: "
            "the checkpoint was written by another version of hf_catquant; install a version that reads it"
        )


def is_coarse(weights: str, activations: str | None) -> bool:
    """Whether so few levels are left that outliers decide how well they fit: what was measured to gain from a rotation."""
    return get_format(weights).radix <= _COARSE_WEIGHTS or (
        activations is not None and get_format(activations).radix <= _COARSE_INPUTS
    )


def _wider(first: str, second: str) -> str:
    return max(first, second, key=lambda name: get_format(name).storage_bits)
