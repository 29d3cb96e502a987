"""Embedded queues alone, without HTTP: what posts and claims cost.

queue_operations.py work QUEUE PROCESSES COUNT DIRECTORY    post COUNT messages, then claim and delete them all
queue_operations.py backlog QUEUE WAITING DIRECTORY         claims while WAITING messages wait

Both print a JSON object. Every QUEUE is used through its own public API, one post and one claim a call but for ours-10.
Messages live for ever, as the peers' do, but for ours-10-ttl. Ours delete and claim by turns in one call, which the
consumer does not: it claims in one thread and settles in another.
"""

import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

CLAIMS = 500


class Ours:
    """Claims of ten; each batch is deleted by one settlement, which claims the next."""

    ttl = None
    post_batch = 1
    load_batch = 1000

    def __init__(self, directory):
        from claim_queues import Settlement, open_queues

        self.settlement = Settlement
        self.queues = open_queues(f"sqlite:///{Path(directory).absolute() / 'q.sqlite3'}")

    def post(self, bodies):
        size = self.post_batch
        for at in range(0, len(bodies), size):
            self.queues.post("q", bodies[at : at + size], ttl=self.ttl)

    def load(self, count):
        for at in range(0, count, self.load_batch):
            self.queues.post("q", ["backlog"] * min(self.load_batch, count - at), ttl=self.ttl)

    def claim(self):
        return self.queues.claim("q", ttl=300, grace=60, limit=10)

    def delete(self, claim):
        self.queues.settle(claim, [self.settlement(message) for message in claim.messages])

    def delete_and_claim(self, claim):
        settlements = [self.settlement(message) for message in claim.messages]
        return self.queues.settle_and_claim(claim, settlements, ttl=300, grace=60, limit=10)[1]

    def bodies(self, claim):
        return [message.body for message in claim.messages]


class Ours10(Ours):
    """Posts of ten."""

    post_batch = 10


class Ours10Ttl(Ours10):
    """Each message expires after an hour."""

    ttl = 3600


class Peer:
    """Has no call that does both."""

    def delete_and_claim(self, claim):
        self.delete(claim)
        return self.claim()


class Huey(Peer):
    """A claim deletes: there is no acknowledgement."""

    fsync = False

    def __init__(self, directory):
        from huey.storage import SqliteStorage

        self.storage = SqliteStorage("q", filename=f"{directory}/q.db", fsync=self.fsync)

    def post(self, bodies):
        for body in bodies:
            self.storage.enqueue(body.encode())

    def load(self, count):
        self.post(["backlog"] * count)

    def claim(self):
        return self.storage.dequeue()

    def delete(self, claim):
        pass

    def bodies(self, claim):
        return [bytes(claim).decode()]


class HueySynced(Huey):
    fsync = True


class Litequeue(Peer):
    def __init__(self, directory):
        from litequeue import LiteQueue

        self.queue = LiteQueue(f"{directory}/q.db")

    def post(self, bodies):
        for body in bodies:
            self.queue.put(body)

    def load(self, count):
        self.post(["backlog"] * count)

    def claim(self):
        return self.queue.pop()

    def delete(self, claim):
        self.queue.done(claim.message_id)

    def bodies(self, claim):
        return [claim.data]


class PersistQueue(Peer):
    def __init__(self, directory):
        from persistqueue import SQLiteAckQueue
        from persistqueue.exceptions import Empty

        self.empty = Empty
        self.queue = SQLiteAckQueue(directory, multithreading=True, auto_resume=False)

    def post(self, bodies):
        for body in bodies:
            self.queue.put(body)

    def load(self, count):
        self.post(["backlog"] * count)

    def claim(self):
        try:
            return self.queue.get(block=False)
        except self.empty:
            return None

    def delete(self, claim):
        self.queue.ack(claim)

    def bodies(self, claim):
        return [claim]


QUEUES = {
    "ours": Ours,
    "ours-10": Ours10,
    "ours-10-ttl": Ours10Ttl,
    "huey-synced": HueySynced,
    "huey-unsynced": Huey,
    "litequeue": Litequeue,
    "persist-queue": PersistQueue,
}


def post_share(queue, bodies):
    queue.post(bodies)
    return bodies


def take_all(queue, _):
    taken, claim = [], queue.claim()
    while claim:
        taken += queue.bodies(claim)
        claim = queue.delete_and_claim(claim)
    return taken


def take_part(make_queue, directory, action, bodies, meeting):
    """One process's share of a phase."""
    barrier, results = meeting
    queue = make_queue(directory)
    barrier.wait()
    start, start_cpu, done, error = time.time(), time.process_time(), [], ""
    try:
        done = action(queue, bodies)
    except Exception as caught:  # a queue that fails in two processes is a result
        error = f"{type(caught).__name__}: {caught}"
    results.put((done, start, time.time(), time.process_time() - start_cpu, error))


def phase(make_queue, directory, action, shares):
    """Run the action in a process for each share: what they did, seconds, CPU seconds, and errors."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(shares)), context.Queue()
    arguments = [(make_queue, directory, action, share, (barrier, results)) for share in shares]
    processes = [context.Process(target=take_part, args=found) for found in arguments]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    done = [body for one in found for body in one[0]]
    seconds = max(one[2] for one in found) - min(one[1] for one in found)
    return done, seconds, sum(one[3] for one in found), sorted({one[4] for one in found if one[4]})


def work(name, processes, count, directory):
    make_queue, processes, count = QUEUES[name], int(processes), int(count)
    make_queue(directory)  # two processes at once need not make the file
    every = [f"{number:08x}-54f4-11e5-ad75-000000000000" for number in range(count)]
    shares = [every[first::processes] for first in range(processes)]
    posted, post_s, post_cpu_s, post_errors = phase(make_queue, directory, post_share, shares)
    taken, take_s, take_cpu_s, take_errors = phase(make_queue, directory, take_all, [[]] * processes)
    return {
        "posted_per_s": len(posted) / post_s,
        "post_cpu_us": post_cpu_s / count * 1e6,
        "taken_per_s": len(taken) / take_s,
        "take_cpu_us": take_cpu_s / max(1, len(taken)) * 1e6,
        "twice": len(taken) - len(set(taken)),
        "missing": count - len(set(taken)),
        "errors": post_errors + take_errors,
    }


def backlog(name, waiting, directory):
    queue, waiting = QUEUES[name](directory), int(waiting)
    start = time.time()
    queue.load(waiting)
    loaded_s, took = time.time() - start, []
    for _ in range(CLAIMS):
        start = time.perf_counter()
        claim = queue.claim()
        took.append((time.perf_counter() - start) * 1000)
        queue.post(["more"] * len(queue.bodies(claim)))
        queue.delete(claim)
    took.sort()
    return {
        "waiting": waiting,
        "loaded_per_s": waiting / loaded_s,
        "p50_ms": statistics.median(took),
        "p99_ms": took[int(len(took) * 0.99)],
    }


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    print(json.dumps({"work": work, "backlog": backlog}[command](*words)))
