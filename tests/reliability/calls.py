"""Campaigns at the level of system calls, by strace: a kill at each one, an I/O error at each one that writes.

The work is one cycle: a producer has posted some requests, a consumer claims, POSTs and settles them and ends. strace
is attached once all threads of the consumer stand, so that numbers count from there.
"""

import multiprocessing
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .campaign import Campaign, Result
from .recorded import Plan
from .trial import CLAIM_TTL, Trial, add, mixed_bodies, own_widgets, side_by_side, trial, widget_ids

MISSING = Result({"n": 0, "note": "not run: strace is missing (apt-get install strace)"})
WRITES = ("pwrite64", "fdatasync", "ftruncate", "unlink", "fallocate")
ERRORS = ("EIO", "ENOSPC")
EXIT_STORE, EXIT_PARTLY = 5, 6


def kill_at_each(scale: float) -> Result:
    """Kill a consumer, and a producer, at each system call of a whole cycle, in each of its threads."""
    if shutil.which("strace") is None:
        return MISSING
    with trial() as made, made.maker():
        calls = {(role, *key): most for role in ("consumer", "producer") for key, most in _count(made, role).items()}
        cases = [(*key, number) for key, most in sorted(calls.items()) for number in range(1, most + 1)]
        chosen = cases[:: max(1, round(1 / scale))]
        done = side_by_side(lambda case: _kill_at(made, *case), chosen, 3)
    figures: dict[str, Any] = {"calls": len(cases), "n": len(chosen), "kills": sum(code == -9 for code, _, _ in done)}
    return _summed(figures, chosen, done)


def fail_at_each(scale: float) -> Result:
    """Let each call that writes fail, of a consumer's cycle and of a producer's: once, or from then on.

    strace counts the calls of each thread by itself. The last ones of the main thread are made as it closes the files:
    SQLite then writes their logs into them, and where that fails it keeps the logs for the next to open them. All in
    the logs was synced before, nothing is lost, and the exit code is 0.
    """
    if shutil.which("strace") is None:
        return MISSING
    with trial() as made, made.maker():
        calls: dict[tuple[str, str], int] = {}
        for role in ("consumer", "producer"):
            for (_, call), most in _count(made, role).items():
                if call in WRITES:
                    calls[role, call] = max(most, calls.get((role, call), 0))
        cases = [
            (role, call, error, f"{number}{further}")
            for (role, call), most in sorted(calls.items())
            for error in ERRORS
            for number in range(1, most + 1)
            for further in ("", "+")
        ]
        chosen = cases[:: max(1, round(1 / scale))]
        done = side_by_side(lambda case: _fail_at(made, *case), chosen, 3)
    codes = Counter(f"exit {code}" for code, _, _ in done)
    return _summed({"n": len(chosen), **dict(sorted(codes.items()))}, chosen, done)


def _summed(figures: dict[str, Any], cases: Sequence[Any], done: Sequence[Any]) -> Result:
    violations = []
    for case, (_, counts, broken) in zip(cases, done, strict=True):
        add(figures, counts)
        violations += [f"{' '.join(map(str, case))}: {line}" for line in broken]
    return Result(figures, violations)


def _kill_at(of: Trial, role: str, thread: str, call: str, number: int) -> tuple[int, dict[str, int], list[str]]:
    with trial() as made:
        inject = f"inject={call}:signal=KILL:when={number}"
        code, _ = _cycle(made, of, role, "-e", inject, "-o", "/dev/null", only=thread)
        made.deaths += code == -9
        broken = [] if code in (0, -9) else [f"exit code {code}"]
        counts, violations = made.check(widgets=own_widgets(made, of))
        return code, counts, broken + violations


def _fail_at(of: Trial, role: str, call: str, error: str, number: str) -> tuple[int, dict[str, int], list[str]]:
    with trial() as made:
        inject = f"inject={call}:error={error}:when={number}"
        code, _ = _cycle(made, of, role, "-f", "-e", inject, "-o", "/dev/null")
        broken = [] if code in (0, EXIT_STORE, EXIT_PARTLY) else [f"exit code {code}"]
        broken += (
            ["a traceback"] if any("Traceback" in path.read_text() for path in made.directory.glob("*.err")) else []
        )
        counts, violations = made.check(widgets=own_widgets(made, of))
        return code, counts, broken + violations


def _count(of: Trial, role: str) -> Counter[tuple[str, str]]:
    """How often each thread makes each system call in one cycle."""
    with trial() as made:
        trace = made.path("trace")
        code, threads = _cycle(made, of, role, "-f", "-o", str(trace))
        assert code == 0, f"exit code {code}"
        names = {str(number): name for name, number in threads.items()}
        lines = re.findall(r"^(\d+) +(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE)
        return Counter((names[number], call) for number, call in lines if number in names)


def _cycle(made: Trial, of: Trial, role: str, *words: str, only: str = "") -> tuple[int, dict[str, int]]:
    """Run one cycle with strace attached: the exit code, and the threads. only: that thread alone."""
    made.maker_url = of.maker_url
    here, there = multiprocessing.Pipe()
    if role == "consumer":
        made.post(mixed_bodies(4, seed=4))
        plan = Plan(claim_ttl=CLAIM_TTL, gate=there)
        run = made.consumer("--slots", 1, "--claim-limit", 2, plan=plan, drain=True)
    else:
        plan = Plan(history=made.path("unused"), post_batch=2, gate=there, gate_at="open")
        run = made.producer(widget_ids(4), plan)
    there.close()
    assert here.poll(30), run.err.read_text()
    pid, threads = here.recv()
    with _attached(threads[only] if only else pid, words):
        here.send(None)
        return run.wait(), threads


@contextmanager
def _attached(number: int, words: Sequence[str]) -> Iterator[None]:
    """strace on that process or thread, attached when the block begins."""
    command = ["strace", "-p", str(number), *words]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        assert "attached" in said, said
        yield
        strace.terminate()


CAMPAIGNS = [
    Campaign("syscalls", "SIGKILL of consumer and producer at each system call of a whole cycle", kill_at_each),
    Campaign(
        "ioerrors",
        "an I/O error or a full disk at each call that writes: no traceback, no damage, nothing lost",
        fail_at_each,
    ),
]
