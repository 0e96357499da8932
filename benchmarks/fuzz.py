"""A campaign of broken and hostile checkpoints: none may crash, hang, take memory, or load as another model.

    python benchmarks/fuzz.py [--cases 200000] [--first 0] [--workers 2] [--loads 40]
    python benchmarks/fuzz.py --more 900     # goes on behind the cases of the log for so many seconds, and adds to it
    python benchmarks/fuzz.py --again        # judges the finds of the log again, after they were mended

Every case follows from its number (``tests/fuzz/mutate.py``); every one goes through the function of ``catquant verify``,
and one in ``--loads`` through ``from_pretrained`` as well. Workers have a limit of memory and of seconds for each case;
one that dies is a find, and the campaign goes on behind the case that killed it. A case takes 2 to 3 ms of CPU time, a
worker 8 s before its first one.
The log is ``benchmarks/results/fuzz.json``.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import logging
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import ROOT, made, sources, table, write

sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
PAGE = ROOT / "docs" / "fuzz.md"
MEMORY = 2 << 30  # bytes that a worker may take beyond what it has when it starts to judge
SECONDS = 20  # of CPU time that a case may take: it takes milliseconds
BLOCK = 100  # cases that a worker takes at a time


def main() -> None:
    """Run the campaign and write its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loads", type=int, default=40, help="one case in so many is loaded too")
    parser.add_argument("--more", type=float, help="go on behind the log, to --cases in all, for so many seconds")
    parser.add_argument("--until", type=float, default=float("inf"), help=argparse.SUPPRESS)  # time.time()
    parser.add_argument("--chunk", type=int, nargs=2, metavar=("FROM", "TO"), default=(0, 0), help=argparse.SUPPRESS)
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="judge only what the log calls a find")
    args = parser.parse_args()
    if args.again:
        judge_again(args.loads)
    elif args.end:
        work(args)
    elif args.more:
        go_on(args)
    else:
        campaign(args)


def go_on(args: argparse.Namespace) -> None:
    """Judge cases behind those of the log for ``--more`` seconds."""
    earlier = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    args.until = time.time() + args.more
    if earlier is not None:
        args.first, args.loads = earlier["first"] + earlier["cases"], earlier["loads_one_in"]
        args.cases = max(0, args.cases - earlier["cases"])
    campaign(args, earlier)


def campaign(args: argparse.Namespace, earlier: dict | None = None) -> None:
    """Let workers take blocks of cases until all are judged, or it is too late."""
    start, end = time.perf_counter(), args.first + args.cases
    total: Counter[str] = Counter()
    finds: list[dict] = []
    peak = 0
    with tempfile.NamedTemporaryFile("w+") as queue:
        queue.write(str(args.first))
        queue.flush()
        words = ["--loads", str(args.loads), "--until", str(args.until), "--queue", queue.name, "--end", str(end)]
        running = [started(words) for _ in range(args.workers)]
        while running:
            time.sleep(0.5)
            for process, out in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, out))
                last, more = read(out)
                total.update(last.get("counts", {}))
                peak = max(peak, last.get("peak", 0))
                finds += more
                if process.returncode and last:
                    finds.append({"case": last["at"], "find": f"the process died with status {process.returncode}"})
                    running.append(started([*words, "--chunk", str(last["at"] + 1), str(last["end"])]))
                elif process.returncode:
                    raise SystemExit(f"a worker did not start: status {process.returncode}")
        reached = int(Path(queue.name).read_text())
    result = {
        "cases": reached - args.first,
        "first": args.first,
        "loads_one_in": args.loads,
        "outcomes": dict(sorted(total.items())),
        "finds": finds,
        "peak_bytes_of_a_worker": peak,
        "seconds": round(time.perf_counter() - start),
        "workers": args.workers,
        "commits": [commit()],
        **made(),
    }
    save(result if earlier is None else added(earlier, result))
    print(f"{RESULTS}: {result['cases']} cases more, {len(finds)} finds")
    sys.exit(bool(finds))


def added(earlier: dict, more: dict) -> dict:
    """The log with more cases; what is not counted is of the last of them."""
    outcomes = Counter(earlier["outcomes"]) + Counter(more["outcomes"])
    return {
        **earlier,
        **more,
        "first": earlier["first"],
        "cases": earlier["cases"] + more["cases"],
        "outcomes": dict(sorted(outcomes.items())),
        "finds": earlier["finds"] + more["finds"],
        "commits": list(dict.fromkeys([*earlier.get("commits", []), *more["commits"]])),
        "peak_bytes_of_a_worker": max(earlier["peak_bytes_of_a_worker"], more["peak_bytes_of_a_worker"]),
        "seconds": earlier["seconds"] + more["seconds"],
    }


def commit() -> str:
    """What was judged: the commit of the working tree, and whether something in it was changed since."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def judge_again(loads: int) -> None:
    """Judge the finds of the log with the code of today; what is none any more moves to ``mended``."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    finds, counts = [], Counter(result["outcomes"])
    for find in result["finds"]:
        case = find["case"]
        words = ["--loads", str(loads), "--chunk", str(case), str(case + 1), "--end", str(case + 1)]
        process, out = started(words)
        status = process.wait()
        last, still = read(out)
        if status or still:
            finds.append(still[0] if still else find)
            continue
        result.setdefault("mended", []).append(find)
        if "died" in find["find"]:  # it was not counted
            counts.update(last["counts"])
    result |= {"finds": finds, "outcomes": dict(sorted(counts.items()))}
    save(result)
    print(f"{RESULTS}: {len(finds)} finds left")
    sys.exit(bool(finds))


def started(words: list[str]) -> tuple[subprocess.Popen, Any]:
    """A worker process and the file that it writes to."""
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process runs
    return subprocess.Popen([sys.executable, __file__, *words], stdout=out, stderr=subprocess.DEVNULL), out


def read(out: Any) -> tuple[dict, list[dict]]:
    """What a worker wrote last, and its finds."""
    out.seek(0)
    lines = [line for line in out.read().splitlines() if line.startswith("{")]
    finds = [json.loads(line) for line in lines if '"find"' in line]
    at = [line for line in lines if '"find"' not in line]
    return json.loads(at[-1]) if at else {}, finds


def blocks(args: argparse.Namespace) -> Iterator[range]:
    """Cases for one worker: those of ``--chunk``, then blocks that no other takes until there are none, or it is late."""
    if args.chunk[0] < args.chunk[1]:
        yield range(*args.chunk)
    while args.queue is not None and time.time() < args.until:
        with args.queue.open("r+") as queue:
            fcntl.flock(queue, fcntl.LOCK_EX)
            first = int(queue.read())
            end = min(args.end, first + BLOCK)
            queue.seek(0)
            queue.write(str(end))
        if first >= end:
            return
        yield range(first, end)


def work(args: argparse.Namespace) -> None:
    """Judge cases; one line of JSON before each, so that what kills the process is known."""
    import transformers

    from fuzz.judge import Said, bases, judge_load, judge_verify, write
    from fuzz.mutate import mutated

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    said, logger = Said(), logging.getLogger("hf_catquant")
    logger.handlers = [said]
    signal.signal(signal.SIGPROF, _late)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        place = Path(folder) / "case"
        made_of = bases(Path(folder))
        peak = resident()
        limit = peak + MEMORY
        gc.freeze()
        for block in blocks(args):
            for number in block:
                base = made_of[number % len(made_of)]
                case = mutated(base.checkpoint, number)
                write(case, place)
                print(json.dumps({"at": number, "end": block.stop, "counts": counts, "peak": peak}), flush=True)
                judges = [("verify", lambda b, c: judge_verify(b, c, place))]
                if number % args.loads == 0:
                    judges.append(("load", lambda b, c: judge_load(b, c, place, said)))
                for name, judge in judges:
                    signal.setitimer(signal.ITIMER_PROF, SECONDS)
                    outcome, find = judge(base, case)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    counts[f"{name}: {outcome}"] += 1
                    if find:
                        print(
                            json.dumps({"case": number, "kinds": case.kinds, "signed": case.is_signed, "find": find})
                        )
                peak = peak_bytes()
                if peak > limit:
                    raise SystemExit(9)
            print(json.dumps({"at": block.stop, "end": block.stop, "counts": counts, "peak": peak}), flush=True)


def resident() -> int:
    """Peak memory until now; from here on address space is limited, so that no allocation brings the machine down."""
    now = peak_bytes()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MEMORY, resource.RLIM_INFINITY))
    return now


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _late(*args: Any) -> None:
    raise SystemExit(8)


def save(result: dict) -> None:
    """Write the log, and the page that says what is in it."""
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    mended = [[find["case"], find["find"]] for find in result.get("mended", [])]
    lines = [
        "# The fuzzing campaign",
        "",
        "Made by `python benchmarks/fuzz.py`; the log is `benchmarks/results/fuzz.json`;",
        f"[SECURITY.md](../SECURITY.md) says what is mutated and judged. {result['cases']:,} cases from number",
        f"{result['first']:,} on, one in {result['loads_one_in']} loaded as well;",
        f"cases with a find that is left: {len({find['case'] for find in result['finds']})}.",
        *([f"Judged at commit {', '.join(result['commits'])}."] if result.get("commits") else []),
        "",
        *table(["judge and outcome", "cases"], [[name, f"{n:,}"] for name, n in result["outcomes"].items()]),
        "",
        f"A worker took at most {result['peak_bytes_of_a_worker'] / 1e6:.0f} MB, torch and transformers included.",
    ]
    if result["finds"]:
        lines += ["", "Finds that are left (SECURITY.md says what is not promised):", ""]
        lines += table(["case", "what was found"], [[find["case"], find["find"]] for find in result["finds"]])
    if mended:
        lines += ["", "Finds that were judged again after something was mended, and are none any more:", ""]
        lines += table(["case", "what was found"], mended)
    write(PAGE, [*lines, *sources([result])])


if __name__ == "__main__":
    main()
