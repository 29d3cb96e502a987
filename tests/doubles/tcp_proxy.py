"""A TCP proxy that knows nothing of HTTP: it delays, trickles, forgets and cuts what passes, at any byte.

with TcpProxy("127.0.0.1", 5000, lambda number: Fault(answer_bytes=17, end="reset")) as proxy:
    proxy.port                                     # connect here; number counts the connections from 1
"""

import selectors
import socket
import struct
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
    client goes or the proxy ends). latency_s: before what comes is passed on. piece: bytes passed at once, `every_s`
    seconds apart; 0: as they come. answers_alone: these three concern what the server sends.
    """

    request_bytes: int | None = None
    answer_bytes: int | None = None
    rest_s: float | None = None
    end: str = "close"
    latency_s: float = 0.0
    piece: int = 0
    every_s: float = 0.0
    answers_alone: bool = False


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
        number = 0
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            thread = threading.Thread(target=self._serve, args=(client, self._fault(number)))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with ExitStack() as stack, suppress(OSError):
            stack.enter_context(client)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = stack.enter_context(socket.create_connection(self._target))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._pass(client, server, fault):
                self._end(client, server, fault)

    def _pass(self, client: socket.socket, server: socket.socket, fault: Fault) -> bool:
        """Pass bytes both ways; whether it was the fault that ended it."""
        left = {client: fault.request_bytes, server: fault.answer_bytes}
        if 0 in left.values():
            return True
        passed_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while not self._ended.is_set():
                for key, _ in selector.select(0.05):
                    source, sink = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    data = source.recv(65_536)
                    if not data:
                        return False
                    if source is client and fault.rest_s and time.monotonic() - passed_at > fault.rest_s:
                        return True
                    passed_at = time.monotonic()
                    allowed = left[source]
                    part = data if allowed is None else data[:allowed]
                    self._send(sink, part, NO_FAULT if fault.answers_alone and source is client else fault)
                    if allowed is not None:
                        left[source] = allowed - len(part)
                        if left[source] == 0:
                            return True
        return False

    def _send(self, sink: socket.socket, data: bytes, fault: Fault) -> None:
        self._ended.wait(fault.latency_s)
        size = fault.piece or len(data)
        for start in range(0, len(data), size):
            sink.sendall(data[start : start + size])
            if fault.every_s and self._ended.wait(fault.every_s):
                return

    def _end(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        if fault.end == "hang":
            client.settimeout(0.05)
            while not self._ended.is_set():
                try:
                    if not client.recv(65_536):
                        return
                except TimeoutError:
                    continue
        elif fault.end == "reset":
            for side in (client, server):
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
