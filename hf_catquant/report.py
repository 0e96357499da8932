"""The report: what was quantized, what it costs, what it saved, and what was left alone and why."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from .calibrate import Outcome
from .config import CatQuantConfig
from .correction import corrections
from .layers import QuantizedModule
from .model import Selection
from .packed_model import float_parameters, parameter_count, quantized_modules
from .samples import Batches
from .saving import entries_now, notes_of, provenance_now


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: of the module.
        shape: logical (N, K).
        weights, group_size, activations, rotation: its scheme.
        bits: stored bits a weight, scales and offsets included; 0 where the weight is another layer's.
        error: relative squared error of its output on the calibration data, or of its weight without data; None if it
            shares another layer's weight, or an adapter was merged into it since.
        tied_to: that layer, or None.
    """

    name: str
    shape: tuple[int, int]
    weights: str
    group_size: int
    activations: str | None
    rotation: str | None
    bits: float
    error: float | None
    tied_to: str | None


@dataclass(frozen=True)
class Report:
    """What quantizing did to a model. ``print(report)`` shows it as a table; ``to_dict()`` is JSON-clean.

    Attributes:
        parameters: of the float model, tied ones once.
        quantized_parameters: how many of them are stored as codes.
        bits_per_parameter: stored bits a parameter: codes, scales, offsets, float parameters and corrections. Fixed
            tables that are no parameters (batch norm statistics, filter banks) count in the bytes only.
        bytes_before, bytes_after: of the float model in the dtype it was quantized in, and of the stored one.
        layers: the quantized layers, in module order.
        skipped: every weight that stays in float, with the reason.
        corrections: the fit of each correction, by module name.
        notes: anything else that a user should know.
    """

    parameters: int
    quantized_parameters: int
    bits_per_parameter: float
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    corrections: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """Percent of the parameters that are quantized."""
        return 100 * self.quantized_parameters / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the coverage, JSON-clean."""
        return {**asdict(self), "coverage": self.coverage}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Inverse of :meth:`to_dict`; what else ``values`` holds is left out.

        Raises:
            ValueError: a field is missing or of another kind.
        """
        try:
            chosen = {field.name: values[field.name] for field in fields(cls)}
            layers = tuple(LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in chosen.pop("layers"))
            return cls(**{**chosen, "layers": layers, "notes": tuple(chosen["notes"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the report is not one that this version writes: {error}") from error

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'shape':>13}  {'weights':>8}  {'group':>5}  {'bits':>6}  error"]
        for layer in self.layers:
            unknown = "not known" if layer.tied_to is None else f"tied to {layer.tied_to}"
            error = unknown if layer.error is None else f"{layer.error:.5f}"
            inputs = " ".join(filter(None, (layer.rotation and "rotated", layer.activations)))
            inputs = f"  inputs {inputs}" if inputs else ""
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>13}  {layer.weights:>8}  {layer.group_size:>5}  {layer.bits:>6.3f}  "
                f"{error}{inputs}"
            )
        lines += [f"not quantized: {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"correction at {name}: {_correction_line(fit)}" for name, fit in self.corrections.items()]
        lines += [f"note: {note}" for note in self.notes]
        ratio = self.bytes_before / max(1, self.bytes_after)
        lines.append(
            f"{self.coverage:.2f} % of {self.parameters:,} parameters quantized, {self.bits_per_parameter:.3f} bits a "
            f"parameter; {self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.2f} times smaller)"
        )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Coverage, effective bits, bytes, per-layer error, and every skipped weight with its reason.

    Raises:
        ValueError: the model was not quantized by this package.
    """
    modules = quantized_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no layer quantized by hf_catquant: nothing to report")
    config = config_of(model)
    known = provenance_now(config, model) if config is not None else {}
    entries = {} if config is None else entries_now(config, model)
    bytes_after = stored_bytes(model)
    parameters = parameter_count(model)
    quantized = parameters - sum(p.numel() for p in float_parameters(model))
    errors, names = known.get("errors", {}), {name for name, _ in model.named_modules()}
    layers = tuple(_layer(n, m, errors.get(n), entries.get(n, {}).get("tied_to")) for n, m in modules.items())
    return Report(
        parameters=parameters,
        quantized_parameters=quantized,
        bits_per_parameter=8 * parameter_bytes(model) / max(1, parameters),
        bytes_before=known.get("bytes_before", 0),
        bytes_after=bytes_after,
        layers=layers,
        skipped=_skipped(model, known.get("skipped", {})),
        corrections={name: fit for name, fit in known.get("fits", {}).items() if name in names},
        notes=tuple(notes_of(known)),
    )


def _skipped(model: nn.Module, known: dict[str, str]) -> dict[str, str]:
    """What stays in float in this very model: a task's head is not in the checkpoint of its base."""
    present = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    found = {name: reason for name, reason in known.items() if name in present}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1 and name not in found:
            found[name] = "not quantized in the checkpoint that was loaded"
    return found


def config_of(model: nn.Module) -> CatQuantConfig | None:
    """The config that quantizing left on the model, or None."""
    # A part may share its config with the whole, and say there what it was saved as.
    holders = vars(model).get("hf_quantizer"), getattr(model, "config", None), model
    found = next((each for h in holders if (each := getattr(h, "quantization_config", None)) is not None), None)
    return found if isinstance(found, CatQuantConfig) else None


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of ``model`` holds, shared ones once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()  # tables that are computed again
    tensors: dict[tuple[int | str, int], Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in left_out:
            continue
        # Tensors that are offloaded to disk have no address; then the ties that transformers keeps are all there is.
        if not (tensor.is_meta and name in tied):
            tensors[name if tensor.is_meta else tensor.data_ptr(), tensor.nbytes] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all that was learned: codes, scales, offsets, float parameters and corrections, shared ones once."""
    learned: list[Tensor] = [*float_parameters(model)]
    for module in quantized_modules(model).values():
        learned += module.packed_tensors() if module.owner is None else []
    for correction in corrections(model).values():
        learned += list(correction.buffers())
    return sum(tensor.nbytes for tensor in learned)


def provenance(
    config: CatQuantConfig, bytes_before: int, selection: Selection, outcome: Outcome, data: Batches | None
) -> dict[str, Any]:
    """How a model was quantized, for the report and the card; loading never needs it."""
    calibration = None
    if data is not None:
        calibration = {"source": data.source, "num_samples": data.num_samples, "fingerprint": data.fingerprint}
    return {
        "bytes_before": bytes_before,
        "errors": {name: float(f"{error:.6g}") for name, error in outcome.errors.items()},
        "skipped": selection.skipped,
        "fits": outcome.fits,
        "learned": outcome.learned,
        "notes": outcome.notes,
        "calibration": calibration,
        "solver": config.solver,
        "solver_options": config.solver_options,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str | None]:
    """The versions that decide what quantizing gives."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


_LIBRARIES = ("hf-catquant", "torch", "transformers", "scikit-learn")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _layer(name: str, module: QuantizedModule, error: float | None, tied_to: str | None) -> LayerReport:
    size = sum(t.nbytes for t in module.packed_tensors())
    bits = 0.0 if tied_to is not None else 8 * size / (module.rows_ * module.columns)
    scheme = module.scheme
    return LayerReport(
        name,
        (module.rows_, module.columns),
        scheme.weights,
        scheme.group_size,
        scheme.activations,
        scheme.rotation,
        bits,
        error,
        tied_to,
    )


def _correction_line(fit: dict[str, Any]) -> str:
    if not fit.get("clusters"):
        return next((note for note in fit.get("notes", ()) if note.startswith("off")), "off: it would not have helped")
    if fit["gain"] is None:
        return f"{fit['clusters']} clusters, alpha {fit['alpha']}, as asked for: its gain was not measured"
    return (
        f"{fit['clusters']} clusters, alpha {fit['alpha']}, {fit['metric']} {fit['loss_before']:.5f} -> "
        f"{fit['loss_after']:.5f} (cross-validated)"
    )
