"""Connections cut at every byte, and bodies of all kinds."""

import json
import random
import re
import socketserver
from threading import Thread
from typing import Any

from .world import Campaign, Result, scaled, widget_ids, world


class Cutter(socketserver.ThreadingTCPServer):
    """A maker that cuts its connections: every second one after so many bytes of the request, or of the answer.

    cuts: how many bytes of what are left to try. made: the ids of the widgets that it answered in full.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Cut)
        self.cuts = [(what, size) for size in range(1, 700) for what in ("request", "answer")]
        self.made: set[str] = set()
        self.connections = self.cut = 0


class _Cut(socketserver.StreamRequestHandler):
    server: Cutter

    def handle(self) -> None:
        server, head = self.server, b""
        if self.rfile.peek(4)[:4] == b"GET ":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        server.connections += 1
        what, size = server.cuts.pop() if server.connections % 2 and server.cuts else ("", 0)
        if what == "request" and len(self.rfile.read(size)) == size:
            server.cut += 1
            return
        while not head.endswith(b"\r\n\r\n"):
            if not (byte := self.rfile.read(1)):
                return
            head += byte
        found = re.search(rb"(?i)content-length: (\d+)", head)
        assert found
        body = json.dumps({"id": json.loads(self.rfile.read(int(found[1])))["widget_id"], "created_at": "x"}).encode()
        answer = b"HTTP/1.1 201 Created\r\nWidget-Maker: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        if what == "answer" and size < len(answer):
            self.wfile.write(answer[:size])
            server.cut += 1
            return
        server.made.add(json.loads(body)["id"])
        self.wfile.write(answer)


def cut_at_each_byte(scale: float) -> Result:
    """POSTs whose request or answer ends after any byte: all are made at last, and nothing else is called created."""
    with world() as made, Cutter() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        made.maker_url = f"http://127.0.0.1:{server.server_address[1]}"
        # A request is shorter than 450 bytes, an answer than 200.
        most = {"request": 450, "answer": 200}
        server.cuts = [(what, size) for what, size in server.cuts if size < most[what]][:: max(1, round(1 / scale))]
        random.shuffle(server.cuts)
        n = len(server.cuts)
        made.post_ids(widget_ids(2 * n))
        made.drain("--slots", 4)
        server.shutdown()
        return made.check(server.made).plus(n=n, cut=server.cut)


def bodies(scale: float) -> Result:
    """Bodies of all kinds go through queue and maker: made, rejected, or a dead letter with the body as it was."""
    made_of: list[Any] = [_body(random.Random(number)) for number in range(scaled(20_000, scale))]
    poison = {json.dumps(body, sort_keys=True) for body in made_of if not _is_request(body)}
    with world() as made, made.maker():
        made.post(made_of)
        made.drain("--max-receives", 5)
        return made.check(poison=poison)


def _is_request(body: Any) -> bool:
    return isinstance(body, dict) and isinstance(body.get("widget_id"), str)


def _body(chance: random.Random) -> Any:
    kind = chance.random()
    if kind < 0.5:
        return {
            "widget_id": _value(chance, 0),
            **{_text(chance): _value(chance, 2) for _ in range(chance.randrange(3))},
        }
    return {"widget_id": widget_ids(1)[0], "more": _value(chance, 3)} if kind < 0.8 else _value(chance, 3)


def _value(chance: random.Random, depth: int) -> Any:
    kind = chance.randrange(8 if depth else 6)
    if kind == 6:
        return [_value(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return {_text(chance): _value(chance, depth - 1) for _ in range(chance.randrange(4))}
    plain = (None, chance.random() < 0.5, chance.randrange(-(2**53), 2**53), chance.uniform(-1e9, 1e9))
    return plain[kind] if kind < len(plain) else _text(chance)


def _text(chance: random.Random) -> str:
    kinds = ("abc-019", "\0\r\n\t\"\\'", "äß\u202e\ufeff", "\U0001f600\uffff", "<script>&{{}}")
    return "".join(chance.choice(chance.choice(kinds)) for _ in range(chance.randrange(20)))


CAMPAIGNS = [
    Campaign("cut-at-every-byte", "a POST or its answer cut after any byte loses nothing", cut_at_each_byte),
    Campaign("bodies", "bodies of all kinds are made, rejected, or dead letters as they were", bodies),
]
