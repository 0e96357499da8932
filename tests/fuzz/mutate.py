"""Checkpoints with something wrong in them: every one follows from a seed, so that each can be made again.

A case changes config.json, the header of the safetensors file or its payload, or an index of shards, as values of the
JSON tree or as bytes, once or a few times. Some are signed afterwards: their checksums are made right, as an attacker
would, so that the checks behind the checksums are reached.
"""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_catquant.entries import entries_checksum

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    255,
    4096,
    2**31 - 1,
    2**31,
    2**40,
    2**63,
    10**18,
    -(2**63),
    0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "../../x",
    "\u0000",
    "\ud800",
    "é" * 50,
    "(" * 40,
    [],
    {},
    [0],
    [[[]]],
    {"x": 1},
    [1] * 300,
    "binary",
    "ternary",
    "int8",
    "float32",
    "hadamard",
    "catquant",
    "gptq",
    "bitsandbytes",
    "relu",
    "F16",
    "BF16",
    "I8",
    "U8",
    "BOOL",
    "F64",
)
# Of transformers' configs; what they do with a value is theirs, unless it takes the checker along.
FIELDS = (
    "attn_implementation",
    "auto_map",
    "base_model_tp_plan",
    "chunk_size_feed_forward",
    "dtype",
    "head_dim",
    "num_labels",
    "problem_type",
    "rope_parameters",
    "rope_scaling",
    "sub_configs",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_bfloat16",
    "vision_config",
)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclass
class Checkpoint:
    """The files of a small model: two, or with an index and a second shard four."""

    config: bytes
    weights: bytes
    shard: bytes | None = None
    index: bytes | None = None


@dataclass
class Case:
    """A mutated checkpoint.

    Attributes:
        checkpoint: its files.
        kinds: what was done to it.
        is_signed: whether checksums were made right afterwards.
    """

    checkpoint: Checkpoint
    kinds: list[str]
    is_signed: bool


def mutated(base: Checkpoint, seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    made = copy.copy(base)
    kinds = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.choice(list(MUTATIONS))
        MUTATIONS[kind](made, rng)
        kinds.append(kind)
    is_signed = rng.random() < 0.35
    return Case(signed(made) if is_signed else made, kinds, is_signed)


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    length = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: Any, payload: bytes) -> bytes:
    """The inverse."""
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + payload


def sharded(whole: Checkpoint) -> Checkpoint:
    """The same model with every second tensor in another file, and an index."""
    header, payload = split(whole.weights)
    metadata = header.pop("__metadata__", {})
    files, places = [], {}
    for first, file in enumerate(SHARDS):
        entries, data = {}, b""
        for name in sorted(header)[first::2]:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(data), len(data) + end - begin]}
            data += payload[begin:end]
            places[name] = file
        files.append(joined({"__metadata__": metadata, **entries}, data))
    index = {"metadata": {"total_size": len(payload)}, "weight_map": places}
    return Checkpoint(whole.config, *files, json.dumps(index).encode())


def signed(made: Checkpoint) -> Checkpoint:
    """The checkpoint with checksums of what is in it now, where there is anything to sum."""
    try:
        config = json.loads(made.config)
        stored = config["quantization_config"]
        stored["checksums"] = {}
        for weights in (made.weights, made.shard):
            header, payload = split(weights) if weights is not None else ({}, b"")
            header.pop("__metadata__", None)
            stored["checksums"] |= {name: _sum(entry, payload) for name, entry in header.items()}
        stored["entries_checksum"] = entries_checksum(stored["modules"], stored["corrections"], stored["checksums"])
        return Checkpoint(json.dumps(config).encode("utf-8", "surrogatepass"), made.weights)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, struct.error, RecursionError, OverflowError):
        return made


def _sum(entry: dict[str, Any], payload: bytes) -> int:
    begin, end = entry["data_offsets"]
    return zlib.crc32(payload[begin:end], zlib.crc32(f"{entry['dtype']}{list(entry['shape'])}".encode()))


def _tree(value: Any, rng: random.Random) -> Any:
    """A JSON tree with one place changed."""
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    old = holder[key]
    change = rng.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(old, int):
        holder[key] = old + rng.choice((-1, 1, 8, -8, 2**20))
    elif change == 2:
        other, name = rng.choice(places)
        try:
            holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(old)
        except (KeyError, IndexError):
            holder[key] = None
    elif change == 3 and isinstance(holder, dict):
        holder[f"{key}{rng.choice(('', '.', 'x', '_packed'))}"] = copy.deepcopy(old)
    elif change == 4 and isinstance(holder, dict):
        holder[rng.choice(("x", "weights", "quant_method", f"{key} "))] = holder.pop(key)
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any) -> Any:
    """(holder, key) of every value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inside):
        yield value, key
        yield from _places(child)


def _bytes(data: bytes, rng: random.Random, least: int = 0) -> bytes:
    """Bytes with a bit, a few bytes, or a part of them changed, from place ``least`` on."""
    if len(data) <= least:
        return data + b"\0"
    at = rng.randrange(least, len(data))
    end = min(len(data), at + rng.choice((1, 2, 8, 100)))
    change = rng.randrange(6)
    if change == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if change == 1:
        return data[:at]
    if change == 2:
        return data[:at] + rng.randbytes(end - at) + data[end:]
    if change == 3:
        return data[:at] + data[end:]
    if change == 4:
        return data[:end] + data[at:]
    return data + rng.randbytes(rng.choice((1, 8, 1000)))


def config_value(made: Checkpoint, rng: random.Random) -> None:
    """Change a value anywhere in config.json."""
    _edit_config(made, lambda config: _tree(config, rng))


def config_field(made: Checkpoint, rng: random.Random) -> None:
    """Add a field that transformers reads and a saved config need not have, at the top or in the quantization's part."""

    def change(config: Any) -> Any:
        holder = config["quantization_config"] if rng.random() < 0.2 else config
        holder[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(VALUES))
        return config

    _edit_config(made, change)


def entry_value(made: Checkpoint, rng: random.Random) -> None:
    """Change a value of the quantization's part of config.json."""

    def change(config: Any) -> Any:
        config["quantization_config"] = _tree(config["quantization_config"], rng)
        return config

    _edit_config(made, change)


def module_value(made: Checkpoint, rng: random.Random) -> None:
    """Change a field of one quantized module, or of a correction."""

    def change(config: Any) -> Any:
        entries = config["quantization_config"][rng.choice(("modules", "modules", "corrections"))]
        entry = entries[rng.choice(sorted(entries))]
        entry[rng.choice(sorted(entry))] = copy.deepcopy(rng.choice((*VALUES, [8, 8], [2**20, 2**20])))
        return config

    _edit_config(made, change)


def config_bytes(made: Checkpoint, rng: random.Random) -> None:
    """Damage config.json as bytes."""
    made.config = _bytes(made.config, rng)


def header_value(made: Checkpoint, rng: random.Random) -> None:
    """Change a value of the safetensors header."""
    _edit_header(made, lambda header, payload: (_tree(header, rng), payload))


def header_lie(made: Checkpoint, rng: random.Random) -> None:
    """Another dtype of the same size, another shape of the same count, or the bytes of another tensor."""

    def change(header: Any, payload: bytes) -> tuple[Any, bytes]:
        names = sorted(name for name in header if name != "__metadata__")
        entry, other = header[rng.choice(names)], header[rng.choice(names)]
        what = rng.randrange(4)
        if what == 0:
            same = {"F32": "I32", "F16": rng.choice(("BF16", "I16", "U16")), "U8": rng.choice(("I8", "BOOL"))}
            entry["dtype"] = same.get(entry["dtype"], "F32")
        elif what == 1:
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]]))
        elif what == 2:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        else:
            entry["data_offsets"] = [rng.choice((0, -1, 2**63, 1 << 40)), rng.choice((0, 2**63, 1 << 41))]
        return header, payload

    _edit_header(made, change)


def header_bytes(made: Checkpoint, rng: random.Random) -> None:
    """Damage the header as bytes."""
    length = min(struct.unpack("<Q", made.weights[:8].ljust(8, b"\0"))[0], len(made.weights) - 8)
    head = _bytes(made.weights[8 : 8 + max(0, length)], rng)
    prefix = struct.pack("<Q", len(head)) if rng.random() < 0.7 else made.weights[:8]
    made.weights = prefix + head + made.weights[8 + max(0, length) :]


def header_length(made: Checkpoint, rng: random.Random) -> None:
    """A header that says it is of another length."""
    length = struct.unpack("<Q", made.weights[:8].ljust(8, b"\0"))[0]
    wrong = rng.choice((0, 1, length - 1, length + 1, 99_999_999, 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)))
    made.weights = struct.pack("<Q", wrong % 2**64) + made.weights[8:]


def payload_bytes(made: Checkpoint, rng: random.Random) -> None:
    """Damage the numbers."""
    length = struct.unpack("<Q", made.weights[:8].ljust(8, b"\0"))[0]
    made.weights = _bytes(made.weights, rng, min(8 + length, max(0, len(made.weights) - 1)))


def tensor_values(made: Checkpoint, rng: random.Random) -> None:
    """Fill one tensor with a byte: NaN, infinity, zeros, bytes that no code packs to."""

    def change(header: Any, payload: bytes) -> tuple[Any, bytes]:
        names = sorted(name for name in header if name != "__metadata__")
        begin, end = (min(value, len(payload)) for value in header[rng.choice(names)]["data_offsets"])
        return header, payload[:begin] + bytes([rng.choice((0, 1, 127, 250, 255))]) * (end - begin) + payload[end:]

    _edit_header(made, change)


def tensor_gone(made: Checkpoint, rng: random.Random) -> None:
    """A tensor less, the file whole without it; or one more, or one of another name."""

    def change(header: Any, payload: bytes) -> tuple[Any, bytes]:
        names = sorted(name for name in header if name != "__metadata__")
        name = rng.choice(names)
        what = rng.randrange(3)
        if what == 0:
            begin, end = header.pop(name)["data_offsets"]
            for entry in header.values():
                if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [value - (end - begin) for value in entry["data_offsets"]]
            return header, payload[:begin] + payload[end:]
        if what == 1:
            header[f"{name}x"] = header.pop(name)
            return header, payload
        size = len(payload)
        header["extra.weight_packed"] = {"dtype": "U8", "shape": [8], "data_offsets": [size, size + 8]}
        return header, payload + bytes(8)

    _edit_header(made, change)


def shard_index(made: Checkpoint, rng: random.Random) -> None:
    """Two shards with an index that is wrong in a value or in bytes, or an index beside the one file."""
    try:
        if made.shard is None:
            parts = sharded(made)
            made.index = parts.index
            if rng.random() < 0.8:
                made.weights, made.shard = parts.weights, parts.shard
        index = json.loads(made.index or b"null")
        change = rng.randrange(5)
        if change == 0:
            made.index = _bytes(made.index or b"", rng)
            return
        places = index["weight_map"]
        if change == 1:
            name = rng.choice(("../config.json", "/etc/hosts", "model.safetensors", "x.bin", "", ".", *SHARDS))
            for key in rng.sample(sorted(places), rng.choice((1, len(places)))):
                places[key] = name
        elif change == 2:
            places.pop(rng.choice(sorted(places)))
        else:
            index = _tree(index, rng)
        made.index = json.dumps(index).encode("utf-8", "surrogatepass")
    except _BROKEN:
        return


def nested(made: Checkpoint, rng: random.Random) -> None:
    """JSON that is nested deeper than a parser's stack."""
    text = b"[" * rng.choice((500, 5_000, 200_000))
    if rng.random() < 0.5:
        made.config = text
    else:
        made.weights = struct.pack("<Q", len(text)) + text


MUTATIONS: dict[str, Callable[[Checkpoint, random.Random], None]] = {
    kind.__name__: kind
    for kind in (
        config_value,
        config_field,
        entry_value,
        module_value,
        config_bytes,
        header_value,
        header_lie,
        header_bytes,
        header_length,
        payload_bytes,
        tensor_values,
        tensor_gone,
        shard_index,
        nested,
    )
}
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, struct.error, RecursionError, OverflowError)


def _edit_config(made: Checkpoint, change: Callable[[Any], Any]) -> None:
    try:
        made.config = json.dumps(change(json.loads(made.config))).encode("utf-8", "surrogatepass")
    except _BROKEN:  # an earlier mutation left nothing to edit
        return


def _edit_header(made: Checkpoint, change: Callable[[Any, bytes], tuple[Any, bytes]]) -> None:
    try:
        made.weights = joined(*change(*split(made.weights)))
    except _BROKEN:
        return
