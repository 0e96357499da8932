"""Whether a stored model is whole, before anything is built from it: format, entries, hashes, shapes, ranges, provenance.

Only JSON and safetensors headers are parsed, and tensors are read one at a time: a file is checked without the memory of
its model, and no code that comes with it runs. Loading checks the same and, beyond it, that the model's class fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from .checkpoint import ADAPTER, INDEX, WEIGHTS, read_object, stored_variant, weight_files
from .config import QUANT_METHOD, CatQuantConfig
from .entries import broken_seals, check_absent, check_provenance, is_sealed
from .fields import changed_fields, check_fields, unknown_fields
from .identity import REPORT, recorded_files, strangers
from .integrity import sha256
from .inventory import digests, is_pickle, names_in, shortly
from .plain import CONFIG
from .saving import merges_of
from .sentinels import check_sentinels
from .stored_tensors import check_stored


@dataclass
class Verification:
    """What was found in a folder.

    Attributes:
        folder: that was looked at.
        problems: why the model must not be used; empty if it may.
        remarks: what a careful user wants to know, and does no harm.
        files: SHA-256 of config.json, of every file of weights, and of every file of tokenizers, processors and the like, by
            name.
        tensors, modules: how many were checked.
        provenance: how the model was made, as it says.
    """

    folder: str
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    tensors: int = 0
    modules: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-clean."""
        return {**asdict(self), "is_whole": self.is_whole}

    def __str__(self) -> str:
        lines = [f"{digest}  {name}" for name, digest in self.files.items()]
        lines += [f"made by: {name}: {value}" for name, value in self.provenance.items()]
        lines += [f"remark: {text}" for text in self.remarks]
        lines += [f"PROBLEM: {text}" for text in self.problems]
        verdict = "whole" if self.is_whole else f"{len(self.problems)} problems, do not use it"
        lines.append(f"{self.folder}: {self.modules} modules, {self.tensors} tensors: {verdict}")
        return "\n".join(map(_one_line, lines))


def _one_line(text: str) -> str:
    """With what is not printable spelled out: names and provenance are another's, and could write lines of their own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def verify(folder: str | Path) -> Verification:
    """Check the quantized model in ``folder``; what is wrong with it is in the result, not raised.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = Verification(str(folder))
    try:
        raw = _stored_object(folder)
        config = stored_config(raw, folder)
        files = weight_files(folder)
        if not files:
            raise ValueError(f"{folder}: there is neither {WEIGHTS} nor {INDEX}")
        headers = check_stored(config, raw, files)
        if (folder / "config.json").is_file():  # save_quantized writes what no other loader has a name for
            check_sentinels(headers)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        found.problems.append(" ".join(str(error).split()))
        return found
    of_transformers = (folder / "config.json").is_file()
    own = folder / ("config.json" if of_transformers else CONFIG)
    found.files = {path.name: sha256(path) for path in (own, *files)}
    found.tensors, found.modules = len(headers), len(config.modules or {})
    _look_around(folder, files, found)
    found.remarks += strangers(folder, config)
    _check_companions(folder, config, found)
    if of_transformers:
        _check_fields(folder, raw, config, found)
    else:
        found.remarks.append(
            "a folder of save_quantized: load_quantized puts it into a float model that you build, whose settings are not "
            "stored here and were not checked"
        )
    _provenance(raw["quantization_config"], config, found)
    return found


def _stored_object(folder: Path) -> dict[str, Any]:
    """What config.json holds, or what it would hold of a folder that ``save_quantized`` wrote."""
    if (folder / CONFIG).exists() and not (folder / "config.json").exists():
        return {"quantization_config": read_object(folder / CONFIG)}
    return read_object(folder / "config.json")


def stored_config(raw: dict[str, Any], folder: Path) -> CatQuantConfig:
    """The ``quantization_config`` of a config.json.

    Raises:
        ValueError, TypeError: it has none of this package, or one that breaks a rule.
    """
    found = raw.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder}: config.json has no quantization_config of hf_catquant: it is not a quantized model"
        )
    config: Any = CatQuantConfig.from_dict(found)
    if config.modules is None:
        raise ValueError(f"{folder}: quantization_config has no 'modules': it is a request, not a quantized model")
    check_provenance(config.provenance)
    check_absent(config.provenance, config.checksums)
    return config


def _look_around(folder: Path, files: list[Path], found: Verification) -> None:
    if variant := stored_variant(folder):
        found.remarks.append(
            f"the weights are the variant {variant}: from_pretrained takes them with variant={variant!r} only"
        )
    for name in names_in(folder):
        if is_pickle(name):
            found.remarks.append(f"{name} may hold Python objects, which run when they are loaded; nothing reads it")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            found.remarks.append(f"{path.name} is code; it runs only with trust_remote_code=True")
        elif path.name == ADAPTER:
            found.problems.append(
                f"{ADAPTER} lies beside the model: transformers would load the model that it names, with an "
                "adapter, instead of this one; move the adapter into a folder of its own"
            )
        elif path.suffix == ".safetensors" and path not in files:
            found.remarks.append(f"{path.name} is not part of the model")


def _check_companions(folder: Path, config: CatQuantConfig, found: Verification) -> None:
    """Compare the files of tokenizers, processors and the like with the SHA-256 that the report of this checkpoint has."""
    known = recorded_files(folder, config)
    held = digests(folder, known or ())
    found.files |= held
    if known is None:
        if held:
            found.remarks.append(
                f"{shortly(list(held))} were not checked: no {REPORT} of this checkpoint has their SHA-256"
            )
        return
    changed = [name for name in known if name in held and held[name] != known[name]]
    gone = [name for name in known if name not in held]
    if changed:
        found.problems.append(
            f"{', '.join(changed)}: not what was written, by the SHA-256 in {REPORT}: fetch the folder again; to change it "
            f"on purpose, delete {REPORT}, and catquant push makes it anew"
        )
    if gone:
        found.remarks.append(f"{shortly(gone)}: gone, {REPORT} has its SHA-256")
    new = [name for name in held if name not in known]
    if new:
        found.remarks.append(
            f"{shortly(new)} came after {REPORT} was written, which has no SHA-256 of it: it may be another model's"
        )


def _check_fields(folder: Path, raw: dict[str, Any], config: CatQuantConfig, found: Verification) -> None:
    """Compare the other fields of config.json with those that were saved, as transformers reads them."""
    fields = config.provenance.get("fields")
    if fields is None or fields == {}:
        found.problems.append(
            "provenance has no fields: whether config.json was changed after the save cannot be told; fetch it again, or "
            "load the model and save it again if you trust it"
        )
        return
    try:
        check_fields(fields)
    except ValueError as error:
        found.problems.append(str(error))
        return
    changed, unknown = _compared(folder, raw, fields, found)
    if changed:
        found.problems.append(
            f"{', '.join(changed)} of config.json are not what was saved: fetch it again; to change them on purpose, set "
            "them on the config of the loaded model and save it again"
        )
    if unknown:
        found.problems.append(
            f"{', '.join(unknown)} of config.json have no checksum, which every save writes: the file was changed after the "
            "save, fetch it again; to add them on purpose, set them on the config of the loaded model and save it again"
        )


def _compared(
    folder: Path, raw: dict[str, Any], fields: dict[str, int], found: Verification
) -> tuple[list[str], list[str]]:
    """Names of the fields that are not as they were saved, and of those that no save wrote.

    A class of the model's own is not there without its code: then what the file holds is compared as it stands.
    """
    try:
        loaded = _as_loaded(folder)
        return changed_fields(loaded, fields), unknown_fields(loaded, raw, fields)
    except Exception as error:  # of any config class, which may raise anything
        why = " ".join(str(error).split())[:200]
    if "model_type" not in raw or str(raw["model_type"]) in transformers.CONFIG_MAPPING:
        found.problems.append(
            f"config.json cannot be read: {why}: it was changed or damaged after the save, fetch it again"
        )
    else:
        found.remarks.append(
            "the config class of this model is not there (its own code does not run here): fields that are not in "
            "config.json, or hold a config themselves, were not compared"
        )
    return changed_fields(_flat(raw), fields), unknown_fields(raw, _flat(raw), fields)


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json but for configs inside it, of which the file has what is not as their class has it."""
    return {name: value for name, value in raw.items() if not (isinstance(value, dict) and "model_type" in value)}


def _as_loaded(folder: Path) -> dict[str, Any]:
    """config.json as transformers reads it; without the word False it would ask at a terminal whether to run code."""
    return dict(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict())


def _provenance(stored: dict[str, Any], config: CatQuantConfig, found: Verification) -> None:
    known = config.provenance
    found.problems += broken_seals(stored)
    if not is_sealed(known):
        found.remarks.append(
            "the request and the provenance have no checksums, as before they were written: whether what they say was "
            "changed after the save cannot be told"
        )
    data = known.get("calibration")
    try:
        merges = merges_of(known)
    except ValueError as error:
        merges = None
        found.problems.append(str(error))
    found.provenance = {
        "solver": known.get("solver", "not said"),
        "calibration": "none" if data is None else data,
        "versions": known.get("versions", "not said"),
        **({} if merges is None else {"fine-tuning": f"{merges} after quantizing"}),
    }
    if not known.get("versions"):
        found.remarks.append("provenance does not say with which versions it was made")
