"""What the Python contestants share: the task's body, and how ids get onto a queue."""

import asyncio
import inspect
import os
import sys
import threading
import time
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


async def fill(post):
    """`load` or `produce` (see contestants.toml) with a function, or a coroutine function, that posts one id."""
    is_load, start = sys.argv[1] == "load", time.monotonic()
    with Path(os.environ["BENCH_PRODUCED"]).open("w") as out:
        for number, widget_id in enumerate(ids()):
            if not is_load:
                await asyncio.sleep(max(0, start + number / float(os.environ["BENCH_RATE"]) - time.monotonic()))
                out.write(f"{widget_id} {time.time()}\n")
            if inspect.isawaitable(posted := post(widget_id)):
                await posted
