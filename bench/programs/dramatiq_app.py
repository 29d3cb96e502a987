import asyncio

import common
import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=common.REDIS_URL))


@dramatiq.actor
def make(widget_id):
    common.post_widget(widget_id)


if __name__ == "__main__":
    import dramatiq_app  # so that the message names dramatiq_app, not __main__

    asyncio.run(common.fill(dramatiq_app.make.send))
