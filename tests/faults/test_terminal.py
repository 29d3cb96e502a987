"""What the scripts show on a terminal of 80 columns; nothing of it reaches pipes, or terminals that are dumb."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from scripted_maker import Raw, Reply, ScriptedMaker
from support import HERE, wait_until

from claim_queues import open_queues

COLUMNS = 80
XTERM = {"TERM": "xterm-256color", "NO_COLOR": ""}
STATUS = re.compile(r"\d+/s  \d+ in flight  \d+ queued( \d:\d\d:\d\d)?(  \d+ created)?(  \d+ rejected)?")


class Terminal:
    """A process whose stderr, and on request stdout, is a terminal. shown: all that it wrote there so far."""

    def __init__(self, process: subprocess.Popen[bytes], side: int) -> None:
        self.process = process
        self._side = side
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def shown(self) -> str:
        return self._written.decode()

    def lines(self) -> list[str]:
        """What one would see: the lines as they are after everything that overwrote them."""
        return [line.rsplit("\r\x1b[K", 1)[-1].rstrip("\r") for line in self.shown.split("\n")]

    def live_lines(self) -> list[str]:
        return re.findall(r"\r\x1b\[K([^\r\n\x1b]+)(?=\r\x1b\[K)", self.shown)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._side)

    def _read(self) -> None:
        with suppress(OSError):  # the other side is closed
            while found := os.read(self._side, 65_536):
                self._written += found


@contextmanager
def terminal(*words: object, cwd: Path, env: dict[str, str]) -> Iterator[Terminal]:
    side, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    command = [sys.executable, str(HERE / str(words[0])), *map(str, words[1:])]
    process = subprocess.Popen(
        command, cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=other
    )
    os.close(other)
    running = Terminal(process, side)
    try:
        yield running
    finally:
        running.end()


@pytest.fixture
def maker() -> Iterator[ScriptedMaker]:
    with ScriptedMaker() as running:
        yield running


def post(*bodies: Any) -> None:
    with open_queues() as queues:
        queues.post("itchy-octo-chainsaw-request", list(bodies))


def request(number: int) -> dict[str, str]:
    return {"widget_id": f"{number:08x}-54f4-11e5-ad75-3c970e65f731"}


def consumer(maker: ScriptedMaker, *options: object, cwd: Path, env: dict[str, str]) -> Any:
    return terminal("widget_consumer.py", "--maker-url", maker.url, *options, cwd=cwd, env=env)


def test_a_live_line_under_the_log_tells_what_goes_on(maker: ScriptedMaker, tmp_path: Path) -> None:
    post(*map(request, range(30)), {"widget_id": "no id"})
    maker.answer = lambda found: Raw(end="hang") if found.widget_id == request(29)["widget_id"] else maker.real(found)
    with consumer(maker, "--slots", 2, cwd=tmp_path, env=XTERM) as running:
        told = "1 in flight  1 queued  29 created  1 rejected"
        wait_until(lambda: any(line.endswith(told) for line in running.live_lines()))
        assert all(STATUS.fullmatch(line) for line in running.live_lines()), running.live_lines()
        maker.answer = maker.real
        maker.release()
        wait_until(lambda: "0 in flight  0 queued  30 created" in "".join(running.live_lines()))
        assert all(len(line) < COLUMNS for line in running.live_lines())
        running.process.terminate()
        assert running.process.wait(10) == 0
    log = running.lines()
    assert log.pop() == ""  # the live line is gone
    assert len([line for line in log if " created " in line]) == 30
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ", line) for line in log)


def test_a_drain_tells_the_time_left(maker: ScriptedMaker, tmp_path: Path) -> None:
    post(*map(request, range(300)))

    def answer(found: Any) -> Reply:
        threading.Event().wait(0.02)
        return maker.real(found)

    maker.answer = answer
    with consumer(maker, "--slots", 2, "--drain", cwd=tmp_path, env=XTERM) as running:
        assert running.process.wait(60) == 0
    assert [line for line in running.live_lines() if re.search(r"\d queued 0:00:\d\d  ", line)]


def test_an_open_breaker_stands_in_the_live_line(maker: ScriptedMaker, tmp_path: Path) -> None:
    post(request(1))
    maker.answer, maker.health = (lambda found: Reply(503)), Reply(503)
    with consumer(maker, cwd=tmp_path, env=XTERM) as running:
        wait_until(lambda: any(line.startswith("maker unavailable  ") for line in running.live_lines()))
        assert "\x1b[33mwarning\x1b[0m the maker is unavailable" in running.shown


def test_no_color_takes_the_colours_and_leaves_the_live_line(maker: ScriptedMaker, tmp_path: Path) -> None:
    post(request(1))
    maker.answer, maker.health = (lambda found: Reply(503)), Reply(503)
    with consumer(maker, cwd=tmp_path, env=XTERM | {"NO_COLOR": "1"}) as running:
        wait_until(lambda: any(line.startswith("maker unavailable  ") for line in running.live_lines()))
        assert "warning the maker is unavailable" in running.shown
        assert re.search(r"\x1b\[[0-9;]*m", running.shown) is None


@pytest.mark.parametrize(
    ("env", "options"), [({"TERM": "dumb"}, []), (XTERM, ["--log-format", "json"])], ids=["dumb", "json"]
)
def test_a_dumb_terminal_and_a_log_as_json_get_plain_lines(
    maker: ScriptedMaker, tmp_path: Path, env: dict[str, str], options: list[str]
) -> None:
    post(request(1), "no request")
    with consumer(maker, "--drain", *options, cwd=tmp_path, env=env) as running:
        assert running.process.wait(30) == 0
    wait_until(lambda: running.shown.count("\n") == 4)
    assert "\x1b" not in running.shown


@pytest.mark.parametrize(("env", "bar"), [(XTERM, True), ({"TERM": "dumb"}, False)], ids=["xterm", "dumb"])
def test_the_producer_shows_its_progress_where_a_terminal_can(tmp_path: Path, env: dict[str, str], bar: bool) -> None:
    with terminal("widget_producer.py", "--count", 20_000, cwd=tmp_path, env=env) as running:
        assert running.process.wait(60) == 0
    assert bool(re.search(r"\d+/20000 \[[\d:]+<[\d:?]+, .*requests/s\]", running.shown)) == bar
    assert bar or not running.shown
