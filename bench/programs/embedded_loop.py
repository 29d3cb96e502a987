"""The least that takes requests off the embedded queue and POSTs them one by one: no retries, no renewals, no counts.

It shows what of the consumer's latency is the queue's, the maker's and the machine's.
"""

import http.client
import json
import os
import socket
from urllib.parse import urlsplit

from claim_queues import Settlement, open_queues

QUEUE = "itchy-octo-chainsaw-request"

url = urlsplit(os.environ["BENCH_MAKER_URL"])
connection = http.client.HTTPConnection(url.hostname, url.port)
connection.connect()
connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
with open_queues(os.environ["WIDGET_QUEUE_URL"]) as queues:
    queues.create(QUEUE)
    while True:
        claim = queues.claim(QUEUE, ttl=300, grace=60, limit=20, wait=5)
        for message in claim.messages if claim else ():
            connection.request("POST", url.path, json.dumps(message.body), {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                answer.read()
        if claim:
            queues.settle(claim, [Settlement(message) for message in claim.messages])
