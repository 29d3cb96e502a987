"""The parts of the live line that need no terminal."""

import io
import logging

import pytest

from claim_queues.terminal import Rate, TerminalHandler, clock_time, colour, is_terminal


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_a_duration_is_shown_in_hours_minutes_and_seconds(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_the_rate_is_that_of_the_last_looks() -> None:
    now = [100.0]
    rate = Rate(clock=lambda: now[0])
    assert rate.per_second(0) == 0
    for second in range(1, 30):
        now[0] += 1
        assert rate.per_second(10 * second) == 10
    for _ in range(9):
        now[0] += 1
        last = rate.per_second(290)
    assert last == 0


@pytest.mark.parametrize(
    ("stream", "env", "shows"),
    [
        (Tty(), {"TERM": "xterm"}, (True, True)),
        (Tty(), {"TERM": "xterm", "NO_COLOR": "1"}, (True, False)),
        (Tty(), {"TERM": "dumb"}, (False, False)),
        (Tty(), {}, (False, False)),
        (io.StringIO(), {"TERM": "xterm"}, (False, False)),
    ],
)
def test_colours_are_for_terminals_that_show_them(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, env: dict[str, str], shows: tuple[bool, bool]
) -> None:
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert (is_terminal(stream), bool(colour(logging.ERROR, stream))) == shows
    assert colour(logging.INFO, stream) == ""


def test_a_log_without_a_live_line_is_plain() -> None:
    stream = Tty()
    TerminalHandler(stream).emit(logging.makeLogRecord({"msg": "hello"}))
    assert stream.getvalue() == "hello\n"
