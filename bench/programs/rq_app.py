import asyncio

import common
import redis
from rq import Queue


def make(widget_id):
    common.post_widget(widget_id)


if __name__ == "__main__":
    import rq_app  # so that the job names rq_app.make, not __main__.make

    queue = Queue(connection=redis.Redis.from_url(common.REDIS_URL))
    asyncio.run(common.fill(lambda widget_id: queue.enqueue(rq_app.make, widget_id, result_ttl=0)))
