"""A widget maker whose every answer a test decides.

    with ScriptedMaker() as maker:
        maker.url                                              # http://127.0.0.1:PORT/widgets
        maker.answer = lambda request: Reply(503, headers={"Retry-After": "1"})
        maker.answer = lambda request: Reply(500) if request.widget_id == bad else maker.real(request)
        maker.answer = lambda request: Raw(end="hang")         # until maker.release(), or the block ends
        maker.health = Reply(503)                              # what GET /healthz says
        maker.requests, maker.widgets                          # what it was asked for, what it made

Left alone it answers as the real maker does, from memory.
"""

import json
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

UUID_V1 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-1[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""


@dataclass(frozen=True)
class Request:
    """A request as it came. connection: number of the TCP connection, from 1, that brought it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def widget_id(self) -> Any:
        return self.json["widget_id"]

    @property
    def is_batch(self) -> bool:
        return self.path.partition("?")[0].endswith("/batch")


@dataclass(frozen=True)
class Reply:
    """A whole answer. body: text and bytes are sent as they are, anything else as JSON.

    headers: replace those of the same name; None leaves one of them (Content-Length, Content-Type) out.
    """

    status: int
    body: Any = ""
    headers: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes sent as they are, `every` seconds apart, and what then becomes of the connection.

    end: "close"; "reset" (the client sees a TCP reset); "hang" (nothing until release()); "keep" (next request).
    """

    chunks: Iterable[bytes] = ()
    every: float = 0.0
    end: str = "close"


class ScriptedMaker:
    """An HTTP/1.1 server with kept-alive connections on a loopback port, a thread for each connection.

    answer: called for each POST, in the connection's thread: it may block, or count, or look at `requests`.
    health: the answer to GET /healthz. requests: every POST. others: every other request. connections: TCP
    connections accepted. widgets: made by real(). What `answer` raises closes the connection and is raised again when
    the block ends.
    """

    answers_all = False
    """Whether `answer` decides about requests of every method; else about all but GET."""

    def __init__(self, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answer: Callable[[Request], Reply | Raw] = self.real
        self.health: Reply | Raw = Reply(200, {"status": "ok"})
        self.requests: list[Request] = []
        self.others: list[Request] = []
        self.widgets: dict[str, str] = {}
        self.connections = 0
        self.errors: list[BaseException] = []
        self.released = threading.Event()
        self.tls = tls
        self._lock = threading.Lock()
        self._server = _Server(self, port)
        self.port = self._server.server_port
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/widgets"
        # Polls only to notice the end; a request wakes it at once.
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def real(self, request: Request) -> Reply:
        """What the real maker answers: 201 for a new id, 200 for a known one, 422 for what is no UUID version 1.

        A batch is answered item by item.
        """
        if not request.is_batch:
            return self.make(request.widget_id)
        answers = [(item["message_id"], self.make(item["request"]["widget_id"])) for item in request.json]
        items = [{"message_id": id_, "status": reply.status, "body": reply.body} for id_, reply in answers]
        return Reply(200, {"answers": items})

    def make(self, widget_id: Any) -> Reply:
        """What a request for this widget is answered."""
        if not isinstance(widget_id, str) or not UUID_V1.fullmatch(widget_id):
            error = {"code": "invalid_widget_id", "message": "widget_id must be a version 1 UUID"}
            return Reply(422, {"error": error})
        widget_id = widget_id.lower()
        with self._lock:
            status = 200 if widget_id in self.widgets else 201
            created_at = self.widgets.setdefault(widget_id, "2026-01-02T03:04:05.678Z")
        return Reply(status, {"id": widget_id, "created_at": created_at})

    def release(self) -> None:
        """Let everything that hangs or trickles end, now and from now on."""
        self.released.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()
        if self.errors and error is None:
            raise self.errors[0]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for them
    request_queue_size = 128

    def __init__(self, maker: ScriptedMaker, port: int) -> None:
        self.maker = maker
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)  # without the name look-up of HTTPServer
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.maker.connections += 1
        self._open.add(connection)
        return connection, (*address, self.maker.connections)

    def shutdown_request(self, request: socket.socket) -> None:
        self._open.discard(request)
        self.close_request(request)  # without the shutdown() that would come before a reset

    def replace(self, plain: socket.socket, wrapped: socket.socket) -> None:
        self._open.discard(plain)
        self._open.add(wrapped)

    def end_connections(self) -> None:
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What the client did to its connection is the test's business, not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        if self.server.maker.tls is not None:
            plain = self.request
            plain.settimeout(10)
            self.request = self.server.maker.tls.wrap_socket(plain, server_side=True)
            self.server.replace(plain, self.request)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.server.shutdown_request(self.request)

    def do_POST(self) -> None:
        request = self._request()
        self.server.maker.requests.append(request)
        try:
            answer = self.server.maker.answer(request)
        except BaseException as error:
            self.server.maker.errors.append(error)
            self.close_connection = True
            return
        self._send(answer)

    do_PUT = do_PATCH = do_DELETE = do_HEAD = do_POST  # noqa: N815

    def do_GET(self) -> None:
        if self.server.maker.answers_all:
            self.do_POST()
            return
        self.server.maker.others.append(self._request())
        self._send(self.server.maker.health if self.path == "/healthz" else Reply(404))

    def log_message(self, *args: Any) -> None:
        """Nothing: the test looks at `requests`."""

    def _request(self) -> Request:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return Request(self.command, self.path, self.headers, body, self.client_address[-1])

    def _send(self, answer: Reply | Raw) -> None:
        if isinstance(answer, Raw):
            self._send_raw(answer)
            return
        body = answer.body if isinstance(answer.body, str | bytes) else json.dumps(answer.body)
        content = body.encode() if isinstance(body, str) else body
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(answer.headers)
        self.send_response_only(answer.status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = self.close_connection or headers["Content-Length"] is None

    def _send_raw(self, answer: Raw) -> None:
        released = self.server.maker.released
        for chunk in answer.chunks:
            self.wfile.write(chunk)
            if released.wait(answer.every):
                break
        if answer.end == "hang":
            released.wait()
        if answer.end == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.close_connection = answer.end != "keep"
