"""What commands show at a terminal: a live line under a consumer's log, and tables; nothing of it in a log of lines."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import closing, suppress
from typing import Any

import pytest
from doubles.scripted_maker import Reply
from rig import Rig, numbered
from support import HERE, wait_until

LINE = re.compile(
    r"(maker \w+  )?[\d,]+/s  \d+ in flight  (?P<queued>[\d,]+|\?) queued(?P<left> \d:\d\d:\d\d left)?"
    r"(  (?P<created>[\d,]+) created)?(  \d+ failed)?"
)
LOG = re.compile(r"\d\d:\d\d:\d\d \[\w+\] \w.*")


class Terminal:
    """A terminal and the process that runs there. shown: all that it wrote so far."""

    def __init__(self, *words: object, columns: int = 80, term: str = "xterm-256color") -> None:
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        size = ("COLUMNS", "LINES")  # of the terminal that the tests run at
        env = {name: value for name, value in os.environ.items() if name not in size} | {"TERM": term}
        command = [sys.executable, *map(str, words)]
        self.process = subprocess.Popen(
            command, cwd=HERE, env=env, stdin=subprocess.DEVNULL, stdout=other, stderr=other
        )
        os.close(other)
        self._written = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._written.decode(errors="ignore").replace("\r\n", "\n")

    def live(self) -> list[str]:
        """Each live line that was there for a time."""
        return re.findall(r"\x1b\[2K([^\x1b\n]*in flight[^\x1b\n]*?)(?=\r)", self.shown)

    def lines(self) -> list[str]:
        """What one sees at the end, without colours."""
        text = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]", "", self.shown).replace("\n\r\x1b[1A", "")
        return [line.rsplit("\x1b[2K", 1)[-1].strip("\r") for line in text.split("\n")]

    def finish(self) -> None:
        """Wait for its end, and for all that it wrote."""
        assert self.process.wait(30) == 0
        self._reader.join()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._side)

    def _read(self) -> None:
        with suppress(OSError):  # so Linux says that nobody holds the other side any more
            while found := os.read(self._side, 65_536):
                self._written += found


def consuming(rig: Rig, *options: object, **how: Any) -> closing[Terminal]:
    words = ["--queue-url", f"sqlite:///{rig.file}", "--maker-url", rig.maker.url, "--receive-counts", rig.counts_file]
    return closing(Terminal("widget_consumer.py", *words, *options, **how))


@pytest.mark.slow
def test_a_live_line_tells_depth_and_outcomes_of_the_same_moment_under_a_whole_log(rig: Rig) -> None:
    rig.maker.answer = lambda post: time.sleep(0.06) or rig.maker.make(post)
    with consuming(rig, "--slots", 4) as running:
        wait_until(lambda: any("0 in flight  0 queued" in line for line in running.live()))
        rig.post(*numbered("w", 600))
        wait_until(lambda: rig.left() == 0)
        wait_until(lambda: any(line.endswith("0 in flight  0 queued  600 created") for line in running.live()))
        running.process.terminate()
        running.finish()
    lines = [LINE.fullmatch(line) or pytest.fail(line) for line in running.live()]
    known = [line for line in lines if line["queued"] != "?"]
    moments = [(int(line["queued"]), int(line["created"] or 0)) for line in known]
    assert len(set(moments)) > 3
    # What is being settled at that moment may be missing in both numbers, or counted in both.
    assert [moment for moment in moments if 0 < sum(moment) < 560 or sum(moment) > 640] == []
    assert any(line["left"] for line in known)
    log = running.lines()
    assert log.pop() == ""  # the live line is gone
    assert [line for line in log if not LOG.fullmatch(line)] == []
    created = [line for line in log if "] created widget=" in line]
    assert len(created) == 600
    assert max(map(len, created)) <= 80 - 36 + len("w599")  # a true widget id has 36 characters


def test_an_open_breaker_stands_first_in_a_line_that_fits_the_terminal(rig: Rig) -> None:
    rig.maker.answer, rig.maker.health = (lambda post: 401), Reply(503)
    rig.post("w")
    with consuming(rig, columns=37) as running:
        wait_until(lambda: "maker misconfigured  0/s  0 in flight" in running.live())
        assert {len(line) for line in running.live()} <= set(range(38))
        assert "\x1b[" in running.shown


@pytest.mark.parametrize(("term", "options"), [("dumb", []), ("xterm", ["--log-format", "json"])], ids=["dumb", "json"])
def test_a_dumb_terminal_and_a_log_in_json_get_plain_lines(rig: Rig, term: str, options: list[str]) -> None:
    rig.post("a", "b")
    with consuming(rig, "--drain", *options, term=term) as running:
        running.finish()
    assert running.shown.count("created") >= 2
    assert "\x1b" not in running.shown
    assert "in flight" not in running.shown


def test_messages_are_a_table_with_a_head_that_fits_the_terminal(rig: Rig) -> None:
    rig.post("w" * 300, "[bold]x[/bold]")
    words = ["-m", "claim_queues", "peek", "--queue-url", f"sqlite:///{rig.file}"]
    with closing(Terminal(*words, columns=70)) as running:
        running.finish()
    head, first, second = (line.rstrip() for line in running.lines()[:-1])
    assert head.split() == ["id", "age", "receives", "body"]
    assert (first[-1], len(first)) == ("…", 70)
    assert "[bold]x[/bold]" in second
