"""`make demo` and `make run`: the first things that a newcomer types."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import HERE, free_port, tool_or_skip, wait_until


def test_the_demo_shows_how_its_requests_end() -> None:
    done = subprocess.run([sys.executable, HERE / "demo/demo.py"], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    _, _, table = done.stdout.partition("outcome\n")
    counted = dict(reversed(line.split(maxsplit=1)) for line in table.splitlines())
    assert counted.pop("created") == "21"
    assert counted.pop("created: was already there") == "1"
    ((reason, number),) = counted.items()
    assert reason.startswith("rejected: ")
    assert number == "1"


def test_make_run_makes_widgets_until_it_is_interrupted(tmp_path: Path) -> None:
    make = tool_or_skip("make", package="make")
    if not (HERE / ".venv" / "installed").exists():
        pytest.skip("needs .venv (make setup)")
    port, log = free_port(), tmp_path / "log"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    env |= {"WIDGET_PORT": str(port), "WIDGET_MAKER_URL": f"http://127.0.0.1:{port}/widgets"}
    with log.open("wb") as out:
        running = subprocess.Popen([make, "run"], cwd=HERE, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until(lambda: re.search(r"producer.* created$", log.read_text(), re.M))
        os.killpg(running.pid, signal.SIGINT)
        running.wait(60)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert "unavailable" not in log.read_text()
    assert "Traceback" not in log.read_text()
