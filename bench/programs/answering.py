"""An endpoint that takes the place of the maker and only answers, so that it is never what bounds a contestant."""

import asyncio
import json
import os
import re
import time

import uvloop

HEAD = re.compile(rb"(\w+) (\S+) .*?\r\n\r\n", re.DOTALL)
LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)
ID = re.compile(rb'"widget_id": *"([^"]+)"')
made = {}


class Endpoint(asyncio.Protocol):
    def __init__(self):
        self.received = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.received += data
        while head := HEAD.match(self.received):
            length = LENGTH.search(self.received, 0, head.end())
            end = head.end() + (int(length[1]) if length else 0)
            if len(self.received) < end:
                return
            body, self.received = self.received[head.end() : end], self.received[end:]
            self.answer(head[1], head[2], body)

    def answer(self, method, path, body):
        if method == b"POST":
            widget_id = ID.search(body)[1].decode()
            status = "200 OK" if widget_id in made else "201 Created"
            made.setdefault(widget_id, time.time())
            content = f'{{"id":"{widget_id}"}}'
        else:
            status, content = "200 OK", json.dumps(len(made) if path == b"/count" else made)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self.transport.write((head + content).encode())


async def main():
    port = int(os.environ["BENCH_MAKER_PORT"])
    server = await asyncio.get_running_loop().create_server(Endpoint, "127.0.0.1", port)
    await server.serve_forever()


uvloop.run(main())
