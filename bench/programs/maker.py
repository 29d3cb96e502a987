"""A maker that only answers, so that it never is what bounds a contestant: `maker.py PORT [MS]`.

It answers as widget_maker.py does, a POST after MS milliseconds. GET /count: how many widgets there are. GET /made:
when each was made (UTC seconds), and how many requests were answered with one, by the query of the POST's URL.
"""

import asyncio
import json
import re
import sys
import time
from collections import Counter

delay_s = float(sys.argv[2]) / 1000 if len(sys.argv) > 2 else 0
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
made, answers = {}, Counter()


def make(request, query=""):
    """The widget, and whether it is new."""
    id_ = request["widget_id"]
    answers[query] += 1
    is_new = id_ not in made
    made.setdefault(id_, time.time())
    return {"id": id_}, 201 if is_new else 200


def answer(path, body):
    path, _, query = path.partition(b"?")
    if path == b"/widgets":
        return make(json.loads(body), query.decode())
    if path == b"/widgets/batch":
        found = [(item["message_id"], make(item["request"])) for item in json.loads(body)]
        return {"answers": [{"message_id": id_, "status": status, "body": w} for id_, (w, status) in found]}, 200
    return {b"/count": len(made), b"/made": {"made": made, "answers": answers}}.get(path, {"status": "ok"}), 200


class Connection(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.received = transport, b""

    def data_received(self, data):
        self.received += data
        while (end := self.received.find(b"\r\n\r\n") + 4) > 3:
            length = LENGTH.search(self.received[:end])
            end_of_body = end + int(length[1] if length else 0)
            if len(self.received) < end_of_body:
                return
            path, body = self.received.split(b" ", 2)[1], self.received[end:end_of_body]
            self.received = self.received[end_of_body:]
            if body and delay_s:
                asyncio.get_running_loop().call_later(delay_s, self.answer, path, body)
            else:
                self.answer(path, body)

    def answer(self, path, body):
        value, status = answer(path, body)
        content = json.dumps(value).encode()
        head = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write(head % (status, len(content)) + content)


async def main():
    loop, port = asyncio.get_running_loop(), int(sys.argv[1])
    server = await loop.create_server(Connection, "127.0.0.1", port, backlog=512)
    await server.serve_forever()


asyncio.run(main())
