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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import requests

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "host"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def asks_for(self, part: str) -> bool:
        """Whether its method and path, or SQS's operation, hold that part."""
        return part in f"{self.method} {self.path} {self.headers.get('X-Amz-Target')}"


@dataclass(frozen=True)
class Reply:
    """status 0: the connection is reset. body: text and bytes as they are, anything else as JSON."""

    status: int
    body: Any = ""
    headers: Mapping[str, str] = field(default_factory=dict)


LOST = Reply(0)
Answer = Callable[[Request], Reply]


class HttpDouble:
    """answer: called for each request, in its connection's thread. requests, connections: so far."""

    def __init__(self, answer: Answer | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer or (lambda _: Reply(404))
        self.requests: list[Request] = []
        self.connections = 0
        self.tls = tls
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": self}))
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


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
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """What the client did to its connection is the test's business, not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    double: HttpDouble

    def setup(self) -> None:
        self.double.connections += 1
        if self.double.tls:
            self.request = self.double.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, self.headers, body)
        self.double.requests.append(request)
        reply = self.double.answer(request)
        if not reply.status:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close_connection = True
            return
        text = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        content = text.encode() if isinstance(text, str) else text
        self.send_response_only(reply.status)
        for name, value in ({"Content-Type": "application/json"} | dict(reply.headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing: the test looks at `requests`."""
