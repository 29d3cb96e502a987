import asyncio

import common
from celery import Celery

app = Celery("widgets", broker=common.REDIS_URL)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,  # at least once
    worker_prefetch_multiplier=16,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


@app.task(name="make", ignore_result=True)
def make(widget_id):
    common.post_widget(widget_id)


if __name__ == "__main__":
    asyncio.run(common.fill(make.delay))
