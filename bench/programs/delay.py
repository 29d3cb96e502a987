"""A server that is a network away: `delay.py PORT SERVER_PORT MS` forwards what it receives MS milliseconds later.

So each request takes MS longer, from a first SIGUSR1 on: a queue is loaded without. Since then it writes the number of
requests to $BENCH_DIR/requests, ten times a second: a request is what a client sends at first, or after an answer.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

port, server_port, ms = map(int, sys.argv[1:])
now = SimpleNamespace(delay_s=0.0, requests=0)


def begin():
    now.delay_s, now.requests = ms / 1000, 0


class Half(asyncio.Protocol):
    """One side of a connection: what it receives goes to the other one."""

    def __init__(self, other=None):
        self.other, self.is_client, self.has_answered = other, other is None, True

    def connection_made(self, transport):
        self.transport, self.waiting = transport, []
        if self.is_client:
            loop = asyncio.get_running_loop()
            self.opening = loop.create_task(loop.create_connection(lambda: Half(self), "127.0.0.1", server_port))
            self.opening.add_done_callback(self.opened)

    def opened(self, task):
        _, self.other = task.result()
        for data in self.waiting:
            self.other.transport.write(data)

    def data_received(self, data):
        if self.is_client:
            now.requests += self.has_answered
            self.has_answered = False
            asyncio.get_running_loop().call_later(now.delay_s, self.send, data)
        else:
            self.other.has_answered = True
            self.other.transport.write(data)

    def send(self, data):
        if self.other:
            self.other.transport.write(data)
        else:
            self.waiting.append(data)

    def connection_lost(self, error):
        if self.other:
            self.other.transport.close()


async def main():
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, begin)
    await loop.create_server(Half, "127.0.0.1", port, backlog=512)
    file = Path(os.environ["BENCH_DIR"], "requests")
    while True:
        file.write_text(str(now.requests))
        await asyncio.sleep(0.1)


asyncio.run(main())
