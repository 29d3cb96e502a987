"""Pass TCP connections on, and count the HTTP/1.1 requests in them: `counting_proxy.py PORT TO_PORT`.

The count is what the file $BENCH_DIR/requests holds.
"""

import asyncio
import os
import re
import sys
from pathlib import Path

PORT, TO_PORT = map(int, sys.argv[1:])
REQUEST = re.compile(rb"^(?:GET|POST|PUT|PATCH|DELETE) \S+ HTTP/1.1\r\n", re.MULTILINE)
out = (Path(os.environ["BENCH_DIR"]) / "requests").open("w")


async def copy(reader, writer, *, count):
    while data := await reader.read(65536):
        if count:
            out.write("\n" * len(REQUEST.findall(data)))
            out.flush()
        writer.write(data)
    writer.close()


async def accept(reader, writer):
    to_reader, to_writer = await asyncio.open_connection("127.0.0.1", TO_PORT)
    await asyncio.gather(copy(reader, to_writer, count=True), copy(to_reader, writer, count=False))


async def main():
    await (await asyncio.start_server(accept, "127.0.0.1", PORT)).serve_forever()


asyncio.run(main())
