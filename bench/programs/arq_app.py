import asyncio

import aiohttp
import common
from arq import create_pool
from arq.connections import RedisSettings

SETTINGS = RedisSettings.from_dsn(common.REDIS_URL)
QUIET = {"version": 1, "disable_existing_loggers": True}


async def make(ctx, widget_id):
    async with ctx["session"].post(common.MAKER_URL, json={"widget_id": widget_id}) as response:
        response.raise_for_status()
        await response.read()


async def start(ctx):
    ctx["session"] = aiohttp.ClientSession()


async def stop(ctx):
    await ctx["session"].close()


class Worker:
    functions = (make,)
    on_startup = start
    on_shutdown = stop
    redis_settings = SETTINGS
    max_jobs = 64
    poll_delay = 0.01  # the default, 0.5, makes the latency
    keep_result = 0


async def main():
    pool = await create_pool(SETTINGS)
    await common.main_async(lambda widget_id: pool.enqueue_job("make", widget_id))
    await pool.aclose()


if __name__ == "__main__":
    asyncio.run(main())
