import asyncio

import aiohttp
import common
from saq import Queue

queue = Queue.from_url(common.REDIS_URL)


async def make(ctx, *, widget_id):
    async with ctx["session"].post(common.MAKER_URL, json={"widget_id": widget_id}) as response:
        response.raise_for_status()
        await response.read()


async def start(ctx):
    ctx["session"] = aiohttp.ClientSession()


async def stop(ctx):
    await ctx["session"].close()


settings = {"queue": queue, "functions": [make], "concurrency": 16, "startup": start, "shutdown": stop}


async def main():
    await queue.connect()
    await common.main_async(lambda widget_id: queue.enqueue("make", widget_id=widget_id, ttl=-1))
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(main())
