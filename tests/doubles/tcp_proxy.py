"""A TCP proxy that knows nothing of HTTP: it trickles, forgets and cuts what passes, at any byte.

with TcpProxy("127.0.0.1", 5000, lambda number: Fault(answer_bytes=17, end="reset")) as proxy:
    proxy.port                                     # connect here; number counts the connections from 1
"""

import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""


@dataclass(frozen=True)
class Fault:
    """What happens to one connection.

    request_bytes, answer_bytes: how many may pass before it ends; None: all. rest_s: what comes from the client after
    such a rest ends it, as at a firewall that forgets connections. end: "close", "reset", or "hang" (silence until the
    proxy ends). trickle_s: seconds between two bytes of the answer; 0: as they come.
    """

    request_bytes: int | None = None
    answer_bytes: int | None = None
    rest_s: float | None = None
    end: str = "close"
    trickle_s: float = 0.0


NO_FAULT = Fault()


class TcpProxy:
    """Listens on a loopback port; a thread for each connection, which `fault` is asked about."""

    def __init__(self, host: str, port: int, fault: Callable[[int], Fault]) -> None:
        self._target = (host, port)
        self._fault = fault
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):  # it was shut down
            while True:
                client, _ = self._listener.accept()
                fault = self._fault(len(self._threads) + 1)
                self._threads.append(threading.Thread(target=self._serve, args=(client, fault)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with client, ExitStack() as stack, suppress(OSError):
            server = stack.enter_context(socket.create_connection(self._target))
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._pass(client, server, fault):
                return
            if fault.end == "hang":
                self._ended.wait()
            elif fault.end == "reset":
                for side in (client, server):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _pass(self, client: socket.socket, server: socket.socket, fault: Fault) -> bool:
        """Pass bytes both ways; whether it was the fault that ended it."""
        left = {client: fault.request_bytes or sys.maxsize, server: fault.answer_bytes or sys.maxsize}
        passed_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._ended.is_set():
                for key, _ in selector.select(0.05):
                    source, sink = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    data = source.recv(65_536)[: left[source]]
                    has_rested = fault.rest_s and time.monotonic() - passed_at > fault.rest_s
                    if not data or (source is client and has_rested):
                        return bool(data)
                    passed_at = time.monotonic()
                    self._send(sink, data, fault.trickle_s if source is server else 0)
                    left[source] -= len(data)
                    if left[source] == 0:
                        return True
        return False

    def _send(self, sink: socket.socket, data: bytes, trickle_s: float) -> None:
        size = 1 if trickle_s else len(data)
        for start in range(0, len(data), size):
            sink.sendall(data[start : start + size])
            if self._ended.wait(trickle_s):
                return
