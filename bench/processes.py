"""Start and end processes, pinned to a core or not, and read what they cost from /proc."""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
FAVOUR = os.environ.get("BENCH_FAVOUR", "")
"""A nice value, such as -10, for all that is measured beside other work (root); a session is a group of its own."""


def spawn(command: str, env: dict[str, str], core: str | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Run a shell command in a session of its own; core: the one that it and all its children may use."""
    words = ["taskset", "-c", core] if core else []
    process = subprocess.Popen([*words, "bash", "-c", command], env=env, start_new_session=True, **options)
    if FAVOUR:
        Path(f"/proc/{process.pid}/autogroup").write_text(FAVOUR)
    return process


def end(process: subprocess.Popen[Any], patience_s: float = 8) -> None:
    """End a process that spawn() started, and the session that it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        break
    give_up_at = time.monotonic() + 3
    while (left := _family(process.pid)) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cpu_s(process: subprocess.Popen[Any] | None) -> float:
    """User and system seconds of the process, of what it started, and of what those waited for.

    Once the process has ended by itself this is what the kernel reports at its end. None costs nothing.
    """
    if process is None:
        return 0.0
    seconds = 0.0 if has_ended(process) else sum(_family(process.pid).values()) / TICK
    return process.spent if has_ended(process) else seconds


def has_ended(process: subprocess.Popen[Any]) -> bool:
    """Without a look through /proc, which would take a fifth of a core from those that are measured."""
    if process.returncode is None:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            process.spent = usage.ru_utime + usage.ru_stime
    return process.returncode is not None


def idle_s() -> float:
    """Seconds that the machine's cores had nothing to do, or waited for the disk, since it was started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / TICK


def waited_s(process: subprocess.Popen[Any]) -> float:
    """Seconds that its live threads could have run but did not: the core was busy with something else."""
    total = 0
    for pid in _family(process.pid):
        with contextlib.suppress(OSError):
            for task in os.scandir(f"/proc/{pid}/task"):
                total += int(Path(task.path, "schedstat").read_text().split()[1])
    return total / 1e9


def rss_mib(process: subprocess.Popen[Any]) -> float:
    """Resident memory of all its processes; pages that forks share count for each."""
    total = 0
    for pid in _family(process.pid):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return total / 2**20


def spin_ms() -> float:
    """CPU milliseconds of a loop that is always the same: more of them when neighbours slow the machine down."""
    start, total = time.process_time(), 0
    for number in range(100_000):
        total += number
    return (time.process_time() - start) * 1000


def wake_us(cores: Sequence[str], times: int = 1000) -> float:
    """Microseconds that a byte takes to another core and back, where each side has to be woken for it."""
    (here, to_here), (there, to_there) = os.pipe(), os.pipe()
    allowed = os.sched_getaffinity(0)
    other = os.fork()
    os.sched_setaffinity(0, {int(cores[other != 0])})
    if other == 0:
        for _ in range(times):
            os.write(to_here, os.read(there, 1))
        os._exit(0)
    start = time.perf_counter()
    for _ in range(times):
        os.write(to_there, b".")
        os.read(here, 1)
    took = time.perf_counter() - start
    os.waitpid(other, 0)
    os.sched_setaffinity(0, allowed)
    for end_of_pipe in (here, to_here, there, to_there):
        os.close(end_of_pipe)
    return took / times * 1e6


def sync_ms(directory: Path, times: int = 15) -> float:
    """Median milliseconds to sync a page that is written again, on a disk that had nothing to do for 20 ms."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(times + 1):  # the first makes the file longer
            time.sleep(0.02)
            start = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(4096), 0)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - start) * 1000)
    return statistics.median(took[1:])


def late_percent(naps: int = 1000) -> float:
    """How many of 100 naps of 1 ms last 3 ms or longer while nothing else runs: what a wake-up risks by itself."""
    late = 0
    for _ in range(naps):
        start = time.perf_counter()
        time.sleep(0.001)
        late += time.perf_counter() - start >= 0.003
    return late / naps * 100


def require_free_port(port: int) -> None:
    """Raise RuntimeError where something listens there already: a server may share the port, and answer for ours."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        raise RuntimeError(f"something listens on port {port}, perhaps what a stopped benchmark left: end it first")


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 40) -> None:
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if has_ended(process):
            raise RuntimeError(f"the server for port {port} ended with {process.returncode}")
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")


def _family(root: int) -> dict[int, int]:
    """CPU ticks by pid of the live processes of the session that root leads, and of all below them."""
    every = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    every[int(entry.name)] = (int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])))
    chosen = {pid for pid, (_, session, _) in every.items() if root in (pid, session)}
    grown = True
    while grown:
        more = {pid for pid, (parent, _, _) in every.items() if parent in chosen and pid not in chosen}
        chosen |= more
        grown = bool(more)
    return {pid: every[pid][2] for pid in chosen}
