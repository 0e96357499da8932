"""From a folder and a file to a model, its processor, and rows: what the command line needs to know about tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from .checkpoint import variant_option
from .whole import check_whole

if TYPE_CHECKING:
    from datasets import Dataset

# What the class name of a model ends in, and the Auto class of its task.
AUTO_CLASSES = {
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForImageClassification": transformers.AutoModelForImageClassification,
    "ForAudioClassification": transformers.AutoModelForAudioClassification,
    "ForCausalLM": transformers.AutoModelForCausalLM,
    "LMHeadModel": transformers.AutoModelForCausalLM,
    "ForMaskedLM": transformers.AutoModelForMaskedLM,
    "ForTokenClassification": transformers.AutoModelForTokenClassification,
    "ForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
    "ForSpeechSeq2Seq": transformers.AutoModelForSpeechSeq2Seq,
    "ForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
    "ForCTC": transformers.AutoModelForCTC,
}
# Some classes of sounds are called "ForSequenceClassification" like those of texts.
SOUND_CLASSIFIERS = frozenset(MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values())
# Some classes of images do not end in "ForImageClassification".
IMAGE_CLASSIFIERS = frozenset(
    name
    for names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    for name in ((names,) if isinstance(names, str) else names)
)
LANGUAGE_MODELS = (transformers.AutoModelForCausalLM,)
LABELS = ("label", "labels")
CLASSIFIERS = (
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForImageClassification,
    transformers.AutoModelForAudioClassification,
)
# Columns that a model without a processor reads as they are.
READY = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "input_features")


def auto_class(config: Any) -> Any:
    """The Auto class of the task that a config's architecture is for; ``AutoModel`` if it names none.

    It says what a model does. What loads it is :func:`model_class`: most classes are the default of no Auto class.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture in SOUND_CLASSIFIERS:
        return transformers.AutoModelForAudioClassification
    if architecture in IMAGE_CLASSIFIERS:
        return transformers.AutoModelForImageClassification
    if architecture.startswith("Whisper"):
        return transformers.AutoModelForSpeechSeq2Seq
    return next(
        (auto for ending, auto in AUTO_CLASSES.items() if architecture.endswith(ending)), transformers.AutoModel
    )


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """What loads the model of a config: the very class that ``architectures`` names.

    An Auto class only where there is no such class: of code that comes with the model (``auto_map``), for a config without
    ``architectures`` (``AutoModel``), and for the name of another model type's class, or one that transformers no longer
    has, where its ending names a task. Loaded by a class that config.json does not name, a model that has more tensors
    than the class reads is refused (:func:`~hf_catquant.whole.check_whole`).

    Raises:
        ValueError: it names a class that there is none for.
    """
    name = str((getattr(config, "architectures", None) or [""])[0])
    if not name:
        return transformers.AutoModel
    own = getattr(transformers, name, None)
    exists = isinstance(own, type) and issubclass(own, PreTrainedModel)
    mapped = getattr(config, "auto_map", None) or {}
    remote = next((auto for auto, path in mapped.items() if str(path).rpartition(".")[2] == name), None)
    if remote is not None and (trust_remote_code or not exists):
        return getattr(transformers, remote, transformers.AutoModel)
    if exists and _reads(own, config):
        return own
    auto = auto_class(config)
    known = auto.__name__ in mapped or type(config) in auto._model_mapping
    # A head that no ending tells of would be lost in the body that AutoModel loads; who registers a class knows its name.
    if known and (auto is not transformers.AutoModel or name.endswith("Model") or not _of_transformers(config)):
        return auto
    kind = (
        f"and its model_type is {config.model_type}"
        if exists
        else f"which transformers {transformers.__version__} lacks"
    )
    raise ValueError(
        f"config.json names the class {name} in architectures, {kind}: name the class that its weights are of, pass "
        "--trust-remote-code if its code comes with it (auto_map), or load it in Python and pass it to "
        "hf_catquant.quantize"
    )


def _reads(kind: Any, config: Any) -> bool:
    """Whether a class is of this config, or of a part of it: a tower of a model of two is saved with either config."""
    own = kind.config_class
    return own is type(config) or own in (getattr(config, "sub_configs", None) or {}).values()


def _of_transformers(config: Any) -> bool:
    return type(config).__module__.startswith("transformers.models.")


def load_quantized(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The quantized model in a folder or on the Hub, in the class that its config names; of a folder, the only variant.

    Raises:
        ValueError: there is none, it is not whole, or there is no such class.
    """
    kind = model_class(load_config(name, trust_remote_code), trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **variant_option(name)}
    model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    check_whole(model, name, found, kind)
    return model


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model in a folder or on the Hub.

    Raises:
        ValueError: there is neither.
    """
    try:
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"there is no folder {name}, and the Hub did not give a model of this name") from error


def float_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a float model.

    Raises:
        ValueError: there is none of this name, or it is quantized.
    """
    config = load_config(name, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized already: name the float model")
    return config


def load_processor(folder: str, trust_remote_code: bool = False) -> Any:
    """Tokenizer, image processor or feature extractor of a model, or None if it ships none."""
    path = Path(folder)
    if path.is_dir() and not any(path.glob("*processor_config.json")) and not any(path.glob("*token*")):
        return None
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)


def read_rows(file: str, column: str | None = None, limit: int | None = None) -> Dataset:
    """The rows of a parquet, JSON, CSV or text file, whatever its name, as they are now, as a ``datasets.Dataset``.

    Raises:
        ValueError: the file does not exist, has another type, is empty, or has no such column.
    """
    # It brings the library that reads data files, which takes longer to import than all the rest of the package.
    from .row_files import FILE_TYPES, read_file

    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--dataset: there is no file {file}")
    if path.suffix not in FILE_TYPES:
        raise ValueError(f"--dataset must end in {', '.join(FILE_TYPES)}, got {path.name}")
    try:
        rows = read_file(path)
    except ValueError as error:
        raise ValueError(f"--dataset: {error}") from error
    if not len(rows):
        raise ValueError(f"--dataset: {file} has no rows")
    if column is not None and column not in rows.column_names:
        raise ValueError(f"--column: {file} has no column {column!r}; it has {', '.join(rows.column_names)}")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def as_samples(rows: Dataset, processor: Any, column: str | None) -> Any:
    """Rows in the form that ``samples.collect`` takes: raw for a processor, else dicts of the model's input.

    Raises:
        ValueError: there is neither a processor nor columns of the model's own inputs, or of waveforms.
    """
    if processor is not None:
        dropped = [name for name in rows.column_names if name in LABELS or name == "source_id"]
        return rows.select_columns([column]) if column is not None else rows.remove_columns(dropped)
    ready = [name for name in READY if name in rows.column_names]
    if ready and column in (None, *ready):
        return rows.select_columns(ready)
    source = column or next((name for name in ("input_values", "audio") if name in rows.column_names), None)
    if source is None:
        raise ValueError(
            f"the model ships no tokenizer or processor: the rows must hold its own inputs ({', '.join(READY)}), or "
            "--column must name the column of its waveforms"
        )
    return [{"input_values": _waveform(value)} for value in rows[source]]


def labels_of(rows: Dataset, column: str, model: nn.Module) -> list[int]:
    """Class indices of a column of integers, or of class names that the model's config knows.

    Raises:
        ValueError: there is no such column, a row without a label, a name that the config does not know, or a number
            that is not whole.
    """
    if column not in rows.column_names:
        raise ValueError(f"--label-column: no column {column!r}; there is {', '.join(rows.column_names)}")
    known = getattr(model.config, "label2id", None) or {}
    return [_label(value, row, column, known) for row, value in enumerate(rows[column])]


def _label(value: Any, row: int, column: str, known: dict[str, int]) -> int:
    where = f"--label-column: row {row} of {column!r}"
    if isinstance(value, str):
        if value not in known:
            raise ValueError(
                f"{where} is {value!r}, a class that the model does not know; it knows {', '.join(known)}"
            )
        return known[value]
    if not isinstance(value, int | float) or value != value or int(value) != value:
        raise ValueError(f"{where} must be a whole number or the name of a class, got {value!r}")
    return int(value)


def _waveform(value: Any) -> np.ndarray:
    array = np.asarray(value)
    # Whole numbers are 16-bit sound; models take waveforms in [-1, 1].
    return array.astype(np.float32) / 32767 if array.dtype.kind == "i" else array.astype(np.float32)
