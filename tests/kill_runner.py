"""Quantizes tiny models in processes that kill themselves, and says whether what was gone on with is bit for bit the same.

A program of its own: it imports torch once, runs nothing itself, and forks. ``python kill_runner.py FOLDER REQUEST``, where
REQUEST is JSON with ``model``, ``config`` (of CatQuantConfig), ``points`` ("steps", after each finished one, or "all": at
every flush to the disk) and ``threads``. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tiny_models
from hf_catquant import CatConfig, CatQuantConfig, disk, folder
from hf_catquant.integrity import sha256

LIMIT = 120  # seconds a child may take


def child(task: Any) -> int:
    """Run ``task`` in a process of its own; what ``waitpid`` says of its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    for _ in range(100 * LIMIT):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    raise TimeoutError(f"a child took more than {LIMIT} s")


def quantize(
    source: Path, out: Path, request: dict[str, Any], kill_at: int | None, count_to: Path | None = None
) -> None:
    """One run, which kills itself at flush ``kill_at``, or writes the flushes that came after a step to ``count_to``."""
    torch.set_num_threads(request.get("threads", 1))
    folder.open_on_shelf.__kwdefaults__["least"] = 1
    flushes, after_steps = 0, []
    flush = disk.sync

    def sync(path: Path) -> None:
        nonlocal flushes
        if flushes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        flushes += 1
        flush(path)
        if path.suffix == ".safetensors" and path.name.startswith("."):
            after_steps.append(flushes + 1)  # this flush, the rename, the flush of the folder; then the step is there

    disk.sync = folder.sync = sync
    fields = dict(request["config"])
    if isinstance(fields.get("correction"), list):
        fields["correction"] = CatConfig(at=tuple(fields["correction"]))
    needs_data = not (fields.get("solver") == "rtn" and fields.get("correction") is None)
    data = tiny_models.samples(request["model"], 12) if needs_data else None
    config = CatQuantConfig(**fields, group_size=16, batch_size=2, dataset=data)
    folder.quantize_folder(source, out, config, resume=True)
    if count_to is not None:
        count_to.write_text(json.dumps([flushes, after_steps]))


def main(root: Path, request: dict[str, Any]) -> dict[str, Any]:
    source = Path(tiny_models.folder_of(request["model"], str(root)))
    counts = root / "counts.json"
    assert child(lambda: quantize(source, root / "whole", request, None, counts)) == 0
    flushes, after_steps = json.loads(counts.read_text())
    wanted = digests(root / "whole")
    points = after_steps if request["points"] == "steps" else range(flushes)
    different, left = [], []
    for point in points:
        out = root / f"killed-{point}"
        status = child(lambda out=out, point=point: quantize(source, out, request, point))
        assert os.WIFSIGNALED(status), f"the run that was to die at flush {point} ended with {status}"
        assert child(lambda out=out: quantize(source, out, request, None)) == 0
        if digests(out) != wanted:
            different.append(point)
        if out.with_name(f"{out.name}.journal").exists():
            left.append(point)
    return {"points": len(points), "steps": len(after_steps), "different": different, "left": left}


def digests(out: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(out.iterdir())}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
