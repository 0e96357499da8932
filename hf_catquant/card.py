"""The model card of a quantized folder, made from its files: config.json, report.json, evaluation.json, the weights.

Nothing on it is typed by hand: what was measured is shown with its rows and interval, what was not is said to be missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_making import calibration, cell, request, versions
from .card_usage import task_of, usage
from .checkpoint import read_object, weight_files
from .config import QUANT_METHOD, CatQuantConfig
from .entries import broken_seals, is_sealed
from .evaluation_table import Evaluation
from .hub_id import check_id
from .identity import EVALUATION, REPORT, checked_evaluation, checked_report, recorded_files
from .integrity import read_header, sha256
from .report import Report
from .report_checks import check_report
from .saving import merges_of
from .verify import stored_config

TEMPLATE = Path(__file__).with_name("card_template.md")
RELATIONS = ("quantized", "finetune")
_WORST = 5  # layers of the table of errors


def model_card(
    folder: str | Path,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    *,
    relation: str = RELATIONS[0],
    origin: str | None = None,
) -> ModelCard:
    """The card of the quantized model in ``folder``.

    Args:
        folder: as ``save_pretrained`` wrote it, with ``report.json`` and, if it was evaluated, ``evaluation.json``.
        repo: Hub id that the folder is pushed to.
        base_model: Hub id of the float model; None: what ``report.json`` says, if that is an id.
        license: Hub word for the licence of the weights, which is that of the base model.
        relation: "quantized" if the base model is the float model, "finetune" if the float model was fine-tuned from it. A
            model into which adapters were merged is always a "finetune".
        origin: a sentence that says where the float model comes from, where its id does not.

    Raises:
        ValueError: the folder holds no model quantized by this package, a file is missing, has other fields or speaks of
            another checkpoint, or ``base_model`` is no Hub id or ``relation`` no relation.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation must be one of {', '.join(RELATIONS)}, got {relation!r}")
    folder = Path(folder)
    config = read_object(folder / "config.json")
    quantization = stored_config(config, folder)
    raw = read_object(folder / REPORT)
    report = checked_report(folder / REPORT, raw, quantization)
    broken = broken_seals(config["quantization_config"])
    if broken:
        raise ValueError(f"{folder / 'config.json'}: {'; '.join(broken)}")
    headers = {name: stored for path in weight_files(folder) for name, stored in read_header(path).items()}
    check_report(folder / REPORT, report, quantization, headers)
    base, merges = _base_model(base_model, raw.get("model")), merges_of(quantization.provenance)
    relation = relation if merges is None else RELATIONS[1]
    raw_table = read_object(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    table = None if raw_table is None else checked_evaluation(folder / EVALUATION, raw_table, quantization)
    data = None if raw_table is None else str(raw_table.get("dataset", "unnamed rows"))
    architecture = (config.get("architectures") or ["A model"])[0]
    task = task_of(architecture)
    # A base model that is not quite the float model does not lend it its name.
    named = base if relation == RELATIONS[0] and origin is None else None
    title = f"{(named or str(raw.get('model') or folder.name)).rstrip('/').split('/')[-1]}, {quantization.weights}"
    return ModelCard.from_template(
        _metadata(quantization, merges, title, (base, relation), license, task, table, data),
        template_path=str(TEMPLATE),
        title=title,
        architecture=architecture,
        base=None if base is None else _base_link(base, relation),
        origin=None if origin is None else cell(origin),
        weights=quantization.weights,
        repo=repo or folder.name,
        bits=f"{report.bits_per_parameter:.2f}",
        size_before=_megabytes(report.bytes_before) + _dtype(config),
        size_after=_megabytes(report.bytes_after),
        usage=usage(folder, config, task, repo or folder.name),
        merges=merges,
        calibrated=isinstance(quantization.provenance.get("calibration"), dict),
        beside=sorted(recorded_files(folder, quantization) or {}),
        evaluation=None if table is None else table.to_markdown(),
        evaluation_note=f"Measured by `catquant eval` on the rows of `{data}`.{_size_note(table, report)}"
        + (" What was evaluated is the model after the fine-tuning." if merges else ""),
        plots=[name for name in ("accuracy", "errors") if (folder / f"{name}.png").is_file()],
        stored=_stored(quantization, report, _dtype(config)),
        skipped=[(name, cell(reason)) for name, reason in report.skipped.items()],
        worst=_worst(report),
        corrections=[f"`{name}`: {cell(_correction(fit))}" for name, fit in report.corrections.items()],
        command=raw.get("command"),
        request=request(quantization),
        calibration=calibration(quantization),
        versions=versions(quantization),
        files=files_of(folder),
        limits=_limits(quantization, table, report),
    )


def files_of(folder: Path) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of the files that hold the model: config.json and the weights."""
    paths = (folder / "config.json", *weight_files(folder))
    return [{"name": p.name, "bytes": f"{p.stat().st_size:,}", "sha256": sha256(p)} for p in paths]


def _base_model(asked: str | None, reported: Any) -> str | None:
    if asked is not None:
        check_id("base_model", asked)
        return asked
    try:
        check_id("model", reported)
    except ValueError:
        return None
    return str(reported)


def _base_link(base: str, relation: str) -> str:
    link = f"[{base}](https://huggingface.co/{base})"
    return link if relation == RELATIONS[0] else f"a fine-tune of {link}"


def _metadata(
    config: CatQuantConfig,
    merges: str | None,
    title: str,
    base: tuple[str | None, str],
    license: str | None,
    task: str | None,
    table: Evaluation | None,
    dataset: str | None,
) -> ModelCardData:
    more: dict[str, Any] = {} if base[0] is None else {"base_model": base[0], "base_model_relation": base[1]}
    results = []
    for row in table.rows if table is not None else ():
        percent = table is not None and table.metric == "accuracy"
        results.append(
            EvalResult(
                task_type=task or "other",
                dataset_type=_slug(dataset or ""),
                dataset_name=f"{dataset} ({table.n if table is not None else 0} rows)",
                metric_type=table.metric if table is not None else "",
                metric_value=round(row.metric / 100, 4) if percent else round(row.metric, 3),
                metric_name=f"{row.name}, 95 % interval {row.low:.2f} to {row.high:.2f}{' %' if percent else ''}",
                verified=False,
            )
        )
    if results:
        more |= {"model_name": title, "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        license=license,
        pipeline_tag=task,
        tags=[QUANT_METHOD, "quantized", *([] if merges else ["post-training-quantization"]), config.weights],
        **more,
    )


def _dtype(config: dict[str, Any]) -> str:
    """That of the float model as it was quantized: the file that it came in may have another."""
    dtype = config.get("dtype")
    return f" in {dtype}" if isinstance(dtype, str) else ""


def _stored(config: CatQuantConfig, report: Report, dtype: str) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for layer in report.layers:
        counts[layer.weights] = counts.get(layer.weights, 0) + 1
    ratio = report.bytes_before / max(1, report.bytes_after)
    return [
        ("parameters quantized", f"{report.coverage:.2f} % of {report.parameters:,}"),
        ("bits a parameter, everything included", f"{report.bits_per_parameter:.3f}"),
        ("bytes", f"{report.bytes_after:,}, {ratio:.2f} times less than {report.bytes_before:,}{dtype}"),
        ("layers", ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("columns that share a scale", "whole rows" if config.group_size == -1 else str(config.group_size)),
        ("inputs", config.activations or "float"),
        ("format version", str(config.format_version)),
    ]


def _worst(report: Report) -> list[dict[str, str]]:
    layers = sorted((la for la in report.layers if la.error is not None), key=lambda la: -(la.error or 0))[:_WORST]
    return [
        {"name": la.name, "weights": la.weights, "bits": f"{la.bits:.3f}", "error": f"{la.error:.4f}"} for la in layers
    ]


def _correction(fit: dict[str, Any]) -> str:
    if not fit.get("clusters"):
        return "off, by cross-validation it would not have helped"
    if fit["gain"] is None:
        return f"{fit['clusters']} clusters, alpha {fit['alpha']}, as asked for; its gain was not measured"
    gain = f"{fit['gain']:.4f} [{fit['gain_low']:.4f}, {fit['gain_high']:.4f}]"
    return f"{fit['clusters']} clusters, alpha {fit['alpha']}; held-out {fit['metric']} lower by {gain}"


def _limits(config: CatQuantConfig, table: Evaluation | None, report: Report) -> list[str]:
    """What a reader should not conclude from the card."""
    found = ["It needs hf-catquant; other runtimes (llama.cpp, vLLM, ONNX) do not read these files."]
    if merges_of(config.provenance) is None:
        found.append("The licence, the biases and the intended use are those of the float model.")
    else:
        found.append(
            "The licence is that of the float model; a fine-tuning can change the biases and the intended use."
        )
    if table is None:
        found.append("Its quality was not measured.")
    else:
        first, last = table.rows[0], table.rows[-1]
        change = f"{first.metric:.2f} to {last.metric:.2f}"
        found.append(
            f"{table.metric.capitalize()} went from {change} on {table.n} rows; on other data it can be another number."
        )
    if not is_sealed(config.provenance):
        found.append("The request and the provenance have no checksum: whether they were changed cannot be told.")
    if any(fit.get("clusters") for fit in report.corrections.values()):
        found.append("The correction was fitted on the calibration data and is meant for data like it.")
    found += [cell(note) for note in report.notes]
    return found


def _size_note(table: Evaluation | None, report: Report) -> str:
    """An evaluation computes in float32, in which the float parts of a bfloat16 checkpoint take more."""
    if table is None or table.rows[-1].bytes == report.bytes_after:
        return ""
    return f" Its sizes are those in the dtype of the evaluation; the stored model has {report.bytes_after:,} bytes."


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "rows"
