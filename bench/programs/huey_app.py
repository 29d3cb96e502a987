import asyncio
import os

import common
from huey import SqliteHuey

huey = SqliteHuey("widgets", filename=f"{os.environ['BENCH_DIR']}/huey.db", results=False, fsync=False)


@huey.task()
def make(widget_id):
    common.post_widget(widget_id)


if __name__ == "__main__":
    import huey_app  # so that the task names huey_app, not __main__

    asyncio.run(common.fill(huey_app.make))
