"""OpenStack Zaqar as a service under test, on its MongoDB and its Redis driver.

Each server runs once per process, from the first test that wants it. Time passes on both: Zaqar's own clock is moved,
and for Redis every expiry is brought nearer by as much.
"""

import atexit
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

import pytest
import queue_servers
from backends import Service

from claim_queues import Queues

ZaqarQueues = pytest.importorskip("claim_queues.zaqar").ZaqarQueues  # needs openstacksdk
BRING_EXPIRIES_NEARER = """
redis.replicate_commands()
for _, key in ipairs(redis.call('KEYS', '*')) do
    local left = redis.call('PTTL', key)
    if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
end
"""


class ZaqarService:
    """The queues of one project of a running Zaqar. url: its root."""

    def __init__(self, url: str, advance: Callable[[float], None], closing: ExitStack) -> None:
        self.url = url
        self.advance = advance
        self._closing = closing
        self.queues = self.another()

    def another(self) -> Queues:
        query = urlencode({"endpoint": self.url, "project": "contract"})
        return self._closing.enter_context(ZaqarQueues.from_url(f"zaqar://?{query}"))


@contextmanager
def zaqar_mongodb(directory: Path) -> Iterator[Service]:
    url = mongodb_server()
    with ExitStack() as closing:
        yield ZaqarService(url, lambda seconds: queue_servers.advance(url, seconds), closing)


@contextmanager
def zaqar_redis(directory: Path) -> Iterator[Service]:
    url, redis_port = redis_server()

    def advance(seconds: float) -> None:
        queue_servers.advance(url, seconds)
        bring_expiries_nearer(redis_port, seconds)

    with ExitStack() as closing:
        yield ZaqarService(url, advance, closing)


@cache
def mongodb_server() -> str:
    """The URL of this process's server, which ends with the process."""
    with ExitStack() as started:
        directory = Path(started.enter_context(TemporaryDirectory()))
        url = started.enter_context(queue_servers.zaqar(23, "mongodb", directory / "zaqar.log"))
        atexit.register(started.pop_all().close)
    return url


@cache
def redis_server() -> tuple[str, int]:
    """The URL of this process's server, and its Redis's port; both end with the process."""
    with ExitStack() as started:
        directory = Path(started.enter_context(TemporaryDirectory()))
        port = started.enter_context(queue_servers.redis(directory / "redis.log"))
        url = started.enter_context(queue_servers.zaqar(23, "redis", directory / "zaqar.log", redis_port=port))
        atexit.register(started.pop_all().close)
    return url, port


def bring_expiries_nearer(redis_port: int, seconds: float) -> None:
    """Let that much time pass for all that expires in a Redis."""
    words = ["EVAL", BRING_EXPIRIES_NEARER, "0", str(round(seconds * 1000))]
    command = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.create_connection(("127.0.0.1", redis_port), timeout=10) as connection:
        connection.sendall(command.encode())
        answer = connection.recv(4096)
    assert not answer.startswith(b"-"), answer
