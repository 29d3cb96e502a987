"""Embedded queues alone, without HTTP: `queue_operations.py QUEUE COUNT DIRECTORY` prints what they cost, as JSON.

COUNT messages are posted, then all are claimed and deleted, through each one's own public API: ours by tens, the peers,
which know nothing else, one by one.
"""

import json
import sys
import time
from pathlib import Path


class Ours:
    def __init__(self, directory):
        from claim_queues import Settlement, open_queues

        self.settlement, self.size = Settlement, 10
        self.queues = open_queues(f"sqlite:///{Path(directory).absolute() / 'q.sqlite3'}")

    def post(self, bodies):
        self.queues.post("q", bodies, ttl=3600)

    def take(self):
        claim = self.queues.claim("q", ttl=300, grace=60, limit=self.size)
        if claim is None:
            return []
        messages = claim.messages
        self.queues.settle(claim, [self.settlement(message) for message in messages])
        return [message.body for message in messages]


class HueySynced:
    """A claim deletes: there is no acknowledgement."""

    def __init__(self, directory):
        from huey.storage import SqliteStorage

        self.size, self.storage = 1, SqliteStorage("q", filename=f"{directory}/q.db", fsync=True)

    def post(self, bodies):
        self.storage.enqueue(bodies[0].encode())

    def take(self):
        data = self.storage.dequeue()
        return [bytes(data).decode()] if data else []


class Litequeue:
    def __init__(self, directory):
        from litequeue import LiteQueue

        self.size, self.queue = 1, LiteQueue(f"{directory}/q.db")

    def post(self, bodies):
        self.queue.put(bodies[0])

    def take(self):
        if (message := self.queue.pop()) is None:
            return []
        self.queue.done(message.message_id)
        return [message.data]


class PersistQueue:
    def __init__(self, directory):
        from persistqueue import SQLiteAckQueue

        self.size, self.queue = 1, SQLiteAckQueue(directory, multithreading=True, auto_resume=False)

    def post(self, bodies):
        self.queue.put(bodies[0])

    def take(self):
        if not self.queue.size:
            return []
        body = self.queue.get(block=False)
        self.queue.ack(body)
        return [body]


def timed(do):
    """What it gives; how long it took, and how much CPU, in seconds."""
    start, start_cpu = time.perf_counter(), time.process_time()
    return do(), time.perf_counter() - start, time.process_time() - start_cpu


def post_all(queue, bodies):
    for at in range(0, len(bodies), queue.size):
        queue.post(bodies[at : at + queue.size])


def take_all(queue):
    taken = []
    while found := queue.take():
        taken += found
    return taken


name, count, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
queues = {"ours": Ours, "huey-synced": HueySynced, "litequeue": Litequeue, "persist-queue": PersistQueue}
queue, bodies = queues[name](directory), [f"{number:08x}-54f4-11e5-ad75-000000000000" for number in range(count)]
_, post_s, post_cpu_s = timed(lambda: post_all(queue, bodies))
taken, take_s, take_cpu_s = timed(lambda: take_all(queue))
record = {
    "posted_per_s": count / post_s,
    "post_cpu_us": post_cpu_s / count * 1e6,
    "taken_per_s": count / take_s,
    "take_cpu_us": take_cpu_s / count * 1e6,
    "once": sorted(taken) == bodies,
}
print(json.dumps(record))
