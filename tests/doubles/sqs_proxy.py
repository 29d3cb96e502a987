"""An HTTP proxy before a server of Amazon SQS, with the answers that a test decides.

with SqsProxy("http://127.0.0.1:5000") as proxy:
    SqsQueues("eu-west-1", endpoint=proxy.url)
    proxy.asked("SendMessageBatch")                         # the bodies of the requests so far
    proxy.answers["ReceiveMessage"] = [refusal("Throttling", 503), LOST, done_but_lost]    # of the next three
    proxy.answers["DeleteMessageBatch"] = [partly({"the entry's id": {"Code": "InternalError"}})]
"""

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import requests

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""


@dataclass(frozen=True)
class Reply:
    """status 0: the connection is reset. body: text as it is, anything else as JSON."""

    status: int
    body: Any = ""
    headers: Mapping[str, str] = field(default_factory=dict)


LOST = Reply(0)
Answer = Reply | Callable[["SqsProxy", Mapping[str, str], dict[str, Any]], Reply]
"""A function is given the proxy and the request's headers and body."""


def refusal(code: str, status: int = 400, **headers: str) -> Reply:
    """SQS's own words for an error; header names with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, {"__type": f"com.amazonaws.sqs#{code}", "message": "said AWS"}, named)


def done_but_lost(proxy: "SqsProxy", headers: Mapping[str, str], body: dict[str, Any]) -> Reply:
    """The server does it, and its answer is lost."""
    proxy.forward(headers, body)
    return LOST


def partly(failures: Mapping[str, Mapping[str, Any]]) -> Answer:
    """Entries of a batch fail, by their id; the server does the others."""

    def answer(proxy: "SqsProxy", headers: Mapping[str, str], body: dict[str, Any]) -> Reply:
        entries = [entry for entry in body["Entries"] if entry["Id"] not in failures]
        done = json.loads(proxy.forward(headers, body | {"Entries": entries}).body) if entries else {}
        failed = [{"Id": id_, "Message": "said AWS"} | dict(failure) for id_, failure in failures.items()]
        return Reply(200, done | {"Failed": failed})

    return answer


class SqsProxy:
    """answers: by operation, those of the next requests; the server at `target` answers all others.

    answer: of every request, where it is set. requests: operation, headers and body of each. connections: how many.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.answers: dict[str, list[Answer]] = {}
        self.answer: Answer | None = None
        self.requests: list[tuple[str, Mapping[str, str], dict[str, Any]]] = []
        self.connections = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def asked(self, operation: str) -> list[dict[str, Any]]:
        return [body for name, _, body in self.requests if name == operation]

    def forward(self, headers: Mapping[str, str], body: dict[str, Any]) -> Reply:
        """What the server says to this request."""
        kept = {name: headers[name] for name in ("Content-Type", "X-Amz-Target", "Authorization")}
        with requests.Session() as session:
            session.trust_env = False
            answer = session.post(self.target, json.dumps(body), headers=kept, timeout=60)
        return Reply(answer.status_code, answer.text, {name: answer.headers[name] for name in ("Content-Type", "Date")})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: SqsProxy

    def setup(self) -> None:
        super().setup()
        self.proxy.connections += 1

    def do_POST(self) -> None:
        operation = self.headers["X-Amz-Target"].removeprefix("AmazonSQS.")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.proxy.requests.append((operation, self.headers, body))
        decided = self.proxy.answers.get(operation) or [self.proxy.answer or SqsProxy.forward]
        answer = decided.pop(0)
        reply = answer if isinstance(answer, Reply) else answer(self.proxy, self.headers, body)
        if not reply.status:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close_connection = True
            return
        text = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self.send_response_only(reply.status)
        for name, value in ({"Content-Type": "application/json"} | dict(reply.headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Nothing: the test looks at `requests`."""
