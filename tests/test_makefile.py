"""What make's targets do, as far as no other test runs them."""

import re
import socket
import subprocess
from pathlib import Path

import pytest
import queue_servers
from support import HERE, tool_or_skip

MAKEFILE = (HERE / "Makefile").read_text()


def test_make_alone_prints_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)
    command = [tool_or_skip("make", package="make"), "--no-print-directory"]  # which it would do under `make test`
    printed = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert {line.split()[1] for line in printed.splitlines()} == set(phony.split())


@pytest.mark.parametrize("name", ["zaqar", "sqs"])
def test_a_port_that_is_taken_is_said(name: str) -> None:
    pattern = rf"@((\S+/bin/python) tests/servers/{name}_server\.py (\d+).*>/dev/null)"
    ((command, python, port),) = re.findall(pattern, MAKEFILE)
    if not Path(HERE, python).exists():
        pytest.skip(f"needs {python} (make servers)")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = command.replace(port, str(taken.getsockname()[1]))
        done = subprocess.run(there, shell=True, cwd=HERE, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert re.search("address already in use", done.stderr, re.I)


def test_the_local_zaqar_starts_without_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with queue_servers.zaqar(23, "mongodb", log):
        assert "Serving on" in log.read_text()
    assert "Traceback" not in log.read_text()
