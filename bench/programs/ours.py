"""Load or produce on the project's own queues, whichever service $WIDGET_QUEUE_URL names."""

import asyncio
import os
import sys

import common

from claim_queues import open_queues

QUEUE = "itchy-octo-chainsaw-request"

with open_queues(os.environ["WIDGET_QUEUE_URL"]) as queues:
    queues.create(QUEUE)
    ttl = 3600 if queues.limits.has_message_ttl else None
    if sys.argv[1] == "load":
        every, size = common.ids(), min(10, queues.limits.post_limit)
        for at in range(0, len(every), size):
            queues.post(QUEUE, [{"widget_id": found} for found in every[at : at + size]], ttl=ttl)
    else:
        asyncio.run(common.fill(lambda widget_id: queues.post(QUEUE, [{"widget_id": widget_id}], ttl=ttl)))
