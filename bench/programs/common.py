"""What the Python contestants share: the task's body, and how ids get onto a queue.

A contestant's program calls main() or main_async() with a function that puts one widget id on its queue:

    load       puts all ids of $BENCH_IDS there, and prints how long that took
    produce    puts them there at $BENCH_RATE a second, and writes `ID UTC_SECONDS` to $BENCH_PRODUCED just before each
"""

import asyncio
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

MAKER_URL = os.environ.get("BENCH_MAKER_URL", "")
REDIS_URL = os.environ.get("BENCH_REDIS_URL", "")

_local = threading.local()


def post_widget(widget_id):
    """What a user writes: a kept-alive requests.Session a thread."""
    import requests

    if not hasattr(_local, "session"):
        _local.session = requests.Session()
    _local.session.post(MAKER_URL, json={"widget_id": widget_id}, timeout=10).raise_for_status()


def ids():
    return Path(os.environ["BENCH_IDS"]).read_text().split()


@contextmanager
def loading(every):
    start = time.perf_counter()
    yield
    print(json.dumps({"loaded": len(every), "seconds": time.perf_counter() - start}), flush=True)


def ticks():
    """Yield each id, and the seconds to wait before it is due."""
    start = time.monotonic()
    for number, widget_id in enumerate(ids()):
        yield widget_id, max(0, start + number / float(os.environ["BENCH_RATE"]) - time.monotonic())


@contextmanager
def producing():
    with Path(os.environ["BENCH_PRODUCED"]).open("w") as out:
        yield lambda widget_id: out.write(f"{widget_id} {time.time()}\n")


def main(post):
    if sys.argv[1] == "load":
        every = ids()
        with loading(every):
            for widget_id in every:
                post(widget_id)
        return
    with producing() as note:
        for widget_id, wait in ticks():
            time.sleep(wait)
            note(widget_id)
            post(widget_id)


async def main_async(post):
    if sys.argv[1] == "load":
        every = ids()
        with loading(every):
            for widget_id in every:
                await post(widget_id)
        return
    with producing() as note:
        for widget_id, wait in ticks():
            await asyncio.sleep(wait)
            note(widget_id)
            await post(widget_id)
