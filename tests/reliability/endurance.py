"""A million messages, and 20,000 histories against a model."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support import HERE, Script

from claim_queues.sqlite import SqliteQueues

from .world import REQUESTS, RESPONSES, Campaign, Result, scaled, widget_ids, world

PORTION, FEWEST_QUEUED = 1_000, 5_000
MOST_GROWTH_MB = 20.0
LEAST_TO_JUDGE = 50_000


def soak(scale: float) -> Result:
    """A million messages go through one consumer and the maker; its memory and descriptors after each tenth."""
    count = scaled(1_000_000, scale)
    pending: set[str] = set()
    left, answered, strange, samples = count, 0, list[Any](), list[tuple[float, int, float]]()
    with world() as made, made.maker() as maker, SqliteQueues(made.queue) as queues:
        consumer = made.consumer("--post-batch", 20, "--log-level", "warning")
        heard_at = time.monotonic()
        while left or pending:
            while left and len(pending) < FEWEST_QUEUED:
                ids = widget_ids(min(PORTION, left))
                queues.post(REQUESTS, [{"widget_id": id_} for id_ in ids])
                pending.update(ids)
                left -= len(ids)
            time.sleep(0.1)  # so that many come at once
            found = queues.browse(RESPONSES, limit=PORTION * 5)[0]
            queues.delete(RESPONSES, [message.id for message in found])
            for message in found:
                if message.body["outcome"] != "created" or message.body["widget_id"] not in pending:
                    strange.append(message.body)
                pending.discard(message.body["widget_id"])
            answered += len(found)
            if answered >= len(samples) * count // 10 and found:
                samples.append(_sample(consumer))
            heard_at = time.monotonic() if found else heard_at
            assert time.monotonic() - heard_at < 60, consumer.err[-2000:]
        samples.append(_sample(consumer))
        widgets = len(made.widgets())
        maker_mb = _sample(maker)[0]
    (first_mb, descriptors, began), (last_mb, descriptors_at_end, ended) = samples[1], samples[-1]
    figures = {
        "n": count,
        "widgets": widgets,
        "RSS MB after a tenth": round(first_mb, 1),
        "at the end": round(last_mb, 1),
        "the maker's": round(maker_mb, 1),
        "descriptors": f"{descriptors}, {descriptors_at_end}",
        "messages/s": round(count * 0.9 / (ended - began)),
    }
    slots = 8 if count < LEAST_TO_JUDGE else 0  # in a short run some slots connect after the first tenth
    is_larger = last_mb - first_mb > MOST_GROWTH_MB or descriptors_at_end > descriptors + slots
    return Result(figures, []).plus(
        f"{len(strange)} strange responses, {strange[0]}" if strange else "",
        f"{widgets} widgets of {count}" if widgets != count else "",
        f"memory or descriptors grew: {samples}" if is_larger else "",
    )


def _sample(script: Script) -> tuple[float, int, float]:
    """Its memory in MB, open descriptors, and the time."""
    process = Path(f"/proc/{script.process.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list((process / "fd").iterdir())), time.monotonic()


def model(scale: float) -> Result:
    """The test of charges, row, breaker and counts against a model of the table, with many more histories."""
    n, test = scaled(20_000, scale), "tests/properties/test_charges_model.py"
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "no:cacheprovider", "--timeout=7200", test]
    env = os.environ | {"HISTORIES": str(n)}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    return Result({"n": n}, [done.stdout[-1000:]] if done.returncode else [])


CAMPAIGNS = [
    Campaign("soak", "a million messages through one consumer: memory and descriptors stay", soak),
    Campaign("model", "random histories of answers, health and crashes follow the table of charges", model),
]
