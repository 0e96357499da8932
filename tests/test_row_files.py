"""Rows come from the file that is named, as it is now, and reading leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from hf_catquant.tasks import read_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache [1]" / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(
    "name",
    ["train[12].csv", "a [v1].csv", "b::c.csv", "*.csv", "folder [x]/__t?.csv", "x::y/.hidden.csv", "-ü{1}.csv"],
)
def test_a_name_is_a_name_and_no_pattern(tmp_path, monkeypatch, name, cache):
    monkeypatch.chdir(tmp_path)
    for other in ("train1.csv", "train2.csv", "a v.csv", "b", "c.csv"):
        Path(other).write_text("column\nanother\n")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("column\nmine\n")
    for asked in (name, str(tmp_path / name)):
        assert read_rows(asked)["column"] == ["mine"]
    assert not list(cache.iterdir())


@pytest.mark.parametrize("ending", [".csv", ".txt", ".jsonl", ".json", ".parquet"])
def test_the_rows_are_those_of_now(tmp_path, ending):
    write = {
        ".csv": lambda rows, file: rows.to_csv(file, index=False),
        ".txt": lambda rows, file: file.write_text("\n".join(rows["text"])),
        ".jsonl": lambda rows, file: rows.to_json(file, orient="records", lines=True),
        ".json": lambda rows, file: rows.to_json(file, orient="records"),
        ".parquet": lambda rows, file: rows.to_parquet(file),
    }[ending]
    file = tmp_path / f"rows{ending}"
    for text in ("old", "new"):
        write(pd.DataFrame({"text": [text, "last"]}), file)
        os.utime(file, (1, 1))
        assert list(read_rows(str(file))["text"]) == [text, "last"]


def test_many_rows_stay_on_disk_and_work_after_the_cache_is_gone(tmp_path, cache):
    file, size = tmp_path / "rows.parquet", 8_000_000
    pd.DataFrame({"text": ["x" * 1000] * (size // 1000), "n": range(size // 1000)}).to_parquet(file)
    gc.collect()
    before = pa.total_allocated_bytes()
    rows = read_rows(str(file))
    gc.collect()
    assert pa.total_allocated_bytes() - before < size / 10
    assert not list(cache.iterdir())
    for same in (rows, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows.select(range(100))))):
        assert same[99] == {"text": "x" * 1000, "n": 99}
    assert sorted(rows.shuffle(seed=0)["n"]) == list(range(size // 1000))


def test_a_file_without_rows_says_why(tmp_path, cache):
    for name, content, why in (
        ("a.csv", "", ", or is no whole .csv file: No columns to parse"),
        ("a.csv", "a,b\n", ""),
        ("a.parquet", "no", ", or is no whole .parquet file: Parquet file size is 2 bytes"),
        ("a.jsonl", '{"a": ', ", or is no whole .jsonl file: .*JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^--dataset: .*/{name} has no rows{why}"):
            read_rows(str(tmp_path / name))
    assert not list(cache.iterdir())
