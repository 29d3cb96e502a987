"""A widget maker whose every answer a test decides.

    with ScriptedMaker() as maker:
        maker.url                                                # http://127.0.0.1:PORT/widgets
        maker.answer = lambda post: 503                          # or Reply(503, headers={"Retry-After": "1"})
        maker.answer = lambda post: 500 if post.widget_id == bad else maker.make(post)
        maker.answer = lambda post: maker.hang()                 # no answer until the block ends
        maker.health = Reply(503)                                # what GET /healthz says
        with maker.down(): ...                                   # nothing listens; what was connected is cut off
        maker.posts, maker.made                                  # what it was asked for, the ids that it made

Left alone it makes whatever it is asked for. A batch is answered item by item, each by `answer`.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Self


@dataclass(frozen=True)
class Post:
    """A request as it came. connection: the number of the TCP connection, from 1. at: monotonic seconds."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int
    at: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def widget_id(self) -> Any:
        """Of a single request."""
        return self.json["widget_id"]

    @property
    def widget_ids(self) -> list[Any]:
        """Of a single request or of a batch."""
        return [item["request"]["widget_id"] for item in self.json] if self.is_batch else [self.widget_id]

    @property
    def is_batch(self) -> bool:
        return self.path.partition("?")[0].endswith("/batch")


@dataclass(frozen=True)
class Reply:
    """A whole answer. body: text and bytes are sent as they are, anything else as JSON. before: bytes sent before it.

    headers: replace those of the same name; None leaves one of them (Content-Length, Content-Type) out.
    """

    status: int
    body: Any = ""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    before: bytes = b""


class Silence(Enum):
    """No answer: the connection is closed; or the item is left out of the answer to its batch."""

    CUT = "cut"
    LEFT_OUT = "left out"


Answer = int | Reply | Silence
"""A number: that status, with an error object as the real maker's has."""


class ScriptedMaker:
    """An HTTP/1.1 server with kept-alive connections on a loopback port, a thread for each connection.

    answer: asked for each POST, in the connection's thread: it may block, or look at `posts`. says_maker: whether
    answers carry the header Widget-Maker. takes_batches: whether it knows the page /widgets/batch. batch: the answer to
    that page, instead of one item by item. gets: every GET. made: how often each widget id was answered with `make`.
    What `answer` raises is raised again when the block ends.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.answer: Callable[[Post], Answer] = self.make
        self.health: Answer = Reply(200, {"status": "ok"})
        self.says_maker = True
        self.takes_batches = True
        self.batch: Answer | None = None
        self.posts: list[Post] = []
        self.gets: list[Post] = []
        self.made: Counter[str] = Counter()
        self.connections = 0
        self.errors: list[BaseException] = []
        self.port = port
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def make(self, post: Post) -> Reply:
        """201 for a new id, 200 for a known one."""
        with self._lock:
            self.made[post.widget_id] += 1
            status = 201 if self.made[post.widget_id] == 1 else 200
        return Reply(status, {"id": post.widget_id})

    def hang(self) -> Answer:
        """Wait until release()."""
        self._released.wait()
        return Silence.CUT

    def release(self) -> None:
        """Let everything that hangs end, now and from now on."""
        self._released.set()

    def posts_of(self, widget_id: str) -> list[Post]:
        return [post for post in list(self.posts) if widget_id in post.widget_ids]

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections until up(), or the block ends, as while a maker is started again."""
        self._stop()
        yield
        self.up()

    def up(self) -> None:
        """Accept connections again."""
        if self._server is None:
            self._start()

    def __enter__(self) -> Self:
        self._start()
        self.url = f"http://127.0.0.1:{self.port}/widgets"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.release()
        self._stop()
        if self.errors and kind is None:
            raise self.errors[0]

    def _start(self) -> None:
        self._server = server = _Server(self, self.port)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            server.cut_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # one of them may end the server
    request_queue_size = 128
    server_address: tuple[str, int]

    def __init__(self, maker: ScriptedMaker, port: int) -> None:
        self.maker = maker
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without the name look-up of HTTPServer

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.maker.connections += 1
        self._open.add(connection)
        return connection, (*address, self.maker.connections)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What the client did to its connection is the test's business, not an error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        maker, post = self.server.maker, self._post()
        maker.posts.append(post)
        try:
            self._send(self._batch(post) if post.is_batch else maker.answer(post))
        except OSError:
            self.close_connection = True
        except BaseException as error:
            maker.errors.append(error)
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.maker.gets.append(self._post())
        self._send(self.server.maker.health if self.path == "/healthz" else 404)

    def log_message(self, *args: Any) -> None:
        """Nothing: the test looks at `posts`."""

    def _post(self) -> Post:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return Post(self.path, self.headers, body, self.client_address[-1], time.monotonic())

    def _batch(self, post: Post) -> Answer:
        maker = self.server.maker
        if not maker.takes_batches:
            return Reply(404)
        if maker.batch is not None:
            return maker.batch
        answers = []
        for item in post.json:
            alone = replace(post, path="/widgets", body=json.dumps(item["request"]).encode())
            answer = maker.answer(alone)
            if answer is Silence.CUT:
                return answer
            if answer is not Silence.LEFT_OUT:
                reply = _reply(answer)
                answers.append({"message_id": item["message_id"], "status": reply.status, "body": reply.body or {}})
        return Reply(200, {"answers": answers})

    def _send(self, answer: Answer) -> None:
        if isinstance(answer, Silence):
            self.close_connection = True
            return
        reply = _reply(answer)
        body = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        content = body.encode() if isinstance(body, str) else body
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(reply.headers)
        self.wfile.write(reply.before)
        self.send_response_only(reply.status)
        if self.server.maker.says_maker:
            self.send_header("Widget-Maker", "1")
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = self.close_connection or headers["Content-Length"] is None


def _reply(answer: int | Reply | Silence) -> Reply:
    if isinstance(answer, int):
        return Reply(answer, {"error": {"code": "broken", "message": f"scripted {answer}"}})
    assert isinstance(answer, Reply)
    return answer
