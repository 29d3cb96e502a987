"""A terminal that a script of the project is started at."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

from support import HERE


class Terminal:
    """A terminal and the process that runs there. shown: all that it wrote so far.

    typed: what is typed before the start. stdout: a file that its stdout is led to.
    """

    def __init__(
        self,
        *words: object,
        columns: int = 80,
        term: str = "xterm-256color",
        typed: str = "",
        stdout: Path | None = None,
    ) -> None:
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.write(self._side, typed.encode())
        size = ("COLUMNS", "LINES")  # of the terminal that the tests run at
        env = {name: value for name, value in os.environ.items() if name not in size} | {"TERM": term}
        out = os.open(stdout, os.O_WRONLY | os.O_CREAT) if stdout else os.dup(other)
        command = [sys.executable, *map(str, words)]
        self.process = subprocess.Popen(command, cwd=HERE, env=env, stdin=other, stdout=out, stderr=other)
        os.close(other)
        os.close(out)
        self._written = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._written.decode(errors="ignore").replace("\r\n", "\n")

    def exit_code(self) -> int:
        """Wait for its end, and for all that it wrote."""
        code = self.process.wait(60)
        self._reader.join()
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._side)

    def _read(self) -> None:
        with suppress(OSError):  # so Linux says that nobody holds the other side any more
            while found := os.read(self._side, 65_536):
                self._written += found
