"""moto's server with its SQS made safe for threads: `python sqs_server.py PORT`, on loopback.

One path is added: POST /test-clock with a number of seconds moves the clock of SQS on.

moto 5.2.5 changes a queue's list of messages from all threads without a lock: two receives can take the same message,
and a delete can drop a message that is being posted.
"""

import functools
import logging
import sys
import threading
import time
import types

import moto.server
import moto.sqs.models
from moto.sqs.models import SQSBackend

LOCK = threading.RLock()
LOOK_EVERY_S = 0.05
receive_now = SQSBackend.receive_message
clock = types.SimpleNamespace(ahead_s=0.0)


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
            found = receive_now(self, queue_name, count, 0, *args, **options)
        if found or time.monotonic() >= give_up_at:
            return found
        self.get_queue(queue_name).wait_for_messages(LOOK_EVERY_S)


for name in (
    "create_queue",
    "send_message_batch",
    "delete_message_batch",
    "change_message_visibility_batch",
    "purge_queue",
):
    setattr(SQSBackend, name, one_at_a_time(getattr(SQSBackend, name)))
SQSBackend.receive_message = receive_message
moto.sqs.models.unix_time = lambda: time.time() + clock.ahead_s
moto.sqs.models.unix_time_millis = lambda: (time.time() + clock.ahead_s) * 1000


class Application(moto.server.DomainDispatcherApplication):
    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] != "/test-clock":
            return super().__call__(environ, start_response)
        clock.ahead_s += float(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(clock.ahead_s).encode()]


moto.server.DomainDispatcherApplication = Application
logging.getLogger("werkzeug").setLevel(logging.ERROR)
moto.server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])
