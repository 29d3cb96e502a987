"""What a terminal shows beside plain lines: colours, and one live line under the log; pipes and files get neither."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

REFRESH_S = 0.5
RATE_OVER = 10
"""Refreshes; the rate is that of the last 5 seconds."""
CLEAR, RESET = "\r\x1b[K", "\x1b[0m"
COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can do more than print."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def colour(level: int, stream: TextIO) -> str:
    """What makes the stream's next words stand out as that level's, "" for nothing; https://no-color.org is heard."""
    return COLOURS.get(level, "") if is_terminal(stream) and not os.environ.get("NO_COLOR") else ""


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Log lines above one live line."""

    live = ""

    def emit(self, record: logging.LogRecord) -> None:
        # One write each: other processes may write to the terminal in between.
        before = CLEAR if self.live else ""
        try:
            self.stream.write(f"{before}{self.format(record)}\n{self.live}")
            self.flush()
        except Exception:
            self.handleError(record)

    def show(self, text: str) -> None:
        """Replace the live line; "" removes it. What does not fit the terminal's width is cut off."""
        with self.lock or threading.RLock():
            self.live = text[: os.get_terminal_size(self.stream.fileno()).columns - 1]
            self.stream.write(CLEAR + self.live)
            self.flush()


@contextmanager
def live_line(render: Callable[[], str]) -> Iterator[None]:
    """Show what `render` gives under the log until the block ends, where there is a terminal to show it."""
    handler = next((found for found in logging.getLogger().handlers if isinstance(found, TerminalHandler)), None)
    if handler is None:
        yield
        return
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(REFRESH_S):
            handler.show(render())

    thread = threading.Thread(target=refresh, name="live line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        handler.show("")


class Rate:
    """How fast a number grows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen = deque([(clock(), 0)], maxlen=RATE_OVER)

    def per_second(self, number: int) -> float:
        """The rate, now that it is `number`."""
        self._seen.append((self._clock(), number))
        (since, before), (now, _) = self._seen[0], self._seen[-1]
        return (number - before) / (now - since) if now > since else 0.0


def clock_time(seconds: float) -> str:
    """A duration as H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
