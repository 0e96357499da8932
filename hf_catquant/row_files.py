"""A file of rows, read with ``datasets``: the file of that very name, as it is now, and no file is left of it.

``datasets`` takes a name for a pattern, in which brackets, stars and ``::`` mean something, and keeps what it once read by
the path and the time of the last change, so that a file that is written again within the tick of its clock, or with its
old time, gives the rows of before. Here it is given a link whose name cannot be misread, and a cache of its own.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets import config as settings
from datasets.exceptions import DatasetGenerationError
from datasets.table import InMemoryTable

FILE_TYPES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def read_file(path: Path) -> Dataset:
    """The rows of a parquet, JSON, CSV or text file, mapped into memory from a file that has no name any more.

    Raises:
        ValueError: the file is empty or damaged.
        OSError: the folder of the cache of ``datasets`` (``HF_DATASETS_CACHE``) cannot be written.
    """
    room = Path(settings.HF_DATASETS_CACHE).absolute()
    room.mkdir(parents=True, exist_ok=True)
    # Where a mapped file cannot be deleted (Windows) it stays.
    with tempfile.TemporaryDirectory(dir=room, prefix="hf_catquant-", ignore_cleanup_errors=True) as cache:
        link = Path(cache) / re.sub(r"[^\w.-]", "_", path.name)
        link.symlink_to(path.absolute())
        pattern = re.sub(r"([*?[])", r"[\1]", str(link))  # as glob.escape, which leaves a drive as it is
        try:
            rows = load_dataset(FILE_TYPES[path.suffix], data_files=pattern, split="train", cache_dir=cache)
        except (ValueError, OSError, StopIteration, DatasetGenerationError) as error:
            # An empty file has no split, and a damaged one raises whatever its reader does.
            why = error.__cause__ or error
            raise ValueError(f"{path} has no rows, or is no whole {path.suffix} file: {why}") from error
        # A table that is told to lie in memory has no files, beside which its methods would keep what they make of it.
        table = InMemoryTable(rows.data.table)
        return Dataset(table, info=rows.info, split=rows.split, fingerprint=rows._fingerprint)
