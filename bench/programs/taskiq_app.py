import asyncio

import aiohttp
import common
from taskiq import TaskiqEvents
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(common.REDIS_URL)


@broker.on_event(TaskiqEvents.WORKER_STARTUP)
async def start(state):
    state.session = aiohttp.ClientSession()


@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
async def stop(state):
    await state.session.close()


@broker.task(task_name="make")
async def make(widget_id: str) -> None:
    async with broker.state.session.post(common.MAKER_URL, json={"widget_id": widget_id}) as response:
        response.raise_for_status()
        await response.read()


async def main():
    await broker.startup()
    await common.fill(make.kiq)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
