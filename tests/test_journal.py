"""The journal: whole steps or none, one process at a time, and errors of the system in words."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from hf_catquant import disk
from hf_catquant.disk import writing
from hf_catquant.journal import GOES_ON, open_journal


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.journal"


def test_a_step_comes_back_as_it_was(folder, generator):
    tensors = {
        "a.b": torch.randn(3, 5, generator=generator),
        "c": torch.arange(4, dtype=torch.uint8),
        "d": torch.tensor(1.5),
    }
    first = open_journal(folder, resume=False)
    first.agree(config=1)
    first.write(
        "unit-0000", {**tensors, "same": tensors["c"].clone()}, {"unit": "a", "notes": ["n"], "value": 0.1 + 0.2}
    )
    first.close()
    again = open_journal(folder, resume=True)
    found, record = again.read("unit-0000")
    assert record == {"unit": "a", "notes": ["n"], "value": 0.1 + 0.2}
    assert found.keys() == {*tensors, "same"}
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert found[name].data_ptr() % 64 == 0  # in memory of its own
    again.drop()
    assert not folder.exists()


def test_what_was_being_written_is_no_step(folder, monkeypatch):
    found = open_journal(folder, resume=False)
    monkeypatch.setattr(disk, "sync", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        found.write("unit-0000", {"a": torch.ones(2)}, {})
    assert not found.has("unit-0000")
    assert [path.name for path in folder.iterdir()] == ["lock"]
    (folder / ".unit-0001.safetensors").write_bytes(b"half")  # and of a killed process
    found.close()
    open_journal(folder, resume=True).close()
    assert [path.name for path in folder.iterdir()] == ["lock"]


@pytest.mark.parametrize("where", [-1, 30, 0.5, b"broken", b"record"])
def test_a_damaged_step_is_named(folder, where):
    found = open_journal(folder, resume=False)
    found.write("unit-0000", {"a": torch.ones(64)}, {"notes": ["broken"]})
    path = folder / "unit-0000.safetensors"
    data = bytearray(path.read_bytes())
    places = {bytes: data.find, float: lambda share: int(share * len(data)), int: int}
    data[places[type(where)](where)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"unit-0000.safetensors: this step .* is damaged: delete the file"):
        found.read("unit-0000")


def test_other_facts_are_refused_by_name(folder):
    found = open_journal(folder, resume=False)
    found.agree(weights={"model.safetensors": "ab"}, config={"weights": "ternary", "seed": 0})
    found.agree(**{"data, 4 a batch": "ef", "threads": 2})
    assert found.settled("batch_size", 2) == 2
    found.write("unit-0000", {}, {})
    found.close()
    again = open_journal(folder, resume=True)
    assert again.settled("batch_size", 7) == 2
    with pytest.raises(
        ValueError, match=r"begun with threads = 2, this one has 7: .*; set OMP_NUM_THREADS=2 .*--overwrite"
    ):
        again.agree(threads=7)
    again.agree(**{"data, 2 a batch": "gh"})  # batches were made smaller on the way
    with pytest.raises(ValueError, match=r"manifest.json does not say with which machine .* --overwrite"):
        again.agree(machine="m")
    again.agree(weights={"model.safetensors": "ab"})
    with pytest.raises(ValueError, match=r"begun with config.seed = 0, this one has 1: .* --overwrite"):
        again.agree(config={"weights": "ternary", "seed": 1})
    with pytest.raises(ValueError, match=r'begun with weights.model.safetensors = "ab", this one has "cd"'):
        again.agree(weights={"model.safetensors": "cd"})
    with pytest.raises(ValueError, match=r"weights.other = null"):
        again.agree(weights={"model.safetensors": "ab", "other": "x"})


def test_an_interrupted_run_is_neither_mixed_nor_dropped_unasked(folder):
    found = open_journal(folder, resume=False)
    found.agree(config=1)
    found.close()
    open_journal(folder, resume=False).close()  # no step was finished: nothing is lost
    found = open_journal(folder, resume=False)
    found.write("unit-0000", {}, {})
    found.close()
    with pytest.raises(ValueError, match="--resume goes on with it, --overwrite begins anew"):
        open_journal(folder, resume=False)
    anew = open_journal(folder, resume=False, overwrite=True)
    assert not anew.has("unit-0000")
    anew.agree(config=2)


def test_steps_that_lost_their_manifest_are_refused(folder):
    found = open_journal(folder, resume=False)
    found.agree(config=1)
    found.write("unit-0000", {}, {})
    found.close()
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"but no manifest.json that says what they are of: .* --overwrite"):
        open_journal(folder, resume=True)
    assert not open_journal(folder, resume=False, overwrite=True).begun()


@pytest.mark.parametrize(
    "foreign", ["notes.txt", ".hidden", "model-00001-of-00002.safetensors", "output/", "more/", "lock -> notes"]
)
def test_what_others_put_there_is_not_deleted(folder, foreign):
    """Neither in a folder that looks like a journal, nor in one that is not."""
    name, _, target = foreign.partition(" -> ")
    for beside in [(), ("lock",)][: 1 if target else 2]:
        folder.mkdir()
        for other in beside:
            (folder / other).touch()
        theirs = folder / name.rstrip("/") / "mine" if name.endswith("/") else folder / name
        theirs.parent.mkdir(exist_ok=True)
        if target:
            (folder.parent / target).write_text("mine")
            theirs.symlink_to(folder.parent / target)
        else:
            theirs.write_text("mine")
        for options in ({"resume": False}, {"resume": True}, {"resume": False, "overwrite": True}):
            with pytest.raises(
                ValueError, match=rf"out.journal holds {name.rstrip('/')}, which .*; move it away, or choose"
            ):
                open_journal(folder, **options)
        assert theirs.read_text() == "mine"
        shutil.rmtree(folder)


def test_a_link_or_a_file_is_no_journal(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    folder.symlink_to("other")
    with pytest.raises(ValueError, match=r"out.journal is a link: .* choose another folder"):
        open_journal(folder, resume=False, overwrite=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    folder.unlink()
    folder.write_text("")
    with pytest.raises(ValueError, match=r"out.journal is a file: .* choose another folder"):
        open_journal(folder, resume=False, overwrite=True)


def test_what_comes_in_during_the_run_stays(folder):
    found = open_journal(folder, resume=False)
    found.agree(config=1)
    found.write("unit-0000", {}, {})
    (folder / "notes.txt").write_text("mine")
    found.drop()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_second_process_is_told_and_a_dead_one_is_not_waited_for(folder):
    folder.mkdir()
    code = (  # what another process does, without the time that importing takes
        "import fcntl, os, sys, time; lock = open(sys.argv[1], 'a+'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print(os.getpid(), file=lock, flush=True); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder / "lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(RuntimeError, match=rf"another process \(pid {holder.pid}\) quantizes into this folder"):
            open_journal(folder, resume=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    for _ in range(100):  # the system frees the lock
        try:
            open_journal(folder, resume=True).close()
            break
        except RuntimeError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock of a dead process is still held")
    assert int((folder / "lock").read_text()) == os.getpid()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "x", "file"),
            "cannot write file: the disk is full: free some space; what is",
        ),
        (OSError(errno.EROFS, "x", "file"), "the file system is read-only: choose another folder"),
        (PermissionError(errno.EACCES, "x", "file"), "permission is denied"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (SafetensorError("I/O error: File too large (os error 27)"), "ulimit -f"),
    ],
)
def test_errors_of_the_system_are_said_in_words(tmp_path, error, words):
    with pytest.raises(OSError, match=words.replace("(", r"\(")), writing(tmp_path / "here", GOES_ON):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(SafetensorError, match="header"), writing(tmp_path):
        raise SafetensorError("header")


def test_a_file_that_cannot_be_written_leaves_nothing_of_itself(folder):
    found = open_journal(folder, resume=False)
    found.write("unit-0000", {"a": torch.ones(8)}, {})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*unit-0001.safetensors: the file would be larger"):
            found.write("unit-0001", {"a": torch.ones(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not found.has("unit-0001")
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "unit-0000.safetensors"]
    found.read("unit-0000")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")  # noqa: PTH110
def test_a_full_disk_is_said(folder):
    found = open_journal(folder, resume=False)
    (folder / ".manifest.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full: free some space; what is finished is kept, --resume goes on"):
        found.agree(config=1)
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_place_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file"):
        open_journal(tmp_path / "file" / "out.journal", resume=False)


def test_a_damaged_manifest_is_named(folder):
    found = open_journal(folder, resume=False)
    found.write("unit-0000", {}, {})
    found.close()
    (folder / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"manifest.json is damaged .* --overwrite"):
        open_journal(folder, resume=True)
