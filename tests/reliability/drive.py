"""Run one of the scripts as it is, but for what a campaign needs of it: `python drive.py PYTHON SCRIPT OPTIONS`.

Claim TTLs may be short. POST_LIMIT in the environment: messages of one post to the embedded queue. POISON: the widget
id whose POST kills the process.
"""

import os
import runpy
import signal
import sys
from dataclasses import replace

import click

import claim_queues.cli

claim_queues.cli.CLAIM_SECONDS = click.IntRange(1, 43_200)

from claim_queues.sqlite import SqliteQueues  # noqa: E402 the bounds come first
from widgets.delivery import Maker  # noqa: E402

post = Maker.post


def post_or_die(self, delivery, queue):
    if delivery.widget_id == os.environ["POISON"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return post(self, delivery, queue)


if "POISON" in os.environ:
    Maker.post = post_or_die
if "POST_LIMIT" in os.environ:
    SqliteQueues.limits = replace(SqliteQueues.limits, post_limit=int(os.environ["POST_LIMIT"]))
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
