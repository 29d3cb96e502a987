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

import processes
from backends import Service

from claim_queues import Queues
from claim_queues.zaqar import ZaqarQueues

BRING_EXPIRIES_NEARER = """
redis.replicate_commands()
for _, key in ipairs(redis.call('KEYS', '*')) do
    local left = redis.call('PTTL', key)
    if left >= 0 then redis.call('PEXPIRE', key, left - ARGV[1]) end
end
"""
MONGODB_DEFECTS = {
    "test_a_lapsed_claim_cannot_delete": "XM1: an expired claim deletes what nobody has claimed since",
}
REDIS_DEFECTS = {
    "test_a_claim_passes_over_claimed_messages_anywhere_in_the_queue": "XR1: hands out what others hold",
    "test_a_message_that_would_expire_in_a_claim_lives_on_until_the_grace_after_it": "XR2: ignores grace",
    "test_a_lapsed_claim_cannot_be_renewed": "XR3: renewing an expired claim is HTTP 503",
    "test_a_lapsed_claim_cannot_renew_what_another_holds": "XR3: renewing an expired claim is HTTP 503",
    "test_releasing_too_late_leaves_alone_what_another_holds": "XR4: releasing an expired claim is HTTP 503",
    "test_messages_whose_claim_lapsed_count_as_free": "XR6: stats are HTTP 503 once a claim or message expired",
    "test_expired_messages_are_not_counted": "XR6: stats are HTTP 503 once a claim or message expired",
    "test_a_lapsed_claim_cannot_delete_what_another_holds": "XR17: deleting what another holds is HTTP 503",
    "test_a_delete_leaves_other_queues_alone": "XR18: a message is deleted through any queue",
}
"""Tests of the contract that cannot hold, by name, with the driver's own defect that each meets."""


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
        yield ZaqarService(url, lambda seconds: processes.advance(url, seconds), closing)


@contextmanager
def zaqar_redis(directory: Path) -> Iterator[Service]:
    url, redis_port = redis_server()

    def advance(seconds: float) -> None:
        processes.advance(url, seconds)
        bring_expiries_nearer(redis_port, seconds)

    with ExitStack() as closing:
        yield ZaqarService(url, advance, closing)


@cache
def mongodb_server() -> str:
    """The URL of this process's server, which ends with the process."""
    with ExitStack() as started:
        directory = Path(started.enter_context(TemporaryDirectory()))
        url = started.enter_context(processes.zaqar(23, "mongodb", directory / "zaqar.log"))
        atexit.register(started.pop_all().close)
    return url


@cache
def redis_server() -> tuple[str, int]:
    """The URL of this process's server, and its Redis's port; both end with the process."""
    with ExitStack() as started:
        directory = Path(started.enter_context(TemporaryDirectory()))
        port = started.enter_context(processes.redis(directory / "redis.log"))
        url = started.enter_context(processes.zaqar(23, "redis", directory / "zaqar.log", redis_port=port))
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
