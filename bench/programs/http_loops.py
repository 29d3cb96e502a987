"""Bare loops without a queue: the ids are in memory, and each thread POSTs its share over a connection kept alive.

http_loops.py requests|urllib3|http_client THREADS
"""

import http.client
import json
import sys
import threading
from urllib.parse import urlsplit

import common
import requests
import urllib3

HEADERS = {"Content-Type": "application/json"}


def body_of(widget_id):
    return json.dumps({"widget_id": widget_id}).encode()


def check(status):
    if status != 201:
        raise SystemExit(f"the maker answered {status}")


def loop_requests(ids):
    with requests.Session() as session:
        for widget_id in ids:
            check(session.post(common.MAKER_URL, json={"widget_id": widget_id}, timeout=10).status_code)


def loop_urllib3(ids):
    pool = urllib3.PoolManager()
    for widget_id in ids:
        check(pool.request("POST", common.MAKER_URL, body=body_of(widget_id), headers=HEADERS, timeout=10).status)


def loop_http_client(ids):
    parts = urlsplit(common.MAKER_URL)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    for widget_id in ids:
        connection.request("POST", parts.path, body_of(widget_id), HEADERS)
        response = connection.getresponse()
        response.read()
        check(response.status)


loop, number, ids = globals()[f"loop_{sys.argv[1]}"], int(sys.argv[2]), common.ids()
threads = [threading.Thread(target=loop, args=(ids[first::number],)) for first in range(number)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
