"""An HTTP server whose every answer a test decides, and one that passes on to another what the test leaves alone.

with FaultProxy("http://127.0.0.1:8888") as proxy:
    proxy.url                                                  # what the service under test is given
    proxy.fail("POST /v2/queues/q/claims", Reply(503), times=2)
    proxy.fail("DELETE", proxy.lose)                           # done, but the answer is lost
    proxy.fail("SendMessageBatch", LOST)                       # an operation of SQS; not done
    proxy.requests, proxy.connections                          # what came over the wire
"""

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self

import requests

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "host"}


@dataclass(frozen=True)
class Request:
    """A request as it came. connection: the number of its TCP connection, from 1. at: monotonic seconds."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int = 0
    at: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def asks_for(self, part: str) -> bool:
        """Whether its method and path, or SQS's operation, hold that part."""
        return part in f"{self.method} {self.path} {self.headers.get('X-Amz-Target')}"


@dataclass(frozen=True)
class Reply:
    """A whole answer. body: text and bytes are sent as they are, anything else as JSON. before: bytes sent before it.

    status 0: no answer, the connection is reset. headers: replace those of the same name; None leaves one of them
    (Content-Length, Content-Type) out.
    """

    status: int
    body: Any = ""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    before: bytes = b""


LOST = Reply(0)
Answer = Callable[[Request], Reply | None]
"""None: no answer, the connection is closed."""


class HttpDouble:
    """An HTTP/1.1 server with kept-alive connections on a loopback port, a thread for each connection.

    answer: called for each request, in its connection's thread. requests, connections: so far.
    """

    def __init__(self, answer: Answer | None = None, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer or (lambda _: Reply(404))
        self.requests: list[Request] = []
        self.connections = 0
        self.tls = tls
        self.port = port
        self._server: _Server | None = None
        self.up()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections until up(), or the block ends, as while a server is started again."""
        self._stop()
        yield
        self.up()

    def up(self) -> None:
        """Accept connections again."""
        if self._server is None:
            self._server = server = _Server(self, self.port)
            self.port = server.server_address[1]
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            server.cut_all()


class FaultProxy(HttpDouble):
    """Passes every request on to the server at `target`, but for those that `fail` names."""

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(self.serve, tls=tls)
        self.target = target
        self._session = requests.Session()
        self._session.trust_env = False

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._session.close()

    def serve(self, request: Request) -> Reply:
        """What the server behind answers."""
        kept = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        options: dict[str, Any] = {"headers": kept, "data": request.body, "allow_redirects": False, "timeout": 60}
        answer = self._session.request(request.method, self.target + request.path, **options)
        found = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        return Reply(answer.status_code, answer.content, found)

    def lose(self, request: Request) -> Reply:
        """Do what is asked, and lose the answer."""
        self.serve(request)
        return LOST

    def fail(self, part: str, answer: Reply | Answer, *, times: int = 10**6) -> None:
        """Answer so often the requests that ask for `part` in this way; serve all others."""
        left = iter(range(times))

        def decide(request: Request) -> Reply:
            if not request.asks_for(part) or next(left, None) is None:
                return self.serve(request)
            return answer if isinstance(answer, Reply) else answer(request)

        self.answer = decide

    def asked(self, part: str) -> list[Any]:
        """The JSON bodies of the requests so far that asked for `part`."""
        return [request.json for request in self.requests if request.asks_for(part)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # one of them may end the server
    request_queue_size = 128
    server_address: tuple[str, int]

    def __init__(self, double: HttpDouble, port: int) -> None:
        self.double = double
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without the name look-up of HTTPServer

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.double.connections += 1
        self._open.add(connection)
        return connection, (*address, self.double.connections)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        """What the client did to its connection is the test's business, not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        if tls := self.server.double.tls:
            self.request = tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, self.headers, body, self.client_address[-1], time.monotonic())
        self.server.double.requests.append(request)
        reply = self.server.double.answer(request)
        if reply and reply.status:
            self._send(reply)
            return
        self.close_connection = True
        if reply:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_POST  # noqa: N815

    def _send(self, reply: Reply) -> None:
        text = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        content = text.encode() if isinstance(text, str) else text
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(reply.headers)
        self.wfile.write(reply.before)
        self.send_response_only(reply.status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.close_connection = self.close_connection or headers["Content-Length"] is None

    def log_message(self, *_: Any) -> None:
        """Nothing: the test looks at `requests`."""
