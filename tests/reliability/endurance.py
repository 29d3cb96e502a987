"""A million messages, bodies of all kinds, connections cut at every byte, and 20,000 histories against a model."""

import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from doubles.scripted_maker import Answer, Post, Reply, ScriptedMaker, Silence
from doubles.tcp_proxy import NO_FAULT, Fault, TcpProxy
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import HERE, Script, wait_until

from claim_queues.sqlite import SqliteQueues

from .checker import name
from .frame import Result, campaign, scaled
from .world import REQUESTS, RESPONSES, widget_ids, world

PORTION, FEWEST_QUEUED = 1_000, 5_000
MOST_GROWTH_MB = 20.0
LEAST_TO_JUDGE = 50_000
REQUEST_BYTES, ANSWER_BYTES = 450, 158
"""The longest of a request, and the bytes of an answer."""
PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text() | st.sampled_from(["<script>&{{}}", "\0\r\n\t\"\\'", "\u202e\ufeff"])
VALUES = st.recursive(
    PLAIN | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=9
)
IDS = (PLAIN, TEXT, st.builds(lambda: widget_ids(1)[0]))
BODIES = st.one_of(VALUES, *(st.fixed_dictionaries({"widget_id": ids, "more": VALUES}) for ids in IDS))


@campaign("a million messages through one consumer: memory and descriptors stay")
def soak(scale: float) -> Result:
    """Its memory and descriptors are looked at after each tenth."""
    count = scaled(1_000_000, scale)
    left, answered, pending = count, 0, set[str]()
    strange, samples = list[Any](), list[tuple[float, int, float]]()
    with world() as made, made.maker() as maker, SqliteQueues(made.queue) as queues:
        consumer = made.consumer("--post-batch", 20, "--log-level", "warning")
        while left or pending:
            while left and len(pending) < FEWEST_QUEUED:
                ids = widget_ids(min(PORTION, left))
                queues.post(REQUESTS, [{"widget_id": id_} for id_ in ids])
                pending.update(ids)
                left -= len(ids)
            time.sleep(0.1)  # so that many come at once
            found = wait_until(lambda: queues.browse(RESPONSES, limit=PORTION * 5)[0], 60)
            queues.delete(RESPONSES, [message.id for message in found])
            created = {each.body["widget_id"] for each in found if each.body["outcome"] == "created"} & pending
            strange += [each.body for each in found if each.body["widget_id"] not in created]
            pending -= created
            answered += len(found)
            if answered >= len(samples) * count // 10:
                samples.append(_sample(consumer))
        samples.append(_sample(consumer))
        widgets = len(made.widgets())
        maker_mb = _sample(maker)[0]
    (first_mb, descriptors, began), (last_mb, descriptors_at_end, ended) = samples[1], samples[-1]
    slots = 8 if count < LEAST_TO_JUDGE else 0  # in a short run some slots connect after the first tenth
    is_larger = last_mb - first_mb > MOST_GROWTH_MB or descriptors_at_end > descriptors + slots
    figures = {
        "n": count,
        "widgets": widgets,
        "RSS MB after a tenth": round(first_mb, 1),
        "at the end": round(last_mb, 1),
        "the maker's": round(maker_mb, 1),
        "descriptors": f"{descriptors}, {descriptors_at_end}",
        "messages/s": round(count * 0.9 / (ended - began)),
    }
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


@campaign("a POST or its answer cut after any byte loses nothing")
def cut_at_every_byte(scale: float) -> Result:
    """Every second connection is cut; each carries one POST. Only what was answered in full may be called created."""
    faults = [Fault(request_bytes=size) for size in range(1, REQUEST_BYTES)]
    faults += [Fault(answer_bytes=size) for size in range(1, ANSWER_BYTES)]
    random.shuffle(faults)
    faults = faults[: scaled(len(faults), scale)]

    def fault(number: int) -> Fault:
        return faults[number // 2] if number % 2 and number // 2 < len(faults) else NO_FAULT

    def answer(post: Post) -> Answer:
        if fault(post.connection).request_bytes:
            return Silence.CUT
        reply = maker.make(post) if fault(post.connection) is NO_FAULT else Reply(201, {"id": post.widget_id})
        return replace(reply, headers={"Connection": "close"})

    with world() as made, made.scripted() as maker, ScriptedMaker() as healthy, ExitStack() as stack:
        maker.answer = answer
        proxy = stack.enter_context(TcpProxy("127.0.0.1", maker.port, fault))
        made.maker_url = f"http://127.0.0.1:{proxy.port}"
        made.post_ids(2 * len(faults))
        made.drain("--slots", 1, "--health-url", f"http://127.0.0.1:{healthy.port}/healthz")
        cut = maker.connections - 2 * len(faults)
        found = made.check().plus(n=len(faults), cut=cut)
        return found.plus("" if cut == len(faults) else f"{cut} were cut")


@campaign("bodies of all kinds are made, rejected, or dead letters as they were")
def bodies(scale: float) -> Result:
    found: list[Any] = []

    @settings(
        max_examples=scaled(20_000, scale),
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(BODIES)
    def collect(body: Any) -> None:
        found.append(body)

    collect()
    with world() as made, made.maker():
        made.post(found)
        made.drain("--max-receives", 5)
        others = [body for body in found if not (isinstance(body, dict) and isinstance(body.get("widget_id"), str))]
        return made.check(poison={name(body) for body in others})


@campaign("random histories of answers, health and crashes follow the table of charges")
def model(scale: float) -> Result:
    """The test of it, with many more histories."""
    n, test = scaled(20_000, scale), "tests/properties/test_charges_model.py"
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "no:cacheprovider", "--timeout=7200", test]
    env = os.environ | {"HISTORIES": str(n)}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    return Result({"n": n}, [done.stdout[-1000:]] if done.returncode else [])
