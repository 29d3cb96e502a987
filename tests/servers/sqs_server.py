"""moto's SQS made safe for threads and as strict as Amazon's: `python sqs_server.py PORT`, on loopback.

POST /test-clock with a number of seconds makes all messages so much older, and ends what would have ended by then.

moto 5.2.5 changes a queue's list of messages from all threads without a lock, counts characters where SQS counts bytes,
and takes bodies that SQS refuses.
"""

import functools
import logging
import re
import sys
import threading
import time

import moto.server
from moto.sqs.exceptions import SQSException
from moto.sqs.models import SQSBackend, sqs_backends

LOCK = threading.RLock()
LOOK_EVERY_S = 0.05
REFUSED = re.compile("[^\x09\x0a\x0d\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|^$")
"""SendMessage: "#x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF", and not empty."""
MOST_BYTES = 1_048_576
originals = {name: getattr(SQSBackend, name) for name in vars(SQSBackend)}


def one_at_a_time(method):
    @functools.wraps(method)
    def call(*args, **options):
        with LOCK:
            return method(*args, **options)

    return call


def receive_message(self, queue_name, count, wait_seconds_timeout, *args, **options):
    """Short polls, so that the lock is free between them."""
    give_up_at = time.monotonic() + wait_seconds_timeout
    while True:
        with LOCK:
            found = originals["receive_message"](self, queue_name, count, 0, *args, **options)
        if found or time.monotonic() >= give_up_at:
            return found
        self.get_queue(queue_name).wait_for_messages(LOOK_EVERY_S)


@one_at_a_time
def send_message_batch(self, queue_name, entries):
    for entry in entries.values():
        if REFUSED.search(entry["MessageBody"]):
            raise SQSException("InvalidMessageContents", "Invalid characters found.")
    if sum(len(entry["MessageBody"].encode()) for entry in entries.values()) > MOST_BYTES:
        raise SQSException("AWS.SimpleQueueService.BatchRequestTooLong", f"More than {MOST_BYTES} bytes.")
    return originals["send_message_batch"](self, queue_name, entries)


@one_at_a_time
def pass_time(seconds):
    backends = [backend for account in sqs_backends.values() for backend in account.values()]
    for queue in [queue for backend in backends for queue in backend.queues.values()]:
        for message in queue._messages:  # noqa: SLF001
            message.sent_timestamp -= int(seconds * 1000)
            message.visible_at -= seconds * 1000


class Application(moto.server.DomainDispatcherApplication):
    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] != "/test-clock":
            return super().__call__(environ, start_response)
        pass_time(float(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
        start_response("204 No Content", [])
        return []


SQSBackend.receive_message = receive_message
SQSBackend.send_message_batch = send_message_batch
for name in ("create_queue", "delete_message_batch", "change_message_visibility_batch", "purge_queue"):
    setattr(SQSBackend, name, one_at_a_time(getattr(SQSBackend, name)))
moto.server.DomainDispatcherApplication = Application
logging.getLogger("werkzeug").setLevel(logging.ERROR)
moto.server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])
