"""OpenStack Zaqar as a service under test, on its MongoDB and its Redis driver.

Each server runs once per process, from the first test that wants it. Time passes on both: Zaqar's own clock is moved,
and for Redis every expiry is brought nearer by as much.
"""

import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from urllib.parse import urlencode

import pytest
import queue_servers
from backends import Service, until_exit
from support import ANSWER_S

ZaqarQueues = pytest.importorskip("claim_queues.zaqar").ZaqarQueues  # needs openstacksdk
BRING_EXPIRIES_NEARER = """
redis.replicate_commands()
for _, key in ipairs(redis.call('KEYS', '*')) do
    local left = redis.call('PTTL', key)
    if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
end
"""


def zaqar_mongodb(directory: Path) -> Service:
    return _service(mongodb_server(), partial(queue_servers.advance, mongodb_server()))


def zaqar_redis(directory: Path) -> Service:
    def advance(seconds: float) -> None:
        queue_servers.advance(redis_server(), seconds)
        _bring_expiries_nearer(seconds)

    return _service(redis_server(), advance)


def _service(url: str, advance: Callable[[float], None]) -> Service:
    """The queues of one project of a running Zaqar."""
    query = urlencode({"endpoint": url, "project": "contract"})
    return Service(lambda: ZaqarQueues.from_url(f"zaqar://?{query}"), advance, url=url)


@cache
def mongodb_server() -> str:
    """The URL of this process's server."""
    return until_exit(partial(queue_servers.zaqar, 23, "mongodb"))


@cache
def redis_server() -> str:
    """The URL of this process's server on Redis."""
    return until_exit(partial(queue_servers.zaqar, 23, "redis", redis_port=_redis_port()))


@cache
def _redis_port() -> int:
    return until_exit(queue_servers.redis)


def _bring_expiries_nearer(seconds: float) -> None:
    """Let that much time pass for all that expires in this process's Redis."""
    words = ["EVAL", BRING_EXPIRIES_NEARER, "0", str(round(seconds * 1000))]
    command = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.create_connection(("127.0.0.1", _redis_port()), timeout=ANSWER_S) as connection:
        connection.sendall(command.encode())
        answer = connection.recv(4096)
    assert not answer.startswith(b"-"), answer
