"""moto's server with its SQS made safe for threads: `python sqs_server.py PORT`, on loopback.

moto 5.2.5 changes a queue's list of messages from all threads without a lock: two receives can take the same message,
and a delete can drop a message that is being posted.
"""

import functools
import logging
import sys
import threading
import time

from moto.server import main
from moto.sqs.models import SQSBackend

LOCK = threading.RLock()
LOOK_EVERY_S = 0.05
receive_now = SQSBackend.receive_message


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

logging.getLogger("werkzeug").setLevel(logging.ERROR)
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
