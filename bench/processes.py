"""Start and end processes, pinned to a core or not, and read what they cost from /proc."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 8


class Process:
    """A shell command in a session of its own. core: the one that it and all its children may use."""

    def __init__(self, command: str, env: dict[str, str], core: str | None, log: Any) -> None:
        words = ["taskset", "-c", core] if core else []
        command_line = [*words, "bash", "-c", command]
        self._process = subprocess.Popen(command_line, env=env, start_new_session=True, stdout=log, stderr=log)
        self._spent = 0.0

    def has_ended(self) -> bool:
        """Without a look through /proc, which would take a fifth of a core from those that are measured."""
        if self._process.returncode is None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self._spent = usage.ru_utime + usage.ru_stime
        return self._process.returncode is not None

    def cpu_s(self) -> float:
        """User and system seconds of all its processes; once it has ended, what the kernel reported then."""
        return self._spent if self.has_ended() else sum(self._family().values()) / TICK

    def rss_mib(self) -> float:
        """Resident memory of all its processes; pages that forks share count for each."""
        pages = 0
        for pid in self._family():
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 2**20

    def wait_for_port(self, port: int) -> None:
        give_up_at = time.monotonic() + 5 * PATIENCE_S
        while time.monotonic() < give_up_at and not self.has_ended():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"nothing listens on port {port}")

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        """End it, and all of its session."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            give_up_at = time.monotonic() + PATIENCE_S
            while time.monotonic() < give_up_at:
                if self.has_ended() and not self._family():
                    return
                time.sleep(0.05)

    def _family(self) -> dict[int, int]:
        """CPU ticks by pid of the live processes of its session."""
        found = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if fields[0] != "Z" and int(fields[3]) == self._process.pid:
                        found[int(entry.name)] = sum(map(int, fields[11:15]))
        return found


def require_free_port(port: int) -> None:
    """Raise RuntimeError where something listens there already: a server may share the port, and answer for ours."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        raise RuntimeError(f"something listens on port {port}, perhaps what a stopped benchmark left: end it first")
