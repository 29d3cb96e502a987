"""The least that does the work, without retries, renewals or counts.

loops.py embedded                          claim from the embedded queue, POST with http.client and settle, one by one
loops.py sqs THREADS                       each receives from SQS, POSTs one by one and deletes what it received
loops.py http_client|urllib3 THREADS       no queue: each thread POSTs its share of the ids over a kept-alive connection
"""

import http.client
import json
import os
import socket
import sys
import threading
from urllib.parse import urlsplit

import common

HEADERS = {"Content-Type": "application/json"}
URL = urlsplit(common.MAKER_URL)


def check(status):
    if status != 201:
        raise SystemExit(f"the maker answered {status}")


def connect():
    connection = http.client.HTTPConnection(URL.hostname, URL.port, timeout=10)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def post(connection, request):
    connection.request("POST", URL.path, json.dumps(request), HEADERS)
    with connection.getresponse() as response:
        response.read()
        check(response.status)


def http_client(ids):
    connection = connect()
    for widget_id in ids:
        post(connection, {"widget_id": widget_id})


def urllib3(ids):
    import urllib3

    pool = urllib3.PoolManager()
    for widget_id in ids:
        content = json.dumps({"widget_id": widget_id})
        check(pool.request("POST", common.MAKER_URL, body=content, headers=HEADERS, timeout=10).status)


def embedded():
    from claim_queues import Settlement, open_queues

    queue, connection = "itchy-octo-chainsaw-request", connect()
    with open_queues(os.environ["WIDGET_QUEUE_URL"]) as queues:
        while True:
            if claim := queues.claim(queue, ttl=300, grace=60, limit=20, wait=5):
                for message in claim.messages:
                    post(connection, message.body)
                queues.settle(claim, [Settlement(message) for message in claim.messages])


def sqs(_):
    url = os.environ["BENCH_SQS_QUEUE_URL"]
    while True:
        messages = client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=20).get("Messages", [])
        for message in messages:
            common.post_widget(message["Body"])
        if messages:
            entries = [{"Id": str(n), "ReceiptHandle": each["ReceiptHandle"]} for n, each in enumerate(messages)]
            client.delete_message_batch(QueueUrl=url, Entries=entries)


if sys.argv[1] == "sqs":
    import boto3
    from botocore.config import Config

    config = Config(max_pool_connections=int(sys.argv[2]))
    client = boto3.client("sqs", "us-east-1", endpoint_url=os.environ["BENCH_SQS_URL"], config=config)
if sys.argv[1] == "embedded":
    embedded()
else:
    loop, number, ids = globals()[sys.argv[1]], int(sys.argv[2]), common.ids()
    threads = [threading.Thread(target=loop, args=(ids[first::number],)) for first in range(number)]
    for thread in threads:
        thread.start()
