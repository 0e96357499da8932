"""A few seconds of the campaign that ``benchmarks/fuzz.py`` runs: other cases, the same judges; and that these can find."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.judge import Base, Said, bases, judge_load, judge_verify, write
from fuzz.mutate import MUTATIONS, Case, mutated, sharded

LINUX = Path("/proc/self/statm").exists()
MEMORY = 3 << 30
CASES = range(10_000_000, 10_000_360)  # none of the campaign's


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No more of it than a little: what wants all of the machine's shall be a find, and not end other work on it."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if LINUX else 0
    if LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return bases(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def said() -> Iterator[Said]:
    handler, logger = Said(), logging.getLogger("hf_catquant")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def run(made: list[Base], folder: Path, said: Said, loads: int) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    finds = []
    for number in CASES:
        base = made[number % len(made)]
        case = mutated(base.checkpoint, number)
        write(case, folder)
        verdicts = [judge_verify(base, case, folder)]
        if number % loads == 0:
            verdicts.append(judge_load(base, case, folder, said))
        for outcome, find in verdicts:
            counts[outcome] += 1
            if find is not None:
                finds.append(f"case {number}, {case.kinds}: {find}")
    return counts, finds


def test_nothing_is_found(made, tmp_path, said):
    counts, finds = run(made, tmp_path, said, loads=9)
    assert not finds, "\n".join(finds)
    assert counts["refused"] > 250
    assert counts["whole, unchanged"]  # a changed comment or id is no damage


def test_what_was_saved_is_neither_refused_nor_changed(made, tmp_path, said):
    for base in made:
        for checkpoint in (base.checkpoint, sharded(base.checkpoint)):
            case = Case(checkpoint, [], is_signed=False)
            write(case, tmp_path)
            assert judge_verify(base, case, tmp_path) == ("whole, unchanged", None)
            assert judge_load(base, case, tmp_path, said) == ("loaded, unchanged", None)


def test_the_judges_can_find(made, tmp_path, said, monkeypatch):
    monkeypatch.setattr("hf_catquant.stored_tensors.verify_files", lambda files, expected: None)
    monkeypatch.setattr("hf_catquant.quantizer.verify_files", lambda files, expected: None)
    _, finds = run(made, tmp_path, said, loads=3)
    assert any("calls whole what is not what was saved" in find for find in finds)
    assert any("computes something else" in find for find in finds)


def test_a_case_follows_from_its_number(made):
    kinds = Counter(kind for number in CASES for kind in mutated(made[0].checkpoint, number).kinds)
    assert kinds.keys() == MUTATIONS.keys()
    first, second = (mutated(made[0].checkpoint, 10_000_003) for _ in range(2))
    assert first == second
