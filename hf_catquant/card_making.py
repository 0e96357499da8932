"""What a card says of how its model was made: the request, the calibration data, the versions."""

from __future__ import annotations

import json
from typing import Any

from .config import CatQuantConfig

# What a request says beside the defaults is on the card; what quantizing found is in the tables.
_REQUEST = (
    "weights",
    "group_size",
    "activations",
    "solver",
    "solver_options",
    "correction",
    "num_samples",
    "batch_size",
    "seed",
    "edge_weights",
    "modules_to_not_convert",
    "overrides",
    "low_rank",
    "rotation",
    "average_bits",
    "target_bytes",
)


def request(config: CatQuantConfig) -> str:
    """The Python of the request, everything that is not a default spelled out."""
    default = CatQuantConfig().to_dict()
    fields = {name: config.to_dict()[name] for name in _REQUEST}
    said = {name: value for name, value in fields.items() if name in _REQUEST[:4] or value != default[name]}
    words = [f"    {name}={_literal(value)}," for name, value in said.items()]
    if config.provenance.get("calibration"):
        words.append("    dataset=samples,")
    return "\n".join(["CatQuantConfig(", *words, ")"])


def _literal(value: Any) -> str:
    """Python with the quotes that people type."""
    return json.dumps(value) if isinstance(value, str) else repr(value).replace("'", '"')


def calibration(config: CatQuantConfig) -> str:
    """The sentence on the calibration data."""
    data = config.provenance.get("calibration")
    if not isinstance(data, dict):
        return "No calibration data was used."
    return (
        f"Calibration data: {cell(data.get('source'))}, {data.get('num_samples')} samples, fingerprint "
        f"`{data.get('fingerprint')}`, seed {config.seed}; the data itself is not part of the checkpoint."
    )


def versions(config: CatQuantConfig) -> str:
    """The sentence on the versions of what decides the codes; nothing if they are not known."""
    found = config.provenance.get("versions")
    known = found if isinstance(found, dict) else {}
    return f"Versions: {', '.join(f'{name} {value}' for name, value in sorted(known.items()))}." if known else ""


def cell(value: Any) -> str:
    """One line without the sign that ends a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
