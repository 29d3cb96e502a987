"""The project's maker in two other forms: `makers.py timed` and `makers.py waitress`.

timed: it appends `ID UTC_SECONDS` to the file `answers` as each answer leaves (its rows have whole milliseconds).
waitress: the same application on waitress.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import widget_maker

DATABASE = Path(os.environ["BENCH_DIR"]) / "widgets.sqlite3"
PORT = int(os.environ["BENCH_MAKER_PORT"])


def load():
    """Called in the process that serves."""
    app = widget_maker._load(("text", "warning"), DATABASE)
    return partial(answer, app, (DATABASE.parent / "answers").open("a", buffering=1))


def answer(app, out, environ, start_response):
    body = b"".join(app(environ, start_response))
    if environ["REQUEST_METHOD"] == "POST":
        out.write(f"{json.loads(body)['id']} {time.time()}\n")
    return [body]


if __name__ == "__main__":
    if sys.argv[1] == "timed":
        widget_maker.serve(load, "127.0.0.1", PORT, {})
    else:
        import waitress

        waitress.serve(widget_maker.create_app(DATABASE), host="127.0.0.1", port=PORT, threads=8)
