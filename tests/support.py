"""What the tests share: names, waiting for a condition, free ports, and the project's scripts as real processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

HERE = Path(__file__).resolve().parent.parent
PATIENCE_S = 30.0
ANSWER_S = 20.0
"""What an HTTP server may take to answer, however busy the machine is."""
REQUESTS, RESPONSES, LETTERS = (f"itchy-octo-chainsaw-{kind}" for kind in ("request", "response", "dead-letter"))


def nth_id(number: int) -> str:
    """A widget id."""
    return f"{number:08x}-54f4-11e5-ad75-3c970e65f731"


def letter(number: int) -> dict[str, Any]:
    """A dead letter."""
    return {
        "version": 1,
        "request_id": f"old-{number}",
        "body": {"widget_id": f"w{number}", "colour": "red"},
        "reason": f"HTTP {500 + number}",
        "receive_count": 5,
        "first_received_at": "2026-01-02T03:04:05.678Z",
        "last_received_at": "2026-01-02T03:14:15.678Z",
    }


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """What the condition gives once it is true; fails the test when that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"nothing came of it within {seconds:g} s"
        time.sleep(0.01)
    return found


def tool_or_skip(name: str, *, package: str) -> str:
    """The path of a program; skips the test where it is not installed. package: Debian's."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} (apt-get install {package})")
    return found


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def under(line: str) -> tuple[str, ...]:
    """A prefix for a script: it is started by a shell that has done this line first."""
    return "sh", "-c", f'{line}; exec "$@"', "sh"


class Script:
    """One of the project's scripts as a process of its own. out, err: what it has written so far.

    prefix: words that come before its command, see `under`.
    """

    def __init__(
        self,
        name: str,
        *options: object,
        cwd: Path,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self._out, self._err = cwd / f"{name}-{id(self)}.out", cwd / f"{name}-{id(self)}.err"
        command = [*prefix, *_command(name), *map(str, options)]
        # Its own session, so that a test can kill it with whatever it started.
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=os.environ | {"PYTHONPATH": str(HERE)} | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of that event in a log that is written as JSON."""
        lines = [json.loads(line) for line in self.err.splitlines(keepends=True) if line.endswith("}\n")]
        return [line for line in lines if line["event"] == name]

    def exit_code(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the end; fails the test, with the log, when that takes longer than `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.err}") from None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def script(name: str, *options: object, **how: Any) -> Iterator[Script]:
    """Run a script until the block ends; it is killed there if it still runs. how: see Script."""
    running = Script(name, *options, **how)
    try:
        yield running
    finally:
        running.kill()


def run(*command: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end. how: see subprocess.run."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)


def run_script(
    name: str, *options: object, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a script of the project to its end."""
    env = os.environ | {"PYTHONPATH": str(HERE)} | (env or {})
    return run(*_command(name), *options, cwd=cwd, env=env, input=stdin)


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", name] if name == "claim_queues" else [sys.executable, str(HERE / name)]


@contextmanager
def widget_maker(cwd: Path, *options: object, port: int | None = None) -> Iterator[tuple[str, Script]]:
    """The maker on a free port, answering: its URL without a path, and the process."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with script("widget_maker.py", "--port", port, "--database", cwd / "widgets.sqlite3", *options, cwd=cwd) as maker:
        wait_until(lambda: status(f"{url}/healthz") or maker.process.poll() is not None)
        assert maker.process.poll() is None, maker.err
        yield url, maker


def status(url: str) -> int:
    """What a GET is answered now; 0: there is no answer."""
    with suppress(requests.RequestException):
        return requests.get(url, timeout=ANSWER_S).status_code
    return 0


def is_healthy(url: str) -> bool:
    return status(f"{url}/healthz") == 200


def widgets(maker_url: str) -> list[str]:
    """The ids of all widgets, as the maker lists them."""
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page = requests.get(f"{maker_url}/widgets", params={"limit": 100, "after": after}, timeout=ANSWER_S).json()
        found += [widget["id"] for widget in page["widgets"]]
        after = page["next"]
    return found


def is_waiting(work: Future[Any], seconds: float = 0.2) -> bool:
    """Whether it is still not done after so long."""
    return not wait([work], seconds).done
