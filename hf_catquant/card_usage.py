"""What a card says about using its model: the Hub's word for its task, and code that runs on what the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.pipelines import PIPELINE_REGISTRY

from .checkpoint import stored_variant
from .tasks import SOUND_CLASSIFIERS

# What the class name of a model ends in, and the Hub's word for its task.
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
}


def task_of(architecture: str) -> str | None:
    """The Hub's word for what a class does, None if its name says nothing."""
    if architecture in SOUND_CLASSIFIERS:
        return "audio-classification"
    return next((tag for ending, tag in TASKS.items() if architecture.endswith(ending)), None)


def usage(folder: Path, config: dict[str, Any], task: str | None, repo: str) -> str:
    """Python that loads the model: a pipeline where the folder has all that one needs, else its class."""
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    variant = stored_variant(folder)
    if task in PIPELINE_REGISTRY.get_supported_tasks() and _feeds(folder, str(task)):
        more = "" if variant is None else f', model_kwargs={{"variant": "{variant}"}}'
        return f'from transformers import pipeline\n\nrun = pipeline("{task}", model="{repo}"{trust}{more})'
    name, more = _class_name(config), "" if variant is None else f', variant="{variant}"'
    return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo}"{trust}{more})'


def _feeds(folder: Path, task: str) -> bool:
    """Whether a folder has what turns the rows of a task into inputs."""
    has = {
        "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
        "processor": ("preprocessor_config.json", "processor_config.json"),
    }
    needed = {"image-classification": ["processor"], "audio-classification": ["processor"]}
    needed["automatic-speech-recognition"] = ["tokenizer", "processor"]
    kinds = needed.get(task, ["tokenizer"])
    return all(any((folder / name).is_file() for name in has[kind]) for kind in kinds)


def _class_name(config: dict[str, Any]) -> str:
    """The class of transformers that loads the model with its head."""
    architecture = (config.get("architectures") or [""])[0]
    remote = config.get("auto_map") or {}
    autos = [name for name, target in remote.items() if str(target).endswith(f".{architecture}") and architecture]
    if autos:
        return str(autos[0])
    return architecture if isinstance(getattr(transformers, architecture, None), type) else "AutoModel"
